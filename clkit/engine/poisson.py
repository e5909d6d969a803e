"""Poisson sampling of units, and the secret random numbers of a private run.

Every step draws each unit (a record, or a subject with all its records) by itself with the same chance. A batch has any
size, zero included, and an empty one is a step like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from clkit.errors import CapabilityError
from clkit.rng import derive_seed
from clkit.tasks.base import TextExamples
from clkit.tasks.batch import Batch, Encoded

if TYPE_CHECKING:
    from clkit.strategy import Strategy

UnitName = Literal["record", "subject"]


class Draws:
    """Random numbers for sampling and noise.

    They come from PCG64DXSM generators, each with 128 bits of the operating system's entropy, which is kept nowhere: a
    resumed run draws new ones. (A CPU generator of torch would use 32 bits of its seed, few enough to try them all.)
    Noise on a GPU is drawn there, from a 63-bit seed taken from its generator.

    Args:
        test_seed: makes every draw repeatable, and so voids the guarantee; None = secret.
        shared: the 128 bits of sampling, the same on every process of a run; None = this process has its own.
    """

    def __init__(self, test_seed: int | None = None, shared: int | None = None) -> None:
        self._test_seed = test_seed
        self._chance = np.random.Generator(np.random.PCG64DXSM(shared))
        self._numbers = np.random.Generator(np.random.PCG64DXSM())
        self._on_device: torch.Generator | None = None
        self.begin(0, 0)

    def begin(self, stage: int, step: int) -> None:
        """A step begins; with a test seed its draws are a function of seed, stage and step."""
        if self._test_seed is not None:
            seed = derive_seed(self._test_seed, stage, step)
            self._chance = self._numbers = np.random.Generator(np.random.PCG64DXSM(seed))
            self._on_device = None

    def chosen(self, count: int, rate: float) -> Tensor:
        """(count,) bool, each True with probability ``rate``, independently."""
        return torch.from_numpy(self._chance.random(count) < rate)

    def noise(self, like: Tensor, std: float) -> Tensor:
        """Gaussian noise of a tensor's shape, type and device."""
        if like.device.type == "cpu":
            kind = np.float64 if like.dtype == torch.float64 else np.float32
            drawn = torch.from_numpy(self._numbers.standard_normal(like.shape, dtype=kind))
            return drawn.mul_(std).to(like.dtype)
        if self._on_device is None:
            seed = int(self._numbers.integers(2**63))
            self._on_device = torch.Generator(like.device).manual_seed(seed)
        return torch.empty_like(like).normal_(0.0, std, generator=self._on_device)


@dataclass(frozen=True)
class Units:
    """The units of one stage.

    Attributes:
        of: (N,) the unit of each record, in the order of the stage's training set.
        names: how each unit is called, the same in every stage; a record by its id, a subject by itself.
    """

    of: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def units_of(strategy: Strategy, stage: int, unit: UnitName) -> Units:
    """The units of ``stage``.

    Raises:
        CapabilityError: the unit is the subject, and some records have none.
    """
    tasks = [strategy.run.tasks[t] for t in strategy.training_set(stage)]
    if unit == "record":
        ids = tuple(id for task in tasks for id in task.train.ids)
        return Units(torch.arange(len(ids)), ids)
    names: dict[str, int] = {}
    of = []
    for task in tasks:
        examples = task.train
        subjects = [r.subject for r in examples.records] if isinstance(examples, TextExamples) else [None]
        if missing := sum(not subject for subject in subjects):
            which = f"{missing} of its {len(examples)} records have none" if len(subjects) > 1 else "it has none"
            raise CapabilityError(
                f"engine.unit: subject needs a `subject` on every record of task '{task.name}', and {which}; add them "
                "(tasks.columns), or protect records with engine.unit=record"
            )
        of += [names.setdefault(str(subject), len(names)) for subject in subjects]
    return Units(torch.tensor(of, dtype=torch.long), tuple(names))


class PoissonBatches:
    """The batches of one stage, from step ``start`` on.

    Args:
        source: the stage's records, encoded.
        units: what is drawn.
        rate: the chance of a unit in a step.
        steps: of the whole stage.
        stage: its number.
        start: the first step to take.
        draws: where chance comes from.
        by_length: put records of similar length side by side, for less padding in micro-batches.
    """

    def __init__(
        self,
        source: Encoded,
        units: Units,
        rate: float,
        steps: int,
        *,
        stage: int,
        start: int,
        draws: Draws,
        by_length: bool,
    ) -> None:
        self._source, self._units, self._rate = source, units, rate
        self._stage, self._start, self._steps = stage, start, steps
        self._draws = draws
        lengths = source.lengths if by_length else None
        self._lengths = None if lengths is None else torch.from_numpy(lengths)

    def __len__(self) -> int:
        return self._steps - self._start

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self._start, self._steps):
            self._draws.begin(self._stage, step)
            chosen = self._draws.chosen(len(self._units), self._rate)
            rows = chosen[self._units.of].nonzero().squeeze(1)
            if self._lengths is not None:
                rows = rows[self._lengths[rows].argsort(stable=True)]
            # The records of a unit stay together, so that little of an unfinished one has to be kept.
            if len(self._units) < len(self._units.of):
                rows = rows[self._units.of[rows].argsort(stable=True)]
            yield self._source.batch(rows)
