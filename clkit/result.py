"""RunResult: what a run learned and forgot, as numbers, as files and as text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clkit.errors import CheckpointError
from clkit.metrics.continual import DEFINITIONS, label
from clkit.rundir import RunDirectory


@dataclass
class RunResult:
    """The outcome of one run.

    Attributes:
        matrix: (T, T + H) scores; row i after learning task i, columns tasks then holdout tasks; NaN = not measured.
        initial: (T + H,) scores of the untouched model.
        metrics: see :func:`clkit.metrics.continual.summarize`.
        task_metrics: which score fills each column.
        snippet: Python that loads what was exported.
    """

    name: str
    tasks: list[str]
    holdout: list[str]
    task_metrics: list[str]
    matrix: NDArray[np.float64]
    initial: NDArray[np.float64]
    metrics: dict[str, Any]
    higher_is_better: list[bool] = field(default_factory=list)
    run_dir: Path | None = None
    snippet: str = ""

    def save(self, directory: RunDirectory) -> None:
        """Write ``matrix.json`` and ``metrics.json``."""
        directory.write(
            "matrix.json",
            {
                "name": self.name,
                "tasks": self.tasks,
                "holdout": self.holdout,
                "task_metrics": self.task_metrics,
                "higher_is_better": self.higher_is_better,
                "matrix": self.matrix.tolist(),
                "initial": self.initial.tolist(),
                "snippet": self.snippet,
            },
        )
        directory.write(
            "metrics.json", self.metrics | {"definitions": {k: label(k) for k in DEFINITIONS if k in self.metrics}}
        )

    @classmethod
    def load(cls, run_dir: str | Path) -> RunResult:
        """Read the result of a finished run.

        Raises:
            CheckpointError: there is no finished run in ``run_dir``, or its files are damaged.
        """
        directory = RunDirectory(run_dir)
        saved, metrics = directory.read("matrix.json"), directory.read("metrics.json")
        if saved is None or metrics is None:
            status = directory.read("status.json")
            state = status.get("state") if isinstance(status, dict) else "no run"
            raise CheckpointError(
                f"{run_dir}: no finished run here (found: {state}). Run the same command again to finish it."
            )
        return cls(run_dir=directory.path, metrics=_metrics(metrics, directory.path), **_matrix(saved, directory.path))

    def summary(self) -> str:
        """The matrix, the metrics with their definitions, and where the model is."""
        lines = [self.matrix_text(), ""]
        lines += [f"{_number(self.metrics[k]):>9}  {label(k)}" for k in DEFINITIONS if k in self.metrics]
        if self.run_dir is not None:
            lines += [
                "",
                f"Run directory: {self.run_dir}",
                f"Model:         {self.run_dir / 'export'}",
                "",
                self.snippet,
            ]
        return "\n".join(lines).rstrip()

    def matrix_text(self) -> str:
        """The matrix as a table: a row per trained task, a column per scored task."""
        names = [*self.tasks, *self.holdout]
        width = max(8, *(len(n) + 2 for n in names))
        first = max(len("before training"), *(len(t) + 6 for t in self.tasks))
        rows = [" " * first + "".join(f"{n:>{width}}" for n in names)]
        entries = [
            ("before training", self.initial),
            *((f"after {t}", r) for t, r in zip(self.tasks, self.matrix, strict=True)),
        ]
        for title, row in entries:
            if not np.isnan(row).all():
                rows.append(f"{title:<{first}}" + "".join(f"{_number(v):>{width}}" for v in row.tolist()))
        return "\n".join(rows)


def score_table(scores: list[Any], names: list[str]) -> str:
    """One line per task: its score, the metric and the number of examples."""
    width = max(len(n) for n in names) + 2
    return "\n".join(
        f"{n:<{width}}{_number(s.value):>9}  {s.metric} over {s.n} examples" for n, s in zip(names, scores, strict=True)
    )


def compare_text(results: list[RunResult]) -> str:
    """One row per metric, one column per run."""
    keys = [k for k in DEFINITIONS if any(r.metrics.get(k) is not None for r in results)]
    width = max((len(k) for k in keys), default=0)
    columns = [max(len(r.name), 7) + 2 for r in results]
    lines = [" " * width + "".join(f"{r.name:>{w}}" for r, w in zip(results, columns, strict=True))]
    for key in keys:
        values = (f"{_number(r.metrics.get(key)):>{w}}" for r, w in zip(results, columns, strict=True))
        lines.append(f"{key:<{width}}" + "".join(values) + f"  {DEFINITIONS[key].direction} is better")
    return "\n".join(lines)


def _matrix(saved: Any, run_dir: Path) -> dict[str, Any]:
    """The checked content of ``matrix.json``."""
    try:
        names = {key: [str(n) for n in saved[key]] for key in ("tasks", "holdout", "task_metrics")}
        matrix, initial = (np.array(_nan(saved[key]), dtype=float) for key in ("matrix", "initial"))
        rest = {"name": str(saved["name"]), "snippet": str(saved["snippet"])}
        better = [bool(b) for b in saved["higher_is_better"]]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(run_dir / "matrix.json", f"{type(error).__name__}: {error}") from error
    rows, columns = len(names["tasks"]), len(names["tasks"]) + len(names["holdout"])
    shapes = matrix.shape, initial.shape, len(names["task_metrics"]), len(better)
    if shapes != ((rows, columns), (columns,), columns, columns):
        raise _damaged(run_dir / "matrix.json", "its rows and columns are not those of its tasks")
    return {**names, **rest, "matrix": matrix, "initial": initial, "higher_is_better": better}


def _metrics(saved: Any, run_dir: Path) -> dict[str, Any]:
    """The checked content of ``metrics.json``."""
    if not isinstance(saved, dict):
        raise _damaged(run_dir / "metrics.json", "not a JSON object")
    for key in DEFINITIONS:
        if not isinstance(saved.get(key), (int, float, type(None))):
            raise _damaged(run_dir / "metrics.json", f"{key} is not a number")
    return {key: value for key, value in saved.items() if key != "definitions"}


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: damaged ({what}). Delete it and run the same command again to write it again, "
        "restore it from a backup, or start again with --fresh."
    )


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_nan(v) for v in value]
    return math.nan if value is None else value
