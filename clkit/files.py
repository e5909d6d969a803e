"""Small files written whole or not at all, and hashes of files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clkit.errors import CheckpointError

_HINTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free some space, or choose another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "There is no permission to write; choose another place"),
    errno.ENOENT: "The directory does not exist; make it, or choose another place",
    errno.EISDIR: "The path is a directory; give the name of a file",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "The path, or a part of it, is not a directory; choose another one"),
}


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step, so that a reader or a crash never meets half of it."""
    with disk_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN is an error, because other programs can't read it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def disk_errors(path: Path, advice: str = "") -> Iterator[None]:
    """Turn an operating-system error into one clear CheckpointError; ``advice`` is what else holds at this place."""
    try:
        yield
    except Exception as error:
        found = _of_system(error)
        if found is None:
            raise
        hint = _HINTS.get(found.errno or 0, "Check the disk, or choose another place")
        raise CheckpointError(
            f"{path}: can't write ({found.strerror or found}). {hint}.{advice and f' {advice}'}"
        ) from error


def _of_system(error: Exception) -> OSError | None:
    """The operating system's error; tokenizers and safetensors raise their own, which name it at their end."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)$", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Make or replace a file of any size in one step; its directory is made. Safe when several processes do it at once.

    Args:
        path: the file.
        write: writes the content to the path that it gets.

    Raises:
        CheckpointError: it can't be written; what was there before stays.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file; it is on the disk before this returns.

    Raises:
        CheckpointError: it can't be written; the file is as it was.
    """
    with disk_errors(path), path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(line.encode() + b"\n")
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def replace_directory(directory: Path, write: Callable[[Path], str]) -> str:
    """Make or replace a directory, whole or not at all; returns the text that ``write`` gives, with its final path."""
    temporary = directory.with_name(f".tmp-{directory.name}")
    with disk_errors(directory):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        text = write(temporary)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.replace(directory)
    return text.replace(str(temporary), str(directory))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
