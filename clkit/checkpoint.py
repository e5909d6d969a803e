"""Checkpoints: nested state as safetensors + JSON, written atomically, verified when read. Never pickle."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clkit.errors import CheckpointError
from clkit.files import disk_errors, file_sha256

_TENSOR = "__tensor__"
_ITEMS = "__items__"
_FORMAT = 1


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
    is written under a temporary name, synced, and renamed.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory
        self.keep = keep

    def list(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self.directory.glob("[0-9]*") if p.is_dir())

    def save(self, state: dict[str, Any]) -> Path:
        """Write a new checkpoint and drop the oldest beyond ``keep``.

        Raises:
            CheckpointError: the disk is full or the directory can't be written; older checkpoints stay.
        """
        found = self.list()
        target = self.directory / f"{(int(found[-1].name) if found else 0) + 1:08d}"
        temporary = self.directory / f".tmp-{target.name}"
        tree, tensors = pack(state)
        with disk_errors(target):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                _save_tensors(temporary / "state.safetensors", tensors)
                (temporary / "state.json").write_text(json.dumps(tree), encoding="utf-8")
                hashes = {name: file_sha256(temporary / name) for name in ("state.json", "state.safetensors")}
                (temporary / "manifest.json").write_text(
                    json.dumps({"format": _FORMAT, "sha256": hashes}), encoding="utf-8"
                )
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

        A damaged one is skipped with a warning.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        found = self.list()
        for path in reversed(found):
            try:
                return read_checkpoint(path)
            except CheckpointError as error:
                warnings.warn(f"{error} Falling back to the one before.", RuntimeWarning, stacklevel=2)
        if found:
            raise CheckpointError(
                f"{self.directory}: all {len(found)} checkpoints are damaged. "
                "Start again with --fresh, or restore a backup."
            )
        return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read and verify one checkpoint directory.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        wrong = [name for name, digest in manifest["sha256"].items() if file_sha256(path / name) != digest]
        if wrong:
            raise CheckpointError(f"{path}: damaged checkpoint ({', '.join(wrong)} changed since it was written).")
        tree = json.loads((path / "state.json").read_text(encoding="utf-8"))
        state: dict[str, Any] = unpack(tree, load_file(path / "state.safetensors"))
        return state
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged checkpoint ({type(error).__name__}: {error}).") from error


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
