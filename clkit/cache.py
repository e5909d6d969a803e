"""What was computed once, kept on disk: rows of tensors that depend on nothing but an input and a recipe.

A frozen encoder gives the same features for the same image in every epoch, stage, run and class order. So they are kept
row by row: each under a name that is a hash of its input, in a folder named by a hash of the recipe (the encoder's
weights, for example). Everything here can be deleted at any time; it is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clkit.errors import CheckpointError
from clkit.files import replace_file
from clkit.models.store import cache_root
from clkit.tasks.batch import Encoded

CHUNK = 4096  # rows in a file: what a killed process loses
_STALE_SECONDS = 86_400
_WAIT_SECONDS = 600.0


class Rows(NamedTuple):
    """Rows of one or more vectors each.

    Attributes:
        flat: (M, ...) the vectors of all rows, in order.
        lengths: LongTensor (N,), vectors in each row; they add up to M.
    """

    flat: Tensor
    lengths: Tensor


def computed_root() -> Path:
    """Where runs keep what they computed once: ``$CLKIT_COMPUTED``, or ``computed`` in the user's cache."""
    chosen = os.environ.get("CLKIT_COMPUTED")
    return Path(chosen).expanduser() if chosen else cache_root() / "computed"


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)


def row_names(encoded: Encoded) -> list[bytes]:
    """A name for each example: a hash of what the model reads of it, whatever its id and label."""
    found = []
    for i in range(len(encoded)):
        inputs = encoded.batch(torch.tensor([i])).inputs
        found.append(bytes.fromhex(tensors_digest(inputs))[:16])
    return found


class RowCache:
    """Rows by recipe and name.

    A file is written under a temporary name and renamed; one that is truncated or changed is dropped with a warning and
    its rows are computed again. Several processes may use one folder: rows that one is computing the others wait for (a
    lock per recipe), and each adds files of its own. Where the disk has no locks, or one takes longer than ten minutes,
    the worst that can happen is that two compute the same rows.

    Args:
        root: None keeps nothing on disk.

    Example:
        >>> double = lambda i: Rows(2.0 * i.unsqueeze(1), torch.ones_like(i))
        >>> RowCache(None).rows({"what": "double"}, [b"a", b"b"], double).flat
        tensor([[0.],
                [2.]])
    """

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._shelves: dict[str, _Shelf] = {}

    def rows(self, recipe: Mapping[str, Any], names: Sequence[bytes], compute: Callable[[Tensor], Rows]) -> Rows:
        """The row of each name, in order.

        Args:
            recipe: JSON that says how a row follows from its input, completely.
            names: 16 bytes each; equal names are equal inputs.
            compute: gets positions in ``names`` (LongTensor) and gives their rows; asked for what is not there only.
        """
        if self._root is None:
            return compute(torch.arange(len(names)))
        key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]
        if key not in self._shelves:
            self._shelves[key] = _Shelf(self._root / key)
        shelf = self._shelves[key]
        shelf.refresh()
        first = {name: i for i, name in reversed(list(enumerate(names)))}
        missing = sorted(i for name, i in first.items() if name not in shelf.index)
        for start in range(0, len(missing), CHUNK):
            with shelf.alone():
                shelf.refresh()  # what another process added while this one waited
                chunk = [i for i in missing[start : start + CHUNK] if names[i] not in shelf.index]
                if chunk:
                    shelf.add([names[i] for i in chunk], compute(torch.tensor(chunk)), recipe)
        return shelf.take(names)


def holding(root: Path, names: Collection[bytes]) -> list[Path]:
    """The files, of whatever recipe, that hold a row of one of these names.

    A damaged file counts too: what is in it can't be told.
    """
    found, wanted = [], {*names}
    for path in sorted(root.glob("*/*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                rows = file.get_tensor("names").numpy()
        except (OSError, SafetensorError):
            found.append(path)
            continue
        if any(row.tobytes() in wanted for row in rows):
            found.append(path)
    return found


class _Shelf:
    """The rows of one recipe."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index: dict[bytes, Tensor] = {}
        self._seen: set[str] = set()

    def refresh(self) -> None:
        """Read the files that are new, and clear away what a killed process left."""
        for path in sorted(self.directory.glob("*.safetensors")):
            if path.name not in self._seen:
                self._read(path)
        for path in self.directory.glob(".*.tmp"):
            try:
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
            except OSError:
                continue  # another process was faster

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within the context no other process computes rows of this recipe, where that can be had."""
        lock = FileLock(self.directory / ".lock", timeout=_WAIT_SECONDS)
        with contextlib.ExitStack() as held:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock)
            except (OSError, NotImplementedError, Timeout):
                pass  # a disk without locks, or full; or the other one takes too long
            yield

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("names", "lengths", "flat")}
                whole = (file.metadata() or {}).get("sha256") == tensors_digest(tensors)
        except (OSError, SafetensorError):
            whole = False
        if whole:
            self._seen.add(path.name)
            self._keep(tensors["names"], Rows(tensors["flat"], tensors["lengths"]))
        elif path.exists():  # else another process found it damaged too
            warnings.warn(f"{path}: damaged; its rows are computed again.", RuntimeWarning, stacklevel=2)
            path.unlink(missing_ok=True)

    def _keep(self, names: Tensor, rows: Rows) -> None:
        parts = torch.split(rows.flat, rows.lengths.tolist())
        for name, part in zip(names.numpy(), parts, strict=True):
            self.index[name.tobytes()] = part

    def add(self, names: Sequence[bytes], rows: Rows, recipe: Mapping[str, Any]) -> None:
        """Keep rows, on disk if that is possible."""
        packed = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8).view(len(names), -1)
        tensors = {"names": packed, "lengths": rows.lengths, "flat": rows.flat.cpu().contiguous()}
        sha256 = tensors_digest(tensors)
        metadata = {"sha256": sha256, "recipe": json.dumps(recipe, sort_keys=True)}
        path = self.directory / f"{sha256[:32]}.safetensors"
        try:
            replace_file(path, lambda temporary: save_file(tensors, temporary, metadata))
        except (CheckpointError, SafetensorError) as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"{reason} Rows of this run are kept in memory only.", RuntimeWarning, stacklevel=2)
            self._keep(packed, Rows(tensors["flat"], rows.lengths))
        else:
            self._read(path)

    def take(self, names: Sequence[bytes]) -> Rows:
        """Rows by name."""
        parts = [self.index[name] for name in names]
        return Rows(torch.cat(parts), torch.tensor([len(part) for part in parts]))
