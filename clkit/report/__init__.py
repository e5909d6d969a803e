"""A plain self-contained HTML page for one run, or one that compares several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clkit.files import write_text
from clkit.metrics.continual import DEFINITIONS, label
from clkit.metrics.format import FORMAT_DEFINITIONS
from clkit.result import SHOWN, RunResult, compared
from clkit.rundir import RunDirectory
from clkit.scores import Scores


def write_report(results: list[RunResult], path: Path) -> None:
    """Write the page; it loads nothing from anywhere else."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("clkit", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["number"] = lambda v: "–" if v is None or v != v else f"{v:.4f}"
    keys = [k for k in DEFINITIONS if any(r.metrics.get(k) is not None for r in results)]
    page = environment.get_template("run.html.j2").render(
        title=" / ".join(r.name for r in results),
        runs=[_run(r) for r in results],
        keys=keys,
        compared=compared(results),
        shown=SHOWN,
        parts=FORMAT_DEFINITIONS,
        labels={k: label(k) for k in keys},
        directions={k: DEFINITIONS[k].direction for k in keys},
    )
    write_text(path, page)


def _run(result: RunResult) -> dict[str, Any]:
    directory = RunDirectory(result.run_dir) if result.run_dir is not None else None
    return {
        "name": result.name,
        "table": _table(result, result.scores),
        "further": [(name, _table(result, scores), scores.metrics()) for name, scores in result.further.items()],
        "split": [
            (metric, [*((result.tasks[row["task"]], row) for row in split["per_task"]), ("mean", split)])
            for metric, split in result.format_split.items()
        ],
        "metrics": result.metrics,
        "facts": (directory.read("run.json") or {}) if directory else {},
        "config": (directory.path / "config.yaml").read_text(encoding="utf-8")
        if directory and (directory.path / "config.yaml").exists()
        else "",
        "where": str(result.run_dir) if result.run_dir else "",
        "snippet": result.snippet,
    }


def _table(result: RunResult, scores: Scores) -> dict[str, Any]:
    """A matrix with its heads, every score with its shade."""
    rows = [("before training", scores.initial.tolist())]
    rows += [(f"after {t}", r) for t, r in zip(result.tasks, scores.matrix.tolist(), strict=True)]
    return {
        "columns": list(zip([*result.tasks, *result.holdout], scores.task_metrics, strict=True)),
        "rows": [
            (title, [(v, _shade(scores, j, v)) for j, v in enumerate(row)])
            for title, row in rows
            if any(v == v for v in row)
        ],
    }


def _shade(scores: Scores, column: int, value: float) -> int:
    """How good a score is within its column, 0 (worst seen) to 100 (best); scores in [0, 1] are taken as they are."""
    if value != value:
        return 0
    if scores.higher_is_better[column] and 0 <= value <= 1:
        return round(100 * value)
    seen = [v for v in (*scores.matrix[:, column].tolist(), float(scores.initial[column])) if v == v]
    low, high = min(seen), max(seen)
    share = (value - low) / (high - low) if high > low else 1.0
    return round(100 * (share if scores.higher_is_better[column] else 1 - share))
