"""Write the page: gather what a run directory holds, draw its figures, fill the templates."""

from __future__ import annotations

import datetime
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clkit.errors import CheckpointError
from clkit.files import disk_errors, write_text
from clkit.metrics.continual import DEFINITIONS, label
from clkit.metrics.format import FORMAT_DEFINITIONS
from clkit.report import comparison, plots
from clkit.report.deletions import deletions
from clkit.report.figures import Drawing, classed
from clkit.report.history import History, result_so_far
from clkit.report.sections import Edits
from clkit.resolve import read_file
from clkit.result import SHOWN, RunResult, compared, readable
from clkit.rundir import RunDirectory, finite
from clkit.scores import Scores

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_CARDS = ("average_accuracy", "forgetting", "bwt", "learning_accuracy")
_MADE = "a model made in Python"
_OPEN = 4  # so many runs have their sections open from the start


def write_report(
    results: Sequence[RunResult],
    path: Path,
    *,
    edits: Sequence[Edits] = (),
    figures: Path | None = None,
    title: str = "",
) -> None:
    """Write the page; it loads nothing from anywhere else.

    Args:
        results: the runs; more than one are compared.
        path: the file.
        edits: directories of edits to show.
        figures: a directory for the figures as SVG and PNG; None writes none.
        title: stands above it; the names of the runs when empty.
    """
    page, drawn = render(results, edits, title=title)
    write_text(path, page)
    if figures is not None:
        with disk_errors(figures):
            figures.mkdir(parents=True, exist_ok=True)
            for drawing in drawn:
                drawing.save(figures)


def render(
    results: Sequence[RunResult], edits: Sequence[Edits] = (), live: bool = False, title: str = ""
) -> tuple[str, list[Drawing]]:
    """The page and its figures; ``live`` adds the script that fetches it anew from where it was served."""
    from markupsafe import Markup

    drawn: list[Drawing] = []

    def figure(drawing: Drawing) -> Markup:
        """Inline SVG, made by Matplotlib from numbers; labels are escaped by it."""
        drawn.append(drawing)
        return Markup(drawing.svg(f"f{len(drawn)}"))

    entries = [_entry(_as_saved(result)) for result in results]
    told = _told(entries)
    names = _slugs(told)
    edited = [(e, e.drawings(f"edits-{i}" if len(edits) > 1 else "edits")) for i, e in enumerate(edits, start=1)]
    runs = [_run(*about, len(entries) == 1) for about in zip(entries, names, told, strict=True)]
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title or _title(results, edits),
            runs=runs,
            comparison=_comparison(entries, names, told) if len(entries) > 1 else None,
            edited=edited,
            figure=figure,
            labels={k: label(k) for k in DEFINITIONS},
            definitions=DEFINITIONS,
            shown=SHOWN,
            parts=FORMAT_DEFINITIONS,
            opened=len(entries) <= _OPEN,
            live=live,
        )
    )
    if len(entries) > _OPEN and not live:  # a live page gets new figures, and keeps its head
        page = classed(page)
    return page, drawn + [drawing for run in runs for drawing in run["for_files"]]


def notebook(result: RunResult) -> str:
    """Heat map and metrics of a run as an HTML fragment, with its own style, for a notebook's cell."""
    result = _as_saved(result)
    rows = _table(result, result.scores)
    template = _environment().get_template("notebook.html.j2")
    return template.render(
        name=result.name, table=rows, metrics=result.metrics, definitions=DEFINITIONS, scores=result.scores
    )


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("clkit", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": _number, "bytes": _bytes, "seconds": _seconds, "moment": _moment}
    environment.filters |= {"spelled": _spelled, "breakable": _breakable}
    return environment


def _title(results: Sequence[RunResult], edits: Sequence[Edits]) -> str:
    names = [r.name for r in results] + [str(e.path.name) for e in edits]
    if not names:
        return "A run that has not begun"
    return " / ".join(names) if len(names) <= 4 else f"{len(names)} runs"


def _told(entries: Sequence[comparison.Entry]) -> list[str]:
    """The names of runs; of namesakes with what else tells them apart, as far as anything does."""
    names = [e.result.name for e in entries]
    seeded = [f"{n}, seed {e.config.get('seed')}" for n, e in zip(names, entries, strict=True)]
    placed = [str(e.result.run_dir or n) for n, e in zip(names, entries, strict=True)]
    return [
        next((c for c, all_ in ((n, names), (s, seeded)) if all_.count(c) == 1), p)
        for n, s, p in zip(names, seeded, placed, strict=True)
    ]


def _slugs(names: Sequence[str]) -> list[str]:
    """Names for anchors and files, all different."""
    plain = [re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-").lower() or "run" for name in names]
    return [s if plain.count(s) == 1 else f"{s}-{i}" for i, s in enumerate(plain, start=1)]


def _as_saved(result: RunResult) -> RunResult:
    """The result as its files tell it: an infinite score (the perplexity of a model that diverged) is none."""
    numbers, initial = (np.where(np.isfinite(x), x, np.nan) for x in (result.matrix, result.initial))
    further = {
        name: replace(scores, matrix=np.where(np.isfinite(scores.matrix), scores.matrix, np.nan))
        for name, scores in result.further.items()
    }
    return replace(result, matrix=numbers, initial=initial, metrics=finite(result.metrics), further=further)


def _entry(result: RunResult) -> comparison.Entry:
    if result.run_dir is None:
        return comparison.Entry(result, History(), {})
    file = result.run_dir / "config.yaml"
    return comparison.Entry(result, History.read(result.run_dir), read_file(file) if file.is_file() else {})


def _comparison(entries: Sequence[comparison.Entry], names: Sequence[str], told: Sequence[str]) -> dict[str, Any]:
    groups = comparison.grouped(entries)
    of = {id(e): g.label for g in groups for e in g.entries}
    results = [e.result for e in entries]
    metrics = compared(results)
    further: list[tuple[str, list[Any], Callable[[Any], str], str]] = [
        ("training", [e.history.training or None for e in entries], _seconds, "lower"),
        ("scoring", [e.history.scoring or None for e in entries], _seconds, "lower"),
        ("trainable", [e.history.last_cost.get("trainable_parameters") for e in entries], "{:,}".format, "lower"),
        ("peak memory", [e.history.last_cost.get("peak_memory_bytes") for e in entries], _bytes, "lower"),
        ("exemplars", [e.history.last_cost.get("exemplar_bytes") for e in entries], _bytes, "lower"),
    ]
    columns = [(k, label(k) if k in DEFINITIONS else k, direction) for k, _, direction in metrics]
    columns += [(k, k, direction) for k, values, _, direction in further if any(v is not None for v in values)]
    rows = []
    for i, entry in enumerate(entries):
        cells = [(values[i], _number(values[i])) for _, values, _ in metrics]
        cells += [
            (values[i], "–" if values[i] is None else show(values[i]))
            for _, values, show, _ in further
            if any(v is not None for v in values)
        ]
        rows.append((names[i], told[i], of[id(entry)], entry.config.get("seed", ""), cells))
    summary = [
        (g.label, len(g.entries), [comparison.interval(g.values(k)) for k in _CARDS if _any(entries, k)])
        for g in groups
    ]
    return {
        "columns": columns,
        "rows": rows,
        "groups": groups,
        "summary": summary,
        "summary_keys": [(k, comparison.direction(groups, k)) for k in _CARDS if _any(entries, k)],
        "paired": {k: comparison.differences(groups, k) for k in comparison.PAIRED},
        "means": comparison.means(groups),
        "fronts": comparison.fronts(groups),
        "gaps": comparison.gaps(groups),
        "multiples": comparison.multiples(groups),
    }


def _any(entries: Sequence[comparison.Entry], key: str) -> bool:
    return any(e.value(key) is not None for e in entries)


def _run(entry: comparison.Entry, name: str, told: str, alone: bool) -> dict[str, Any]:
    result, history = entry.result, entry.history
    directory = RunDirectory(result.run_dir) if result.run_dir is not None else None
    config = directory.path / "config.yaml" if directory is not None else None
    edits = Edits.of_run(directory.path, history) if directory is not None else None
    facts = (directory.read("run.json") or {}) if directory is not None else {}
    drawings = plots.drawings(result, history, name)
    if edits is not None:
        drawings += edits.drawings(name)
    return {
        "id": name,
        "name": told,
        "result": result,
        "table": _table(result, result.scores),
        "further": [(key, _table(result, scores), scores.metrics()) for key, scores in result.further.items()],
        "split": [
            (metric, [*((result.tasks[row["task"]], row) for row in split["per_task"]), ("mean", split)])
            for metric, split in result.format_split.items()
        ],
        "metrics": result.metrics,
        "measured": any(result.metrics.get(k) is not None for k in DEFINITIONS),
        "cards": [(k, result.metrics[k]) for k in _CARDS if result.metrics.get(k) is not None],
        # The heat map stands in the page as a table; as a figure it is drawn for the files.
        "drawings": [d for d in drawings if not d.name.endswith("-matrix")],
        "for_files": [d for d in drawings if d.name.endswith("-matrix")],
        "history": history,
        "final_model": _final_model(result, history),
        "strategy": entry.config.get("strategy", {}).get("name", ""),
        "model": _MADE if _made(facts, "model") else entry.config.get("model", {}).get("name", ""),
        "seed": entry.config.get("seed", ""),
        "told": _tasks_told(result.tasks, history.start.get("holds")),
        "samples": (directory.read("samples.json") or {}) if directory else {},
        "status": (directory.read("status.json") or {}) if directory else {},
        "facts": facts,
        "config": config.read_text(encoding="utf-8") if config is not None and config.exists() else "",
        "where": str(result.run_dir) if result.run_dir else "",
        "again": _again(result.run_dir) if result.run_dir else "",
        "elsewhere": _elsewhere(facts),
        "snippet": result.snippet,
        "edits": edits,
        "edited": edits.means if edits is not None else {},
        "deletions": deletions(directory.path) if directory is not None else [],
        "alone": alone,
    }


def _again(run_dir: Path) -> str:
    """The command that repeats a run, as a shell takes it."""
    return shlex.join(["clkit", "run", f"{run_dir}/config.yaml", f"output_dir={run_dir}-again"])


def _made(facts: dict[str, Any], part: str) -> bool:
    """Whether the tasks, the model or the strategy of a run were made in Python: its configuration lacks them."""
    return facts.get(f"{part}_from") == "python"


def _elsewhere(facts: dict[str, Any]) -> str:
    """Why no command repeats a run; empty where one does."""
    if parts := [f"its {part}" for part in ("tasks", "model") if _made(facts, part)]:
        was = "were" if "its tasks" in parts else "was"
        return f"No command does: {' and '.join(parts)} {was} made in Python. Repeat the call with another output_dir."
    if _made(facts, "strategy"):
        return "No command does: it began with the weights of another run. Repeat the deletion request on that one."
    return ""


def _tasks_told(tasks: Sequence[str], holds: Sequence[dict[str, Any]] | None) -> str:
    """How many tasks, how large, and which classes each has."""
    count = f"{len(tasks)} task{'s' if len(tasks) > 1 else ''}"
    if not holds:
        return f"{count}: {', '.join(tasks)}"
    sizes = [_range([held[part] for held in holds]) for part in ("train", "eval")]
    names = []
    for task, held in zip(tasks, holds, strict=True):
        classes = held["classes"]
        few = 0 < len(classes) <= 6 and sum(map(len, classes)) <= 60
        shown = ",\u00a0".join(classes) if few else f"{len(classes)}\u00a0classes"
        names.append(f"{task} ({shown})" if classes else task)
    return f"{count} of {sizes[0]} training and {sizes[1]} evaluation records: {', '.join(names)}"


def _range(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _final_model(result: RunResult, history: History) -> int | None:
    """Bytes of the model as it is after the last task; None before that."""
    last = history.last_cost
    return last["model_bytes"] if last and last["stage"] == len(result.tasks) - 1 else None


def _table(result: RunResult, scores: Scores) -> dict[str, Any]:
    """A matrix with its heads, every score with its shade in percent."""
    rows = np.vstack([scores.initial, scores.matrix])
    shades = plots.shades(rows, scores.higher_is_better)
    titles = ["before training", *(f"after {t}" for t in result.tasks)]
    return {
        "learned": len(result.tasks),
        "columns": list(zip([*result.tasks, *result.holdout], scores.task_metrics, strict=True)),
        "rows": [
            (title, [(v, 0 if v != v else round(100 * s)) for v, s in zip(row, shade, strict=True)])
            for title, row, shade in zip(titles, rows.tolist(), shades.tolist(), strict=True)
            if any(v == v for v in row)
        ],
    }


def load(paths: Sequence[Path]) -> tuple[list[RunResult], list[Edits]]:
    """Finished runs and directories of edits, each once, however often it is named.

    Raises:
        CheckpointError: a directory is neither.
    """
    results, edits = [], []
    once: dict[Path, Path] = {}
    for path in paths:
        once.setdefault(path.resolve(), path)
    for path in once.values():
        found = Edits.read(path)
        if found is not None:
            edits.append(found)
        else:
            results.append(RunResult.load(path))
    return results, edits


def runs_below(directory: Path) -> list[Path]:
    """The finished runs of a sweep, in order of their paths.

    Raises:
        CheckpointError: there is none.
    """
    found = sorted(p.parent for p in directory.rglob("matrix.json") if (p.parent / "metrics.json").is_file())
    if not found:
        raise CheckpointError(f"{directory}: no finished run below it. Give the directory of a sweep.")
    return found


def so_far(run_dir: Path) -> RunResult | None:
    """A run's result: whole when it is finished, else as far as it went; None before it began."""
    directory = RunDirectory(run_dir)
    return RunResult.load(run_dir) if directory.finished else result_so_far(run_dir)


def _spelled(key: str) -> str:
    """A metric's name for people."""
    return {"bwt": "backward transfer (BWT)", "fwt": "forward transfer (FWT)"}.get(key, key.replace("_", " "))


def _breakable(name: str) -> Markup:
    """A name that may be broken behind its underscores."""
    from markupsafe import Markup, escape

    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else readable(value)


def _bytes(value: float | None) -> str:
    if value is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit in ("B", "KiB") else f"{value:,.1f} {unit}"


def _seconds(value: float) -> str:
    if value < 100:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"


def _moment(value: float) -> str:
    return datetime.datetime.fromtimestamp(value, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
