"""Reservoir sampling: at any time a uniform random sample of all records offered so far."""

from __future__ import annotations

from typing import Any

from clkit.memory.base import Buffer, Ref


def reservoir_slot(seen: int, size: int, draw: float) -> int | None:
    """The slot that record number ``seen`` (from 0) takes, by Vitter's algorithm R; None = it is not kept.

    The first ``size`` records fill the slots in order; a later one draws j uniformly from 0..seen and replaces slot j
    if there is one.

    Args:
        seen: how many records came before.
        size: number of slots.
        draw: uniform in [0, 1); j is floor(draw * (seen + 1)).

    >>> reservoir_slot(3, 5, 0.9), reservoir_slot(9, 5, 0.25), reservoir_slot(9, 5, 0.75)
    (3, 2, None)
    """
    if seen < size:
        return seen
    slot = int(draw * (seen + 1))
    return slot if slot < size else None


class ReservoirBuffer(Buffer):
    """Every record offered so far is held with the same probability, size / seen."""

    policy = "reservoir"

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._slots: list[Ref] = []

    def _offer(self, ref: Ref, draw: float) -> None:
        slot = reservoir_slot(self.seen, self.size, draw)
        if slot is None:
            return
        if slot == len(self._slots):
            self._slots.append(ref)
        else:
            self._slots[slot] = ref

    def _held(self) -> list[Ref]:
        return list(self._slots)

    def _restore(self, refs: list[Ref], extra: dict[str, Any]) -> None:
        self._slots = refs
