"""Score a task: the contract of a metric, and the loop that batches, shards over processes and gathers."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from clkit.config import EvalConfig
from clkit.engine.group import Group, local_group
from clkit.errors import CapabilityError, DataError
from clkit.evaluation import SCORERS
from clkit.models.base import Model
from clkit.modes import evaluating
from clkit.tasks.base import Kind, Task
from clkit.tasks.batch import Encoded

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Detail:
    """What one example contributed to a score; JSON, so that processes can exchange it.

    Attributes:
        id: the record's id.
        value: the example's own score.
        weight: how much it counts in the total (1, or tokens).
        prediction: what the model said, where that is text.
        gold: what it should have said.
        extra: further numbers of this metric.
    """

    id: str
    value: float
    weight: float = 1.0
    prediction: str | None = None
    gold: str | None = None
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """The score of one task, with the contribution of each example in the task's own order."""

    value: float
    n: int
    metric: str
    higher_is_better: bool
    details: list[Detail]


@dataclass(frozen=True)
class Scoring:
    """What is being scored.

    Attributes:
        model: its module is in evaluation mode, under inference mode and autocast.
        task: whose evaluation examples are scored.
        encoded: these examples in the model's form.
        options: sizes of batches and answers.
        restrict_to: classes to choose from (the task is known at test); None = all.
        shared: what one metric found out and another can use; see :meth:`once`.
    """

    model: Model
    task: Task
    encoded: Encoded
    options: EvalConfig
    restrict_to: tuple[int, ...] | None = None
    shared: dict[Any, Any] = field(default_factory=dict)

    def once(self, what: str, indices: Sequence[int], compute: Callable[[], T]) -> T:
        """``compute()`` the first time that a metric asks for ``what`` of this batch, the same result afterwards.

        So a task that is scored with several metrics of the generated answers is answered once.
        """
        key = (what, *indices)
        if key not in self.shared:
            self.shared[key] = compute()
        found: T = self.shared[key]
        return found


class Scorer(ABC):
    """A metric of one task. Register the class in the entry-point group ``clkit.metrics``."""

    name: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    kinds: ClassVar[frozenset[Kind]]

    def check(self, scoring: Scoring) -> None:
        """Refuse what can't be scored, before any forward pass.

        Raises:
            CapabilityError: the model can't do what this metric needs.
            DataError: the examples lack what this metric needs.
        """

    def cost(self, scoring: Scoring) -> NDArray[np.int64]:
        """(N,) tokens that each example takes in a forward pass; batches are cut by it."""
        lengths = scoring.encoded.lengths
        return np.ones(len(scoring.encoded), dtype=np.int64) if lengths is None else lengths

    @abstractmethod
    def score(self, scoring: Scoring, indices: Sequence[int]) -> list[Detail]:
        """Score the examples at ``indices``, one batch; one Detail each, in this order."""

    def aggregate(self, details: Sequence[Detail]) -> float:
        """The score of all examples: the weighted mean of their values."""
        return weighted_mean(details)


def weighted_mean(details: Sequence[Detail]) -> float:
    """Exactly rounded weighted mean of the values, so that the order of examples does not matter."""
    return math.fsum(d.value * d.weight for d in details) / math.fsum(d.weight for d in details)


def evaluate(
    model: Model,
    task: Task,
    encoded: Encoded,
    *,
    metric: str,
    options: EvalConfig | None = None,
    group: Group | None = None,
    restrict_to: tuple[int, ...] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score ``task`` with ``metric``; see :func:`evaluate_all`."""
    found = evaluate_all(
        model,
        task,
        encoded,
        metrics=[metric],
        options=options,
        group=group,
        restrict_to=restrict_to,
        progress=progress,
    )
    return found[metric]


def evaluate_all(
    model: Model,
    task: Task,
    encoded: Encoded,
    *,
    metrics: Sequence[str],
    options: EvalConfig | None = None,
    group: Group | None = None,
    restrict_to: tuple[int, ...] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Score]:
    """Score ``task`` with each of ``metrics``; metrics of the generated answer share one generation.

    Batches are made of examples of similar length and dealt out whole to the processes of ``group``. They are the same
    batches on one process and on many, so the score is the same too, to the last bit on the same kind of machine.

    Args:
        model: its module is run as it is, in evaluation mode, under inference mode and the model's autocast; the
            training flags of all its parts are put back afterwards.
        task: the task.
        encoded: its evaluation examples, encoded by ``model``.
        metrics: registered names (``clkit ls metrics``).
        options: sizes of batches and answers.
        group: the processes that share the work; each must call this and each gets the whole score.
        restrict_to: classes to choose from, for tasks whose identity is known at test.
        progress: called with (examples done here, examples to do here) after each batch, for each metric anew.

    Raises:
        ConfigError: a metric is unknown.
        CapabilityError: a metric does not fit the task or the model.
        DataError: there is nothing to score, or a record lacks what a metric needs.
    """
    scorers: dict[str, Scorer] = {name: SCORERS.get(name)() for name in metrics}
    group = group or local_group()
    scoring = Scoring(model, task, encoded, options or EvalConfig(), restrict_to)
    for name, scorer in scorers.items():
        if task.kind not in scorer.kinds:
            raise CapabilityError(
                f"task '{task.name}': metric '{name}' scores {' and '.join(sorted(scorer.kinds))} tasks, "
                f"and this task is of kind {task.kind}; set another metric for it"
            )
        if not len(encoded):
            raise DataError(f"task '{task.name}' has no evaluation examples to score with '{name}'")
        scorer.check(scoring)
    return {name: _score(scorer, name, scoring, group, progress) for name, scorer in scorers.items()}


def _score(
    scorer: Scorer, metric: str, scoring: Scoring, group: Group, progress: Callable[[int, int], None] | None
) -> Score:
    mine = plan_batches(scorer.cost(scoring), scoring.options)[group.rank :: group.world]
    done, total = 0, sum(len(batch) for batch in mine)
    found: list[tuple[int, dict[str, Any]]] = []
    with evaluation_mode(scoring.model):
        for batch in mine:
            found += zip(batch, map(asdict, scorer.score(scoring, batch)), strict=True)
            done += len(batch)
            if progress is not None:
                progress(done, total)
    gathered = sorted((pair for part in group.all_gather(found) for pair in part), key=lambda pair: pair[0])
    details = [Detail(**detail) for _, detail in gathered]
    return Score(scorer.aggregate(details), len(details), metric, scorer.higher_is_better, details)


def plan_batches(cost: NDArray[np.int64], options: EvalConfig) -> list[list[int]]:
    """Cut examples into batches of similar cost, the dearest first (a lack of memory shows at once).

    A batch has at most ``options.batch_size`` examples, and with all padded to the longest at most
    ``options.max_batch_tokens`` tokens, but at least one example.
    """
    order = np.argsort(-cost, kind="stable").tolist()
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        fits = options.max_batch_tokens // max(1, int(cost[order[start]]))
        size = max(1, min(options.batch_size, fits))
        batches.append(order[start : start + size])
        start += size
    return batches


@contextlib.contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """Evaluation mode, inference mode and the model's autocast; puts every module's training flag back."""
    dtype = getattr(model, "autocast_dtype", None)
    # ZeRO-3 keeps what it gathers here, and a backward pass can't use what was made in inference mode.
    partitioned = any(hasattr(p, "ds_id") for p in model.module.parameters())
    no_gradients = torch.no_grad() if partitioned else torch.inference_mode()
    with evaluating(model.module), no_gradients, contextlib.ExitStack() as stack:
        if dtype is not None:
            stack.enter_context(torch.autocast(model.device.type, dtype=dtype))
        yield
