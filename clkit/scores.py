"""Scores: a matrix R and what stands in its columns. A run has one, and more where it is scored in more ways."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clkit.evaluation import SCORERS
from clkit.metrics.continual import DEFINITIONS, LEVELS, summarize
from clkit.metrics.format import STRICT, TOLERANT, split_forgetting


@dataclass
class Scores:
    """What was measured of a run in one way: by one metric for each task, under one set of weights.

    Attributes:
        task_metrics: which score fills each column.
        higher_is_better: per column.
        matrix: (T, T + H) scores; row i after learning task i, columns tasks then holdout tasks; NaN = not measured.
        initial: (T + H,) scores of the untouched model.
    """

    task_metrics: list[str]
    higher_is_better: list[bool]
    matrix: NDArray[np.float64]
    initial: NDArray[np.float64]

    @classmethod
    def empty(cls, tasks: int, task_metrics: Sequence[str]) -> Scores:
        """Nothing measured yet of ``tasks`` tasks and the holdout tasks after them."""
        better = [SCORERS.get(name).higher_is_better for name in task_metrics]
        columns = len(task_metrics)
        return cls(list(task_metrics), better, np.full((tasks, columns), math.nan), np.full(columns, math.nan))

    def metrics(self) -> dict[str, Any]:
        """See :func:`clkit.metrics.continual.summarize`; of the tasks that are learned, not of holdout tasks."""
        count = len(self.matrix)
        initial = None if np.isnan(self.initial[:count]).all() else self.initial[:count]
        return summarize(self.matrix[:, :count], initial=initial, higher_is_better=self.higher_is_better[:count])

    def direction(self, metric: str) -> str:
        """Which direction of a metric of the sequence is better here: ``higher`` or ``lower``.

        Levels, such as the average accuracy, are in the scores' own unit: of perplexities the lower is better.
        """
        count = len(self.matrix)
        if metric in LEVELS and count and not any(self.higher_is_better[:count]):
            return "lower"
        return str(DEFINITIONS[metric].direction)

    def state_dict(self) -> dict[str, Any]:
        """The numbers, as float64 tensors."""
        import torch  # not at the top: reading results needs none

        return {"matrix": torch.from_numpy(self.matrix), "initial": torch.from_numpy(self.initial)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.matrix[:] = state["matrix"].numpy()
        self.initial[:] = state["initial"].numpy()


def format_split(main: Scores, further: Mapping[str, Scores]) -> dict[str, dict[str, Any]]:
    """Superficial and essential forgetting by each format-tolerant metric that all tasks were scored with.

    Args:
        main: each task by its own metric.
        further: of these, those that are called like their metric are of the same weights as ``main``.

    Returns:
        Tolerant metric -> :func:`clkit.metrics.format.split_forgetting`; empty without strict or tolerant scores.
    """
    count = len(main.matrix)
    tables = [main, *(scores for name, scores in further.items() if name == scores.task_metrics[0])]
    found = {t.task_metrics[0]: t.matrix[:, :count] for t in tables if len(set(t.task_metrics[:count])) == 1}
    if STRICT not in found:
        return {}
    return {name: split_forgetting(found[STRICT], found[name]) for name in TOLERANT if name in found}
