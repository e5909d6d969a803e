"""How a model comes to be without the forgotten records: the contract of a method, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from clkit import build, resolve
from clkit.config import RunConfig
from clkit.errors import ClkitError, Problem, RequestError
from clkit.registry import Registry
from clkit.tasks.base import TaskSequence
from clkit.unlearning.case import Case
from clkit.unlearning.lineage import learned_before

# A forward pass costs about a third of a forward and backward pass.
_FORWARD = 1 / 3


@dataclass(frozen=True)
class Cost:
    """What serving a request takes.

    Attributes:
        steps: optimiser steps.
        examples: rows that are learned from, forward and backward.
        forwards: rows that go through a model forward only, such as a frozen reference.
    """

    steps: int
    examples: int
    forwards: int = 0

    def relative(self, other: Cost) -> float:
        """Work as a fraction of another's, a forward pass counted as a third of both passes."""
        return (self.examples + _FORWARD * self.forwards) / max(other.examples + _FORWARD * other.forwards, 1)


@dataclass
class MethodConfig:
    """Options of a method; its own dataclass extends it, with fields made by ``clkit.config.opt``."""


class Method(ABC):
    """A way to serve a request. Every distribution can add one through the entry-point group::

        [project.entry-points."clkit.unlearning_methods"]
        mine = "my_package.my_module:MyMethod"

    Attributes:
        name: what ``--method`` names; that of the entry point.
        what: what it does, as a sentence without its full stop.
        sees_forgotten: whether it computes with the forgotten records.
    """

    name: ClassVar[str]
    what: ClassVar[str]
    sees_forgotten: ClassVar[bool] = False
    config_class: ClassVar[type] = MethodConfig

    def __init__(self, config: Any = None) -> None:
        self.config = self.config_class() if config is None else config

    def check(self, case: Case) -> list[Problem]:
        """Why it can't serve this request; nothing is trained when there is a problem."""
        return []

    def admit(self, case: Case) -> None:
        """Refuse what only the run's weights can tell; called once, before any record counts as forgotten.

        Raises:
            ClkitError: it can't serve this request.
        """

    @abstractmethod
    def plan(self, case: Case) -> Cost:
        """What it will cost; reads, and trains nothing. Called only when :meth:`check` found nothing."""

    @abstractmethod
    def guarantee(self, case: Case) -> str:
        """What follows from it for this request, in sentences that stand in the plan and in the certificate."""

    def figures(self, case: Case) -> dict[str, Any] | None:
        """The figures of the guarantee (epsilon and the like), for the certificate; None where it has none."""
        return None

    @abstractmethod
    def run(self, case: Case, directory: Path) -> Path:
        """Train without the records in a run directory, and return it.

        It is called again after a crash with the same arguments, and must then go on.
        """


METHODS: Registry[type[Method]] = Registry("unlearning method", "clkit.unlearning_methods")
"""Ways to serve a deletion request: subclasses of :class:`Method`."""


def make(name: str, overrides: Sequence[str] = ()) -> Method:
    """The method called so, with ``key=value`` options.

    Raises:
        RequestError: there is none, or an option is wrong.
    """
    if name not in METHODS:
        raise RequestError(f"--method: {METHODS.unknown(name)}")
    kind = METHODS.get(name)
    return kind(resolve.options(kind.config_class, overrides, f"--method {name}: "))


def why_not(method: Method, case: Case) -> list[Problem]:
    """Why a method can't serve a request: its own reasons, and a model that knew the records before the run began."""
    problems = method.check(case)
    return problems if problems or method.sees_forgotten else learned_before(case)


def training_cost(config: RunConfig, tasks: TaskSequence) -> Cost:
    """What a run of this configuration on these tasks takes: steps, and new and rehearsed rows."""
    steps = sum(build.stage_steps(config, tasks))
    replay = config.strategy.config.replay
    rehearsed = replay.ratio if replay.size else 0.0
    return Cost(steps, round(steps * config.train.batch_size * (1 + rehearsed)))


def plan_lines(case: Case, chosen: Method) -> list[str]:
    """Cost and guarantee of every method on this request, the chosen one marked with ``*``."""
    whole = training_cost(case.config, case.retained)
    lines = []
    for name in METHODS.names():
        mark = "*" if name == chosen.name else " "
        try:
            method = chosen if name == chosen.name else METHODS.get(name)()
            problems = why_not(method, case)
        except ClkitError as error:
            problems = [Problem("", str(error))]
        if problems:
            lines.append(f"{mark} {name}: not here. {'; '.join(map(str, problems))}")
            continue
        cost = method.plan(case)
        share = f"{cost.relative(whole):.0%} of retraining"
        lines.append(f"{mark} {name}: {cost.steps} optimiser steps, {share}. {method.guarantee(case)}")
    return lines
