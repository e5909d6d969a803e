"""What a private run spent, written down before it is spent, and what follows from it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clkit.engine.accounting import Noisy, epsilon_of, group_epsilon_of, naive_group
from clkit.engine.poisson import UnitName, units_of
from clkit.errors import CheckpointError
from clkit.files import append_line, disk_errors

if TYPE_CHECKING:
    from clkit.strategy import Strategy

FILE = "noisy_steps.txt"
VOID = "engine.test_seed made noise and sampling repeatable, so nothing is guaranteed"
NO_NOISE = "no noise was added, so nothing is guaranteed"
LITTLE_NOISE = "by its accountant no finite epsilon follows from so little noise, so nothing is guaranteed"
ASSUMPTIONS = (
    "the number of units, the sampling rate, the number of steps and all options are public and were not chosen by "
    "looking at the data",
    "noise and sampling come from the operating system's entropy through PCG64DXSM, which is not a cryptographic "
    "generator; no seed was kept",
    "noise is added in floating point; attacks on its rounding (Mironov 2012) are not excluded",
    "every step that may have been taken is counted, those repeated after a crash included",
)
NOT_CLAIMED = (
    "anything about data that the base model saw before this training",
    "anything about loss values, scores and generated answers in the run's directory: they are computed without noise",
    "anything about other models trained on the same records without noise, such as a deployed one",
    "that records outside a unit do not repeat what is in it",
)


class Stage(NamedTuple):
    """The plan of one stage."""

    units: int
    records: int
    rate: float
    steps: int


def plan(strategy: Strategy, unit: UnitName) -> tuple[list[Stage], int]:
    """The stages of a run that train something, and how many units there are in all.

    A unit is drawn with probability ``batch_size / records``: on average a batch has ``batch_size`` records, whatever
    the unit.
    """
    stages: list[Stage] = []
    names: set[str] = set()
    for stage in range(len(strategy.run.tasks)):
        if not strategy.training_set(stage):
            continue
        units = units_of(strategy, stage, unit)
        names.update(units.names)
        stages.append(Stage(len(units), len(units.of), rate_of(strategy, len(units.of)), strategy.stage_steps(stage)))
    return stages, len(names)


def rate_of(strategy: Strategy, records: int) -> float:
    """The chance of a unit in a step of a stage with that many records."""
    return min(1.0, strategy.run.config.train.batch_size / max(1, records))


class Spent:
    """The noisy steps of a run, in memory and in ``noisy_steps.txt`` of its directory.

    A line is on the disk before its step draws noise. After a crash the steps since the checkpoint are taken again
    with new noise, and both count.
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[float, float]] = Counter()
        self._file: Path | None = None

    def keep_in(self, file: Path) -> None:
        """Go on with what the file says was spent.

        Raises:
            CheckpointError: it can't be read.
        """
        self._file = file
        self._counts.clear()
        if not file.exists():
            return
        with disk_errors(file):
            lines = file.read_text(encoding="utf-8").split("\n")
        try:
            for line in lines[:-1]:
                sigma, rate = line.split(" ")
                self._counts[float(sigma), float(rate)] += 1
        except ValueError as error:
            raise CheckpointError(f"{file}: damaged, so what was spent is not known. {_MEND}") from error
        if lines[-1]:
            raise CheckpointError(f"{file}: its last line is cut, so what was spent is not known. {_MEND}")

    def step(self, noise_multiplier: float, rate: float) -> None:
        """A step is about to draw its noise."""
        if self._file is not None:
            append_line(self._file, f"{noise_multiplier!r} {rate!r}")
        self._counts[noise_multiplier, rate] += 1

    @property
    def history(self) -> list[Noisy]:
        """All that was spent."""
        return [Noisy(sigma, rate, steps) for (sigma, rate), steps in sorted(self._counts.items())]

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"history": [list(noisy) for noisy in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what the checkpoint says, unless the file says more.

        Raises:
            CheckpointError: there should be a file, and it says less.
        """
        saved = {(sigma, rate): steps for sigma, rate, steps in state["history"]}
        if self._file is None:
            self._counts |= Counter(saved)
        elif any(self._counts[key] < steps for key, steps in saved.items()):
            raise CheckpointError(
                f"{self._file}: says that fewer noisy steps were taken than the checkpoint does. {_MEND}"
            )


_MEND = "Restore it from a backup, or start again with --fresh."


def epsilon_now(facts: Mapping[str, Any]) -> float | None:
    """Epsilon of one unit by a run's facts; None where nothing is guaranteed."""
    if facts["void"]:
        return None
    found = epsilon_of([Noisy(*row) for row in facts["spent"]], facts["delta"], facts["accountant"])
    return found if math.isfinite(found) else None


def statement(facts: Mapping[str, Any], units: int) -> dict[str, Any]:
    """What a private run guarantees about ``units`` units together, as JSON for a certificate.

    Args:
        facts: what the run's ``run.json`` has under ``privacy``.
        units: how many units are asked about.

    Raises:
        ConfigError: ``dp-accounting`` is not installed.
    """
    spent, delta = [Noisy(*row) for row in facts["spent"]], facts["delta"]
    epsilon = epsilon_now(facts)
    group: dict[str, Any] = {"units": units, "tight": None, "naive": None}
    if epsilon is not None:
        tight = group_epsilon_of(spent, delta, units)
        naive = naive_group(epsilon, delta, units)
        group["tight"] = {"epsilon": tight if math.isfinite(tight) else None, "delta": delta}
        group["naive"] = {"epsilon": naive.epsilon, "delta": naive.delta}
    return {
        "unit": facts["unit"],
        "noise_multiplier": facts["noise_multiplier"],
        "clip": facts["clip"],
        "spent": [noisy._asdict() for noisy in spent],
        "delta": delta,
        "accountant": facts["accountant"],
        "adjacency": "one unit added or removed; replacing one is a group of two",
        "epsilon": epsilon,
        "group": group,
        "void": facts["void"],
        "assumptions": list(ASSUMPTIONS),
        "not_claimed": list(NOT_CLAIMED),
    }


__all__ = ["FILE", "VOID", "Spent", "Stage", "epsilon_now", "plan", "rate_of", "statement"]
