"""What a growing network and its exemplars cost, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from clkit.errors import ConfigError
from clkit.memory import Budget, Footprint
from clkit.memory.budget import Counting

_FLOAT = 4


@dataclass(frozen=True)
class Costs:
    """Sizes of the parts, from which the size at every stage follows.

    Attributes:
        general: the shared part.
        block: one block.
        width: features of a block.
        classes: new classes of each task.
        per_exemplar: raw bytes of an exemplar.
        cached_per_exemplar: bytes of the shared part's maps that are kept for it, 0 where nothing is cached.
        budget: bytes, 0 for none.
        counting: ``paper`` or ``strict``.
        at: ``end`` or ``stage``: which model the exemplars have to fit beside.
    """

    general: Footprint
    block: Footprint
    width: int
    classes: list[int]
    per_exemplar: int
    cached_per_exemplar: int
    budget: int
    counting: str
    at: str

    def model(self, stage: int) -> Footprint:
        """The network after ``stage``: shared part, blocks, both heads, class means."""
        blocks, seen = stage + 1, sum(self.classes[: stage + 1])
        linear = seen * (blocks * self.width + 1)
        auxiliary = (self.classes[stage] + 1) * (self.width + 1) if stage else 0
        return Footprint(
            self.general.parameters + blocks * self.block.parameters,
            heads=_FLOAT * (linear + auxiliary),
            statistics=self.general.statistics + blocks * self.block.statistics,
            cached=_FLOAT * seen * blocks * self.width,
        )

    def exemplars(self, stage: int) -> int:
        """How many exemplars the budget leaves from the end of ``stage`` on."""
        beside = len(self.classes) - 1 if self.at == "end" else stage
        budget = Budget(self.budget, cast(Counting, self.counting))
        return budget.exemplars(self.model(beside), self._each(beside))

    def spent(self, stage: int, exemplars: int) -> int:
        """Bytes of the network after ``stage`` and so many exemplars."""
        counting = cast(Counting, self.counting)
        return Budget.spent(self.model(stage), exemplars, self._each(stage), counting).bytes

    def check(self) -> None:
        """Refuse a budget that is too small.

        Raises:
            ConfigError: the model after the last task, with one exemplar of each class, is larger.
        """
        last, seen = len(self.classes) - 1, sum(self.classes)
        need = self.spent(last, seen)
        if self.budget < need:
            raise ConfigError(
                f"strategy.budget: got {self.budget / 2**20:.3f} MiB, expected at least {need / 2**20:.3f} "
                f"({self.counting} counting): the model after {last + 1} tasks takes "
                f"{self.spent(last, 0) / 2**20:.3f}, and each of {seen} classes needs an exemplar; "
                "raise it, or take a smaller model"
            )

    def _each(self, stage: int) -> int:
        if self.counting == "paper" or not self.cached_per_exemplar:
            return self.per_exemplar
        return self.per_exemplar + self.cached_per_exemplar + _FLOAT * stage * self.width
