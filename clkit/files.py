"""Small files written whole or not at all, and hashes of files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clkit.errors import CheckpointError


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step, so that a reader or a crash never meets half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path), temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN is an error, because other programs can't read it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an operating-system error into one clear CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: can't write ({error.strerror or error}). Free some space or choose another output_dir; "
            "what was saved before is intact, and the same command resumes from it."
        ) from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
