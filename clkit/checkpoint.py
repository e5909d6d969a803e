"""Checkpoints: nested state as safetensors + JSON, written atomically, verified when read. Never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clkit import __version__
from clkit.errors import CheckpointError
from clkit.files import disk_errors, file_sha256

_TENSOR = "__tensor__"
_ITEMS = "__items__"
_FORMAT = 1
_FILES = ("state.json", "state.safetensors")


class _NewerFormat(CheckpointError):
    """A checkpoint that this clkit is too old to read; it is not damaged."""


def pack(state: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Split nested dicts, lists, scalars and tensors into a JSON tree and a flat dict of tensors.

    Tuples come back as lists; dicts with keys that are not strings keep their keys.

    Raises:
        TypeError: something in it is neither JSON nor a tensor.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            tensors[where] = value.detach().contiguous().cpu()
            return {_TENSOR: where}
        if isinstance(value, dict):
            if all(isinstance(k, str) for k in value):
                return {k: walk(v, f"{where}/{k}") for k, v in value.items()}
            return {_ITEMS: [[k, walk(v, f"{where}/{k}")] for k, v in value.items()]}
        if isinstance(value, (list, tuple)):
            return [walk(v, f"{where}/{i}") for i, v in enumerate(value)]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(
            f"state at '{where}' is a {type(value).__name__}; use numbers, strings, lists, dicts and tensors"
        )

    return walk(state, path), tensors


def unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of :func:`pack`."""
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        if _ITEMS in tree:
            return {k: unpack(v, tensors) for k, v in tree[_ITEMS]}
        return {k: unpack(v, tensors) for k, v in tree.items()}
    if isinstance(tree, list):
        return [unpack(v, tensors) for v in tree]
    return tree


class CheckpointStore:
    """The checkpoints of one run: ``checkpoints/<serial>``, newest last, ``keep`` of them.

    A checkpoint is a directory with ``state.json``, ``state.safetensors`` and ``manifest.json`` (SHA-256 of both). It
    is written under a temporary name, synced, and renamed. One that must not be used again is kept as
    ``damaged-<serial>`` or ``bad-<serial>``; serials are never given twice.
    """

    def __init__(
        self, directory: Path, keep: int = 2, advice: str = "Start again with --fresh, or restore a backup."
    ) -> None:
        self.directory = directory
        self.keep = keep
        self._advice = advice  # where all are damaged

    def list(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self.directory.glob("[0-9]*") if p.name.isdecimal() and p.is_dir())

    def newest(self) -> str | None:
        """Name of the newest complete checkpoint: another one once anything was saved since."""
        found = self.list()
        return found[-1].name if found else None

    def save(self, state: dict[str, Any]) -> Path:
        """Write a new checkpoint and drop the oldest beyond ``keep``.

        Raises:
            CheckpointError: the disk is full or the directory can't be written; older checkpoints stay.
        """
        names = [re.fullmatch(r"(?:damaged-|bad-)?(\d+)", p.name) for p in self.directory.glob("*")]
        target = self.directory / f"{max((int(n[1]) for n in names if n), default=0) + 1:08d}"
        temporary = self.directory / f".tmp-{target.name}"
        tree, tensors = pack(state)
        with disk_errors(target, "What was saved before is intact, and the same command resumes from it."):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                _save_tensors(temporary / "state.safetensors", tensors)
                (temporary / "state.json").write_text(json.dumps(tree), encoding="utf-8")
                hashes = {name: file_sha256(temporary / name) for name in _FILES}
                manifest = {"format": _FORMAT, "clkit": __version__, "sha256": hashes}
                (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
                for name in (*hashes, "manifest.json"):
                    _sync(temporary / name)
                temporary.replace(target)
                _sync(self.directory)
            except OSError:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        for old in self.list()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, or None when there is none at all.

        A damaged one is skipped with a warning, and set aside so that it does not count towards ``keep``.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged; or a newer clkit wrote them.
        """
        found = self.list()
        damaged = []
        for path in reversed(found):
            try:
                state = read_checkpoint(path)
            except _NewerFormat:
                raise
            except CheckpointError as error:
                warnings.warn(f"{error} Falling back to the one before.", RuntimeWarning, stacklevel=2)
                damaged.append(path)
            else:
                self._set_aside(damaged, "damaged")
                return state
        if found:
            raise CheckpointError(f"{self.directory}: all {len(found)} checkpoints are damaged. {self._advice}")
        return None

    def drop_after(self, total_steps: int) -> None:
        """Set aside, as ``bad-<serial>``, the checkpoints made after more than ``total_steps`` steps."""
        self._set_aside([p for p in self.list() if _total_steps(p) > total_steps], "bad")

    def _set_aside(self, paths: Iterable[Path], why: str) -> None:
        for path in paths:
            with disk_errors(path):
                path.rename(path.with_name(f"{why}-{path.name}"))


class FollowerStore(CheckpointStore):
    """Reads what another process wrote, such as the first one of a run."""

    def save(self, state: dict[str, Any]) -> Path:
        """Nothing."""
        return self.directory

    def _set_aside(self, paths: Iterable[Path], why: str) -> None:
        """Nothing."""


def _total_steps(path: Path) -> int:
    """How many steps a checkpoint has behind it, by ``state.json`` alone; -1 when that can't be read."""
    try:
        return int(json.loads((path / "state.json").read_text(encoding="utf-8"))["position"]["total_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read and verify one checkpoint directory.

    Raises:
        CheckpointError: a file is missing, truncated or changed, or a newer clkit wrote it.
    """
    try:
        hashes = _hashes(path)
        wrong = [name for name in _FILES if file_sha256(path / name) != hashes[name]]
        if wrong:
            raise CheckpointError(f"{path}: damaged checkpoint ({', '.join(wrong)} changed since it was written).")
        tree = json.loads((path / "state.json").read_text(encoding="utf-8"))
        state: dict[str, Any] = unpack(tree, load_file(path / "state.safetensors"))
        return state
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged checkpoint ({type(error).__name__}: {error}).") from error


def _hashes(path: Path) -> dict[str, Any]:
    """What the manifest says of each file.

    Raises:
        ValueError: it is not a manifest.
        CheckpointError: it has a format that this clkit does not know.
    """
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    hashes = manifest.get("sha256") if isinstance(manifest, dict) else None
    if not isinstance(hashes, dict) or not {*_FILES} <= {*hashes} or not isinstance(manifest.get("format"), int):
        raise ValueError("manifest.json is not a manifest")
    if manifest["format"] > _FORMAT:
        raise _NewerFormat(
            f"{path}: written in checkpoint format {manifest['format']} by clkit {manifest.get('clkit', '(unknown)')}; "
            f"clkit {__version__} reads format {_FORMAT}. Go on with the clkit that wrote it, or a newer one."
        )
    return hashes


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors; memory shared between two of them is written twice, so that both load by name."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        unshared[name] = tensor if whole and pointer not in seen else tensor.clone()
        seen.add(pointer)
    try:
        save_file(unshared, path)
    except SafetensorError as error:  # its own type, also for a full disk
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise OSError(f"{error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clone_state(state: Any) -> Any:
    """A deep copy of nested state whose tensors share no memory with the original."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {k: clone_state(v) for k, v in state.items()}
    return [clone_state(v) for v in state] if isinstance(state, list) else state


def tensor_dict(module: torch.nn.Module, names: set[str]) -> dict[str, Tensor]:
    """The parameters called ``names`` and all persistent buffers of a module, by name, not copied."""
    buffers = {name for name, _ in module.named_buffers()}
    state = module.state_dict(keep_vars=True)
    return {k: v.detach() for k, v in state.items() if k in names or k in buffers}


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and values of tensors."""
    found = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
