"""The user's cache of fetched and converted models: complete directories only, one writer at a time."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clkit.errors import ModelError
from clkit.files import file_sha256

Say = Callable[[str], None]
MANIFEST = "clkit.json"
LOCK_SECONDS = 1800  # another process may be downloading over a slow line


def cache_root() -> Path:
    """``$CLKIT_CACHE``, or the user's cache directory of this platform."""
    if chosen := os.environ.get("CLKIT_CACHE"):
        return Path(chosen).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("clkit"))


def manifest(directory: Path) -> dict[str, Any] | None:
    """What ``publish`` wrote about a cached directory; None when it is not there, or not as it was written."""
    try:
        content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        whole = all((directory / f).stat().st_size == facts["size"] for f, facts in content["weights"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return content if whole else None


def weights(directory: Path) -> dict[str, str]:
    """SHA-256 of every weights file of a model directory.

    A cached directory carries them; they are trusted while size and time of the file are what they were, because
    hashing a large model takes longer than loading it. Any other directory is read in full.
    """
    known = (manifest(directory) or {}).get("weights", {})
    result = {}
    for path in sorted(directory.glob("*.safetensors")):
        facts, stat = known.get(path.name, {}), path.stat()
        same = facts.get("size") == stat.st_size and facts.get("mtime_ns") == stat.st_mtime_ns
        result[path.name] = facts["sha256"] if same else file_sha256(path)
    return result


def obtain(target: Path, make: Callable[[Path], Mapping[str, Any]], say: Say) -> Path:
    """Return ``target``, made by ``make`` when it is not there.

    ``make`` fills an empty directory beside the target and returns its provenance; the directory is renamed into place
    when it is complete. Processes that ask for the same target at once wait for the first one.

    Raises:
        ModelError: the cache can't be written, or another process holds it for too long.
    """
    if manifest(target) is not None:
        return target
    try:
        with _locked(target, say):
            if manifest(target) is not None:
                return target
            for stale in target.parent.glob(f".{target.name}.*.part"):
                shutil.rmtree(stale, ignore_errors=True)  # of a process that was killed; the lock says it is gone
            folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
            try:
                _publish(folder, make(folder), target)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"Can't write to the model cache {cache_root()}: {error.strerror or error}. "
            "Free some space there, or set CLKIT_CACHE to another directory."
        ) from error
    return target


@contextmanager
def _locked(target: Path, say: Say) -> Iterator[None]:
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{target.name}: another process is preparing it; waiting")
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            raise ModelError(f"Another process has held {lock.lock_file} for {LOCK_SECONDS // 60} minutes.") from error
    try:
        yield
    finally:
        lock.release()


def _publish(folder: Path, provenance: Mapping[str, Any], target: Path) -> None:
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        stat = path.stat()
        files[path.name] = {"sha256": file_sha256(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    text = json.dumps({**provenance, "weights": files}, indent=2, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    folder.chmod(0o755)  # mkdtemp and safetensors make it private; a shared cache is read by others
    for path in folder.iterdir():
        path.chmod(0o755 if path.is_dir() else 0o644)
    if target.exists():
        shutil.rmtree(target)  # incomplete or damaged: manifest() refused it
    folder.replace(target)
