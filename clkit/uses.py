"""When a run first used each record: one number per record, kept in every checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from clkit.tasks.base import TaskSequence
from clkit.tasks.batch import Batch, Encoded


class FirstUse:
    """The optimiser step, counted from the beginning of the run, whose batch first held each record.

    Only batches of the trainer's own steps count; what a strategy reads beside them it must say by its capabilities
    (``causal``). A record that stands in several tasks under one id is one record.

    Attributes:
        foreign: how many rows were used that are records of no task, such as those that are being unlearned.
        complete: False where the run was begun by a clkit that did not write this down.
    """

    def __init__(self, tasks: TaskSequence) -> None:
        self._slots: dict[str, int] = {}
        for task in tasks:
            for id in task.train.ids:
                self._slots.setdefault(id, len(self._slots))
        self._first = torch.full((len(self._slots),), -1, dtype=torch.int32)
        self._source: Encoded | None = None
        self._of_source = torch.empty(0, dtype=torch.long)
        self.foreign = 0
        self.complete = True

    def note(self, batch: Batch, step: int) -> None:
        """The rows of a batch are used in a step (0-based)."""
        if batch.source is not self._source:  # the same object for a whole stage, as a rule
            self._source = batch.source
            self._of_source = torch.tensor([self._slots.get(id, -1) for id in batch.source.ids], dtype=torch.long)
        slots = self._of_source[batch.indices]
        known = slots[slots >= 0]
        self.foreign += len(slots) - len(known)
        self._first[known[self._first[known] < 0]] = step

    def at(self, id: str) -> int | None:
        """The step that first used a record; None if none did."""
        found = int(self._first[self._slots[id]])
        return found if found >= 0 else None

    def used(self) -> int:
        """How many of the tasks' records were used."""
        return int((self._first >= 0).sum())

    def carried(self, old: FirstUse, upto: int) -> FirstUse:
        """This, with what ``old`` says of the records that both have, as it was after ``upto`` steps."""
        for id, slot in self._slots.items():
            step = old.at(id) if id in old._slots else None
            self._first[slot] = step if step is not None and step < upto else -1
        return self

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"first": self._first, "foreign": self.foreign, "complete": self.complete}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Inverse of :meth:`state_dict`; None is from a run that did not write it down."""
        self.complete = state is not None and state["complete"] and len(state["first"]) == len(self._first)
        if state is not None and self.complete:
            self._first.copy_(state["first"])
            self.foreign = state["foreign"]


def recorded(state: dict[str, Any], tasks: TaskSequence) -> FirstUse | None:
    """What a checkpoint says; None when it was begun before clkit wrote it down, or is for other tasks."""
    uses = FirstUse(tasks)
    uses.load_state_dict(state.get("first_use"))
    return uses if uses.complete else None
