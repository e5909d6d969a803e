"""The contract of an exemplar buffer.

A buffer holds references, not data: a record is read from its task's examples when it is rehearsed. Offer each record
once, in the first pass over its task: a policy that sees the stream of records must not see one twice. A record that
is offered again is ignored (by its task and index), so a repeated epoch does not bias the buffer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from clkit.errors import CheckpointError, ConfigError, did_you_mean


@dataclass(frozen=True, slots=True)
class Ref:
    """A record: the index of its task in the sequence, its index among the task's examples, its class and its id."""

    task: int
    index: int
    label: int | None
    id: str


class Buffer(ABC):
    """At most ``size`` references, chosen by a policy from all that were offered.

    Attributes:
        by_features: records are chosen when a task has been learned, by their features; ``add`` is not called.
        seen: how many different records were offered.
    """

    policy: ClassVar[str]
    by_features: ClassVar[bool] = False
    ref = Ref

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigError(f"a buffer's size must be at least 1, got {size}")
        self.size = size
        self.seen = 0
        self._offered: dict[int, np.ndarray[Any, np.dtype[np.bool_]]] = {}
        self._refs: list[Ref] | None = None

    def add(self, refs: Sequence[Ref], generator: torch.Generator) -> None:
        """Offer records, in the order of the stream. Splitting a stream into several calls changes nothing."""
        new = [ref for ref in refs if self._is_new(ref)]
        if new:
            # One draw per record, used or not: the state of the generator depends on the stream alone.
            draws = torch.rand(len(new), generator=generator, dtype=torch.float64).tolist()
            for ref, draw in zip(new, draws, strict=True):
                self._offer(ref, draw)
                self.seen += 1
            self._refs = None

    def sample(self, n: int, generator: torch.Generator, exclude_tasks: Collection[int] = ()) -> list[Ref]:
        """Draw ``n`` different references uniformly, or all in random order where there are fewer."""
        refs = [ref for ref in self.refs if ref.task not in exclude_tasks] if exclude_tasks else self.refs
        chosen = torch.randperm(len(refs), generator=generator)[:n].tolist()
        return [refs[i] for i in chosen]

    @property
    def refs(self) -> list[Ref]:
        """What is held now; not to be changed."""
        if self._refs is None:
            self._refs = self._held()
        return self._refs

    def __len__(self) -> int:
        return len(self.refs)

    def _is_new(self, ref: Ref) -> bool:
        """Mark a record as offered; False if it was before. One byte per record of a task."""
        known = self._offered.get(ref.task)
        if known is None or ref.index >= len(known):
            grown = np.zeros(max(64, 2 * (ref.index + 1)), dtype=np.bool_)
            if known is not None:
                grown[: len(known)] = known
            self._offered[ref.task] = known = grown
        if known[ref.index]:
            return False
        known[ref.index] = True
        return True

    @abstractmethod
    def _offer(self, ref: Ref, draw: float) -> None:
        """Keep ``ref`` or not; ``draw`` is uniform in [0, 1)."""

    @abstractmethod
    def _held(self) -> list[Ref]:
        """All references that are held."""

    @abstractmethod
    def _restore(self, refs: list[Ref], extra: dict[str, Any]) -> None:
        """Take over references in the order of ``_held``, and what ``_extra`` gave."""

    def _extra(self) -> dict[str, Any]:
        """State beyond the references, as JSON."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything the next call depends on: tensors and JSON."""
        numbers = [[ref.task, ref.index, -1 if ref.label is None else ref.label] for ref in self.refs]
        offered = {str(task): torch.from_numpy(np.packbits(known)) for task, known in self._offered.items()}
        return {
            "policy": self.policy,
            "size": self.size,
            "seen": self.seen,
            "refs": torch.tensor(numbers, dtype=torch.long).reshape(-1, 3),
            "ids": [ref.id for ref in self.refs],
            "offered": offered,
            "extra": self._extra(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            CheckpointError: the state is of a buffer with another policy or size.
        """
        if (state["policy"], state["size"]) != (self.policy, self.size):
            raise CheckpointError(
                f"the checkpoint has a {state['policy']} buffer of {state['size']}, and the configuration says "
                f"{self.policy} of {self.size}; restore the old settings or start a new run"
            )
        rows: Tensor = state["refs"]
        refs = [Ref(t, i, None if c < 0 else c, id) for (t, i, c), id in zip(rows.tolist(), state["ids"], strict=True)]
        self.seen = state["seen"]
        self._offered = {
            int(task): np.unpackbits(packed.to(torch.uint8).numpy()).astype(np.bool_)
            for task, packed in state["offered"].items()
        }
        self._restore(refs, state["extra"])
        self._refs = None


def make_buffer(policy: str, size: int) -> Buffer:
    """An empty buffer of a policy: ``reservoir``, ``class-balanced``, ``ring`` or ``herding``.

    Raises:
        ConfigError: the policy is unknown, or the size is not positive.
    """
    from clkit.memory.balanced import BalancedBuffer, RingBuffer
    from clkit.memory.herding import HerdingBuffer
    from clkit.memory.reservoir import ReservoirBuffer

    known = (ReservoirBuffer, BalancedBuffer, RingBuffer, HerdingBuffer)
    kinds: dict[str, type[Buffer]] = {kind.policy: kind for kind in known}
    if policy not in kinds:
        raise ConfigError(f"Unknown buffer policy '{policy}'.{did_you_mean(policy, kinds)} Known: {', '.join(kinds)}.")
    return kinds[policy](size)
