"""Side memories on one projection: what they add to its output, for the sequences that the router sends to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.models.location import Location, guard
from clkit.models.routing import uncompiled
from clkit.strategies.wise.delta import SparseDelta
from clkit.strategies.wise.router import Router


class SideMemory(nn.Module):
    """A float32 change of the projection's matrix, and from which score on it answers.

    Attributes:
        parts: the shards in it: number, and ids of its edits in the order in which they were learned.
        matrix: buffer (out, in) float32.
        threshold: a sequence that scores above it may be answered by this memory.
    """

    matrix: Tensor

    def __init__(self, parts: Sequence[tuple[int, Sequence[str]]], matrix: Tensor, threshold: float) -> None:
        super().__init__()
        self.parts = [(shard, list(ids)) for shard, ids in parts]
        self.threshold = threshold
        self.register_buffer("matrix", matrix)
        self._packed: tuple[Tensor, tuple[str, int], dict[str, Any]] | None = None  # the delta of to_state, and of what

    @property
    def name(self) -> str:
        """``shard-3``, or ``shards-2-3`` for a merged one."""
        numbers = [shard for shard, _ in self.parts]
        return f"shard-{numbers[0]}" if len(numbers) == 1 else f"shards-{numbers[0]}-{numbers[-1]}"

    @property
    def edits(self) -> list[str]:
        """Ids of its edits, in the order in which they were learned."""
        return [i for _, ids in self.parts for i in ids]

    def forward(self, x: Tensor) -> Tensor:
        """(..., out) float32: x dW."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.matrix)

    def _apply(self, fn: Any, recurse: bool = True) -> SideMemory:
        # model.to(bfloat16) and model.half() must not round small updates away: the device follows, the type stays.
        moved = fn(self.matrix)
        self.matrix = moved if moved.dtype == self.matrix.dtype else self.matrix.to(moved.device)
        return self

    def to_state(self, storage: str) -> dict[str, Any]:
        """JSON and the sparse delta, its values as ``storage``; packed anew only when the matrix is another one."""
        key = storage, 0 if self.matrix.is_inference() else self.matrix._version
        if self._packed is None or self._packed[0] is not self.matrix or self._packed[1] != key:
            self._packed = self.matrix, key, SparseDelta.from_dense(self.matrix).state_dict(storage)
        return {"parts": self.parts, "threshold": self.threshold, "delta": self._packed[2]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> SideMemory:
        """Inverse of :meth:`to_state`."""
        matrix = SparseDelta.from_state(state["delta"]).dense()
        return cls([(shard, ids) for shard, ids in state["parts"]], matrix, state["threshold"])


class SideLayer:
    """Puts side memories on a projection by a forward hook: output = base(x) + x dW of the memory that answers.

    The projection, its weights and its flags are never touched, so it may have a bias, be a Conv1D, carry a LoRA
    adapter or be quantised. The memories are buffers below it (``side_memories``): they move with the model and are in
    its ``state_dict``.

    Args:
        location: the projection.
        router: decides which memory answers.
    """

    def __init__(self, location: Location, router: Router) -> None:
        self.location = location
        self.router = router
        self.memories = nn.ModuleList()
        location.projection.add_module("side_memories", self.memories)
        add = uncompiled(self._add)
        self._hook = location.projection.register_forward_hook(add)
        self._unguard = guard(location.decoder, {location.name: (location.projection, add)})
        router.install(location.lm, location.decoder)

    def remove(self) -> None:
        """Take the memories off; the model is what it was before, bit for bit."""
        self._hook.remove()
        self._unguard()
        self.router.remove()
        self.location.projection._modules.pop("side_memories", None)

    def __len__(self) -> int:
        return len(self.memories)

    def all(self) -> list[SideMemory]:
        """The memories, oldest first."""
        return [m for m in self.memories if isinstance(m, SideMemory)]

    def put(self, memories: Sequence[SideMemory]) -> None:
        """Replace all memories."""
        self.memories = nn.ModuleList([m.to(self.location.device) for m in memories])
        self.location.projection.add_module("side_memories", self.memories)
        self.router.forget()

    def _add(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        memories = self.all()
        if not memories or self.router.off:
            return output
        answers = self.router.route(args[0], output, memories)
        if all(k < 0 for k, _ in answers):
            return output
        x, result = args[0], output.clone()
        for k in sorted({k for k, _ in answers if k >= 0}):
            which = [i for i, a in enumerate(answers) if a.memory == k]
            start = min(answers[i].start for i in which)
            rows = torch.tensor(which, device=x.device)
            change = memories[k](x[rows, start:])
            late = torch.tensor([answers[i].start for i in which], device=x.device)[:, None] - start
            change[torch.arange(change.shape[1], device=x.device) < late] = 0.0
            result[rows, start:] = (result[rows, start:].float() + change).to(result.dtype)
        return result
