"""RunResult: what a run learned and forgot, as numbers, as files and as text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clkit.errors import CheckpointError
from clkit.metrics.continual import DEFINITIONS, label
from clkit.metrics.format import FORMAT_DEFINITIONS
from clkit.rundir import RunDirectory
from clkit.scores import Scores, format_split

if TYPE_CHECKING:
    import pandas

    from clkit.report.plots import Plots

# What is shown of a further matrix beside its numbers.
SHOWN = ("average_accuracy", "bwt", "forgetting")
_LONG = 1e7


@dataclass
class RunResult:
    """The outcome of one run.

    Attributes:
        matrix: (T, T + H) scores; row i after learning task i, columns tasks then holdout tasks; NaN = not measured.
        initial: (T + H,) scores of the untouched model.
        metrics: see :func:`clkit.metrics.continual.summarize`.
        task_metrics: which score fills each column.
        snippet: Python that loads what was exported.
        further: matrices beside the main one: of the metrics in `eval.also`, by metric, and of other weights than
            those that serve, by the strategy's name for them.
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
    further: dict[str, Scores] = field(default_factory=dict)

    @property
    def scores(self) -> Scores:
        """The main matrix, with what stands in its columns."""
        return Scores(self.task_metrics, self.higher_is_better, self.matrix, self.initial)

    @property
    def format_split(self) -> dict[str, dict[str, Any]]:
        """Forgetting as superficial and essential, by format-tolerant metric (``clkit.metrics.format``).

        Empty unless both strict and tolerant scores were measured (``eval.also``).
        """
        return format_split(self.scores, self.further)

    @property
    def plot(self) -> Plots:
        """Plots on Matplotlib axes: ``result.plot.matrix()``, ``scores()``, ``forgetting()``, ``losses()``."""
        from clkit.report.plots import Plots

        return Plots(self)

    def to_frame(self) -> pandas.DataFrame:
        """The main matrix as a pandas frame: a row per state of the model, a column per scored task; NaN unmeasured.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        rows = ["before training", *(f"after {t}" for t in self.tasks)]
        numbers = np.vstack([self.initial, self.matrix])
        return pandas.DataFrame(numbers, index=rows, columns=[*self.tasks, *self.holdout])

    def _repr_html_(self) -> str:
        """The heat map and the metrics, as a notebook shows them."""
        from clkit.report.page import notebook

        return notebook(self)

    def save(self, directory: RunDirectory) -> None:
        """Write ``matrix.json`` and ``metrics.json``, and ``further.json`` if there is more than one matrix."""
        if self.further:
            tables = {name: {**_columns(s), "metrics": s.metrics()} for name, s in self.further.items()}
            split = {"definitions": FORMAT_DEFINITIONS, **self.format_split} if self.format_split else {}
            directory.write("further.json", {"matrices": tables, "format_split": split})
        directory.write(
            "matrix.json",
            {
                "name": self.name,
                "tasks": self.tasks,
                "holdout": self.holdout,
                **_columns(self.scores),
                "further": list(self.further),
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
        fields = _matrix(saved, directory.path)
        further = _further(directory.read("further.json"), directory.path, fields["matrix"].shape, saved.get("further"))
        return cls(run_dir=directory.path, metrics=_metrics(metrics, directory.path), further=further, **fields)

    def summary(self) -> str:
        """The matrices, the metrics with their definitions, and where the model is."""
        lines = [self.matrix_text(), ""]
        lines += [f"{_number(self.metrics[k]):>9}  {label(k)}" for k in DEFINITIONS if k in self.metrics]
        for name, scores in self.further.items():
            lines += ["", f"{name}:", self.matrix_text(scores), ""]
            lines += [f"{_number(v):>9}  {k}" for k, v in scores.metrics().items() if k in SHOWN]
        for metric, split in self.format_split.items():
            lines += ["", f"forgetting by form and by content ({metric} is the tolerant score):"]
            lines += [f"{_number(split[k]):>9}  {k} ({text})" for k, text in FORMAT_DEFINITIONS.items()]
        if self.run_dir is not None:
            lines += [
                "",
                f"Run directory: {self.run_dir}",
                f"Model:         {self.run_dir / 'export'}",
                "",
                self.snippet,
            ]
        return "\n".join(lines).rstrip()

    def matrix_text(self, scores: Scores | None = None) -> str:
        """A matrix (the main one by default) as a table: a row per trained task, a column per scored task."""
        scores = scores or self.scores
        names = [*self.tasks, *self.holdout]
        cells = [_number(v) for row in (scores.initial, *scores.matrix) for v in row.tolist()]
        width = max(8, *(len(text) + 2 for text in (*names, *cells)))
        first = max(len("before training"), *(len(t) + 6 for t in self.tasks))
        rows = [" " * first + "".join(f"{n:>{width}}" for n in names)]
        entries = [
            ("before training", scores.initial),
            *((f"after {t}", r) for t, r in zip(self.tasks, scores.matrix, strict=True)),
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
    rows = compared(results)
    width = max((len(key) for key, _, _ in rows), default=0)
    columns = [
        max(7, len(r.name), *(len(_number(values[i])) for _, values, _ in rows)) + 2 for i, r in enumerate(results)
    ]
    lines = [" " * width + "".join(f"{r.name:>{w}}" for r, w in zip(results, columns, strict=True))]
    for key, values, direction in rows:
        numbers = "".join(f"{_number(v):>{w}}" for v, w in zip(values, columns, strict=True))
        lines.append(f"{key:<{width}}{numbers}  {direction} is better")
    return "\n".join(lines)


def compared(results: list[RunResult]) -> list[tuple[str, list[float | None], str]]:
    """What runs are compared by: metric, its value in each run (None = undefined), and which direction is better."""

    def better(key: str, of: Callable[[RunResult], Scores | None]) -> str:
        found = {scores.direction(key) for r in results if (scores := of(r)) is not None}
        return found.pop() if len(found) == 1 else str(DEFINITIONS[key].direction)

    rows = [(k, [r.metrics.get(k) for r in results], better(k, lambda r: r.scores)) for k in DEFINITIONS]
    names = dict.fromkeys(name for r in results for name in r.further)
    for name in names:
        found = [r.further[name].metrics() if name in r.further else {} for r in results]
        of = partial(_further_scores, name)
        rows += [(f"{name}: {k}", [m.get(k) for m in found], better(k, of)) for k in SHOWN]
    splits = [r.format_split for r in results]
    for metric in dict.fromkeys(m for split in splits for m in split):
        for part in ("superficial", "essential"):
            rows.append((f"{part} forgetting ({metric})", [s.get(metric, {}).get(part) for s in splits], "lower"))
    return [row for row in rows if any(value is not None for value in row[1])]


def _further_scores(name: str, result: RunResult) -> Scores | None:
    return result.further.get(name)


def _columns(scores: Scores) -> dict[str, Any]:
    """JSON of a matrix and its columns."""
    numbers = {"matrix": scores.matrix.tolist(), "initial": scores.initial.tolist()}
    return {"task_metrics": scores.task_metrics, "higher_is_better": scores.higher_is_better, **numbers}


def _read_columns(saved: Any, file: Path, shape: tuple[int, ...]) -> dict[str, Any]:
    """Inverse of :func:`_columns`, checked."""
    try:
        metrics, better = [str(m) for m in saved["task_metrics"]], [bool(b) for b in saved["higher_is_better"]]
        matrix, initial = (np.array(_nan(saved[key]), dtype=float) for key in ("matrix", "initial"))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from error
    if matrix.shape != shape or not initial.shape == (len(metrics),) == (len(better),) == shape[1:]:
        raise _damaged(file, "its rows and columns are not those of its tasks")
    return {"task_metrics": metrics, "higher_is_better": better, "matrix": matrix, "initial": initial}


def _matrix(saved: Any, run_dir: Path) -> dict[str, Any]:
    """The checked content of ``matrix.json``."""
    file = run_dir / "matrix.json"
    try:
        names = {key: [str(n) for n in saved[key]] for key in ("tasks", "holdout")}
        rest = {"name": str(saved["name"]), "snippet": str(saved["snippet"])}
    except (KeyError, TypeError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from error
    shape = len(names["tasks"]), len(names["tasks"]) + len(names["holdout"])
    return {**names, **rest, **_read_columns(saved, file, shape)}


def _further(saved: Any, run_dir: Path, shape: tuple[int, ...], expected: Any) -> dict[str, Scores]:
    """The checked content of ``further.json``, which holds the matrices that ``matrix.json`` names."""
    file = run_dir / "further.json"
    tables = saved.get("matrices") if isinstance(saved, dict) else None
    if not expected:
        return {}
    if not isinstance(tables, dict) or list(tables) != expected:
        raise _damaged(file, f"it does not hold the matrices {expected}")
    return {name: Scores(**_read_columns(table, file, shape)) for name, table in tables.items()}


def _metrics(saved: Any, run_dir: Path) -> dict[str, Any]:
    """The checked content of ``metrics.json``."""
    if not isinstance(saved, dict):
        raise _damaged(run_dir / "metrics.json", "not a JSON object")
    for key in DEFINITIONS:
        if not isinstance(saved.get(key), (int, float, type(None))):
            raise _damaged(run_dir / "metrics.json", f"{key} is not a number")
    return {key: value for key, value in saved.items() if key != "definitions"}


def _damaged(file: Path, what: str) -> CheckpointError:
    # A run whose matrix.json is there counts as finished, and nothing is written again.
    which = "matrix.json" if file.name == "further.json" else "it"
    return CheckpointError(
        f"{file}: damaged ({what}). Delete {which} and run the same command again to write it again, "
        "restore it from a backup, or start again with --fresh."
    )


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else readable(value)


def readable(value: float) -> str:
    """Four digits after the point, and no more digits than one can read of a perplexity that is lost.

    >>> readable(0.25), readable(-1.5e150)
    ('0.2500', '-1.5e+150')
    """
    return f"{value:.4f}" if abs(value) < _LONG else f"{value:.4g}"


def _nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_nan(v) for v in value]
    return math.nan if value is None else value
