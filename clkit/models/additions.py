"""Changes of linear layers, added to what the layers give: base(x) + x dW. The layers themselves are never touched."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.models.location import guard

_PLACE = "added_change"


class KeptTypes(nn.Module):
    """A module whose buffers follow the model to another device, but keep their type.

    ``model.to(bfloat16)`` and ``model.half()`` would round small updates away.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> KeptTypes:
        for name, value in self._buffers.items():
            if value is not None:
                moved = fn(value)
                self._buffers[name] = moved if moved.dtype == value.dtype else value.to(moved.device)
        return self


class Change(KeptTypes, ABC):
    """A float32 change of a layer's matrix."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(..., out) float32: x dW."""


class DenseChange(Change):
    """A change of every entry.

    Attributes:
        matrix: buffer (out, in).
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        """(..., out): x dW."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.matrix)


class LowRankChange(Change):
    """A change of rank r, dW = scale * up @ down.

    Attributes:
        down: buffer (r, in).
        up: buffer (out, r).
        scale: of the product.
    """

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("down", down)
        self.register_buffer("up", up)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., out): x dW."""
        with torch.autocast(x.device.type, enabled=False):
            return self.scale * F.linear(F.linear(x.float(), self.down), self.up)


class Additions:
    """Puts changes on layers by forward hooks, so that a bias, a Conv1D, an adapter or a quantised layer all work.

    The changes are below their layers: they move with the model and are in its ``state_dict``.

    Args:
        layers: by their names below ``decoder``.
        decoder: holds them.

    Attributes:
        changes: what is added now, by the layer's name.
        off: True while nothing is added.
    """

    def __init__(self, layers: Mapping[str, nn.Module], decoder: nn.Module) -> None:
        self.layers = dict(layers)
        self.changes: dict[str, Change] = {}
        self.off = False
        hooks = {name: (layer, self._adding(name)) for name, layer in self.layers.items()}
        self._undo = [layer.register_forward_hook(hook).remove for layer, hook in hooks.values()]
        self._undo.append(guard(decoder, hooks))

    def put(self, changes: Mapping[str, Change]) -> None:
        """Replace all changes; layers that are not named get none."""
        self.changes = dict(changes)
        for name, layer in self.layers.items():
            layer._modules.pop(_PLACE, None)
            if name in self.changes:
                layer.add_module(_PLACE, self.changes[name])

    def remove(self) -> None:
        """Take everything off; the model is what it was before, bit for bit."""
        self.put({})
        for undo in self._undo:
            undo()

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """Within, nothing is added."""
        before, self.off = self.off, True
        try:
            yield
        finally:
            self.off = before

    def _adding(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            change = self.changes.get(name)
            if change is None or self.off:
                return output
            changed: Tensor = (output.float() + change(args[0])).to(output.dtype)
            return changed

        return add
