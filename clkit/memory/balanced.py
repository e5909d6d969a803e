"""Buffers that give every class (or task, where records have no class) an equal share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clkit.memory.base import Buffer, Ref
from clkit.memory.reservoir import reservoir_slot


def shares(size: int, groups: Sequence[str]) -> dict[str, int]:
    """Equal parts of ``size``; what does not divide goes to the groups that came first.

    >>> shares(5, ["a", "b", "c"])
    {'a': 2, 'b': 2, 'c': 1}
    """
    share, rest = divmod(size, len(groups)) if groups else (0, 0)
    return {name: share + (number < rest) for number, name in enumerate(groups)}


class GroupedBuffer(Buffer):
    """References by group - a class, or a task without classes -, in the order in which groups and records came."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._groups: dict[str, list[Ref]] = {}

    @staticmethod
    def _group_of(ref: Ref) -> str:
        return f"task {ref.task}" if ref.label is None else f"class {ref.label}"

    def _held(self) -> list[Ref]:
        return [ref for group in self._groups.values() for ref in group]

    def _extra(self) -> dict[str, Any]:
        return {"groups": list(self._groups)}  # also those that hold nothing now: their order matters

    def _restore(self, refs: list[Ref], extra: dict[str, Any]) -> None:
        self._groups = {name: [] for name in extra["groups"]}
        for ref in refs:
            self._groups[self._group_of(ref)].append(ref)


class BalancedBuffer(GroupedBuffer):
    """Shares as equal as the stream allows, and inside each group a uniform sample of its records.

    Class-balancing reservoir sampling (Chrysakis and Moens, 2020): while there is room everything is kept. Then a
    record of a group that has never been among the largest replaces a random record of a largest group; a record of
    any other group goes through that group's own reservoir. So a rare class keeps all, and the others share the rest.
    """

    policy = "class-balanced"

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._counts: dict[str, int] = {}  # records offered, by group
        self._full: set[str] = set()  # groups that have been a largest one of a full buffer
        self._total = 0

    def _offer(self, ref: Ref, draw: float) -> None:
        name = self._group_of(ref)
        group = self._groups.setdefault(name, [])
        seen = self._counts.get(name, 0)
        self._counts[name] = seen + 1
        if self._total < self.size:
            self._total += 1
        elif name in self._full:
            slot = reservoir_slot(seen, len(group), draw)
            if slot is not None:
                group[slot] = ref
            return
        else:
            victim = max(self._groups.values(), key=len)
            victim.pop(int(draw * len(victim)))
        group.append(ref)
        if self._total == self.size:
            largest = max(map(len, self._groups.values()))
            self._full.update(n for n, held in self._groups.items() if len(held) == largest)

    def _extra(self) -> dict[str, Any]:
        return {**super()._extra(), "counts": dict(self._counts), "full": sorted(self._full)}

    def _restore(self, refs: list[Ref], extra: dict[str, Any]) -> None:
        super()._restore(refs, extra)
        self._counts, self._full, self._total = dict(extra["counts"]), set(extra["full"]), len(refs)


class RingBuffer(GroupedBuffer):
    """The newest records of each class of each task: ``size`` over the number of such groups, first in, first out.

    What does not divide goes to the groups that came first. When a new group comes, the others give up their oldest
    records. With more groups than ``size``, the last ones have no place.
    """

    policy = "ring"

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._shares: dict[str, int] = {}

    @staticmethod
    def _group_of(ref: Ref) -> str:
        # By task too: where a class comes back in every task, the newest task would push all earlier ones out.
        return f"task {ref.task} class {ref.label}"

    def _offer(self, ref: Ref, draw: float) -> None:
        name = self._group_of(ref)
        if name not in self._groups:
            self._groups[name] = []
            self._share_out()
        group = self._groups[name]
        group.append(ref)
        if len(group) > self._shares[name]:
            del group[0]

    def _share_out(self) -> None:
        self._shares = shares(self.size, list(self._groups))
        for name, held in self._groups.items():
            del held[: max(0, len(held) - self._shares[name])]

    def _restore(self, refs: list[Ref], extra: dict[str, Any]) -> None:
        super()._restore(refs, extra)
        if self._groups:
            self._share_out()
