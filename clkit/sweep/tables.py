"""A sweep's summary as text, Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clkit.files import write_text
from clkit.metrics.comparison import Estimate
from clkit.metrics.continual import DEFINITIONS
from clkit.sweep.summary import AGAINST, Row, Summary

_COSTS = ("cpu_seconds", "peak_mib")
_ESCAPES = {c: rf"\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}


@dataclass(frozen=True)
class Table:
    """Cells that are text already."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables(summary: Summary) -> list[Table]:
    """The printed tables: all settings, the best per strategy and their comparison, the Pareto front."""
    problems = len({row.problem for row in summary.rows}) > 1
    shown = [m for m in summary.shown if any(m in row.values for row in summary.rows)]
    header = ("setting", "seeds", *shown, *_COSTS)
    body = [(r.setting, str(len(r.seeds)), *(_cell(r, m, m in shown) for m in (*shown, *_COSTS))) for r in summary.rows]
    note = "Mean ± standard deviation over seeds [95 % interval of Student's t]."
    if summary.missing:
        note += f" {len(summary.missing)} runs are not finished."
    found = [Table("All settings", header, tuple(body), note)]
    prefix = ("problem",) if problems else ()
    best = tuple(
        (*((r.problem,) if problems else ()), r.strategy, r.setting, _cell(r, summary.metric, True))
        for r in summary.best
    )
    title = f"Best setting per strategy, by {summary.metric}"
    note = "Chosen by the scores that are shown, so of many settings the best looks better than it is."
    found.append(Table(title, (*prefix, "strategy", "setting", summary.metric), best, note if _chosen(summary) else ""))
    if summary.comparisons:
        found.append(_comparisons(summary, problems))
    pareto = [r for r in summary.rows if r.fronts]
    if len(summary.rows) > 1:
        cells = (
            (
                *((r.problem,) if problems else ()),
                r.setting,
                _number(r.estimate("average_accuracy")),
                *(_number(r.estimate(name)) + (" *" if name in r.fronts else "") for name in AGAINST),
            )
            for r in pareto
        )
        note = "* no other setting is as good in both average accuracy and this, and better in one of them."
        found.append(Table("Pareto rows", (*prefix, "setting", "average_accuracy", *AGAINST), tuple(cells), note))
    return found


def _chosen(summary: Summary) -> bool:
    """Whether the best of a strategy was one of several."""
    return len(summary.rows) > len(summary.best)


def _comparisons(summary: Summary, problems: bool) -> Table:
    rows = []
    for c in summary.comparisons:
        p = "-" if c.paired.wilcoxon_p is None else f"{c.paired.wilcoxon_p:.3g}"
        difference = c.paired.difference
        cells = (c.first, c.second, str(difference.n), _estimate(difference, sign=True), p)
        rows.append((c.problem, *cells) if problems else cells)
    fewest = min(c.paired.difference.n for c in summary.comparisons)
    note = (
        f"Differences on equal seeds. With {fewest} seeds the test's p is at least {2 / 2**fewest:.2g}; "
        "it is not corrected for many comparisons."
        if fewest > 1
        else "Differences on equal seeds. One seed is too few for a test."
    )
    header = (
        *(("problem",) if problems else ()),
        "setting",
        "minus",
        "seeds",
        f"difference of {summary.metric}",
        "Wilcoxon p",
    )
    return Table("Strategies against each other", header, tuple(rows), note)


def _cell(row: Row, metric: str, spread: bool) -> str:
    found = row.estimate(metric)
    return _estimate(found) if spread else _number(found)


def _estimate(found: Estimate | None, sign: bool = False) -> str:
    if found is None:
        return "-"
    text = f"{found.mean:+.3f}" if sign else f"{found.mean:.3f}"
    return text if found.sd is None else f"{text} ± {found.sd:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _number(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.3f}" if abs(found.mean) < 10 else f"{found.mean:.0f}"


def markdown(summary: Summary) -> str:
    """All tables as Markdown, aligned so that they can be read as text too."""
    return "\n\n".join(f"### {t.title}\n\n{_grid(t)}" + (f"\n\n{t.note}" if t.note else "") for t in tables(summary))


def _grid(table: Table) -> str:
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(table.header), rule, *(line(row) for row in table.rows)])


def latex(summary: Summary) -> str:
    """All tables as LaTeX (booktabs)."""
    parts = []
    for table in tables(summary):
        lines = [" & ".join(map(_tex, cells)) + r" \\" for cells in (table.header, *table.rows)]
        columns = "l" * len(table.header)
        body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
        caption = _tex(f"{table.title}. {table.note}".strip())
        parts.append(
            f"\\begin{{table}}\n\\caption{{{caption}}}\n\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n\\end{{table}}"
        )
    return "\n\n".join(parts) + "\n"


def _tex(text: str) -> str:
    escaped = "".join(_ESCAPES.get(c, c) for c in text)
    return re.sub("±", r"$\\pm$", escaped)


def settings_csv(summary: Summary) -> str:
    """A line per setting and metric."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("setting", "strategy", "problem", "metric", "seeds", "mean", "sd", "low", "high"))
    for row in summary.rows:
        for metric in row.values:
            if (found := row.estimate(metric)) is not None:
                rest = dataclasses.astuple(found)
                writer.writerow(
                    (row.setting, row.strategy, row.problem, metric, *("" if v is None else v for v in rest))
                )
    return file.getvalue()


def runs_csv(summary: Summary) -> str:
    """A line per run."""
    columns = list(dict.fromkeys(key for run in summary.runs for key in run))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(summary.runs)
    return file.getvalue()


def as_json(summary: Summary) -> str:
    """Everything."""
    rows = [
        {
            **{key: getattr(row, key) for key in ("setting", "strategy", "problem", "seeds", "fronts")},
            "metrics": {m: e if (e := row.estimate(m)) is None else dataclasses.asdict(e) for m in row.values},
        }
        for row in summary.rows
    ]
    content: dict[str, Any] = {
        "name": summary.name,
        "metric": summary.metric,
        "definitions": {k: v.formula for k, v in DEFINITIONS.items()},
        "lower_is_better": sorted(summary.lower_is_better),
        "settings": rows,
        "best": [{"problem": r.problem, "strategy": r.strategy, "setting": r.setting} for r in summary.best],
        "comparisons": [dataclasses.asdict(c) for c in summary.comparisons],
        "missing": summary.missing,
        "runs": summary.runs,
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write(summary: Summary, directory: Path) -> list[Path]:
    """Write ``summary.md``, ``.tex``, ``.csv``, ``.json`` and ``runs.csv``; returns their paths."""
    files = {
        "summary.md": markdown(summary) + "\n",
        "summary.tex": latex(summary),
        "summary.csv": settings_csv(summary),
        "runs.csv": runs_csv(summary),
        "summary.json": as_json(summary),
    }
    for name, text in files.items():
        write_text(directory / name, text)
    return [directory / name for name in files]
