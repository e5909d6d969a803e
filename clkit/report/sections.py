"""What a page says of edits: their journal, how well they took, and what answers which query."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clkit.editing.journal import FINAL, QUERIES, Journal
from clkit.report.figures import INK, SERIES, Drawing, axis, legend_below, shortened, styles
from clkit.report.history import History

_MOST = 16  # so many memories have a bar


@dataclass
class Edits:
    """The edits of a directory or of a run: what was changed, and how well it took.

    Attributes:
        path: the directory.
        entries: of the journal.
        final: how the edits stand on the model that holds them all: how many, and their rows.
        standing: the means over all edits so far, after each task of a run.
    """

    path: Path
    entries: list[dict[str, Any]]
    final: dict[str, Any] = field(default_factory=dict)
    standing: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, directory: Path) -> Edits | None:
        """The edits in a directory; None where there are none."""
        file = directory / "edits.json"
        if not file.is_file():
            return None
        journal = Journal.open(directory / "journal.jsonl")
        final = directory / FINAL
        return cls(directory, journal.entries, json.loads(final.read_text(encoding="utf-8")) if final.is_file() else {})

    @classmethod
    def of_run(cls, directory: Path, history: History) -> Edits | None:
        """The edits that a run has made so far; None where it makes none."""
        if not history.edits:
            return None
        last = history.standing[-1] if history.standing else {}
        return cls(directory, history.edits, last if "rows" in last else {}, history.standing)

    @property
    def made(self) -> list[dict[str, Any]]:
        """The entries that are edits, not rollbacks or merges."""
        return [e for e in self.entries if e.get("kind") == "edit"]

    @property
    def scored(self) -> list[dict[str, Any]]:
        """The edits as the final model has them, where they were scored on it."""
        return list(self.final.get("rows", []))

    @property
    def means(self) -> dict[str, float]:
        """Reliability, generalisation and locality of all edits at the end, as far as they were scored."""
        return dict(self.standing[-1]["means"]) if self.standing else {}

    @property
    def routes(self) -> dict[str, list[dict[str, Any]]]:
        """How queries were routed on the final model (else right after each edit), by what kind of query it was."""
        rows = [row["routes"] for row in self.scored or self.made if row.get("routes")]
        return {label: found for part, label in QUERIES.items() if (found := [r[part] for r in rows if part in r])}

    @property
    def answered(self) -> list[tuple[str, int, int]]:
        """Kind of query, how many a memory answers, and how many the unedited model."""
        counts = [(label, sum(r["memory"] is not None for r in rows), len(rows)) for label, rows in self.routes.items()]
        return [(label, by_memory, total - by_memory) for label, by_memory, total in counts]

    def drawings(self, name: str) -> list[Drawing]:
        """Scores along the edits, how queries are routed, and edits per memory."""
        if not self.made:
            return []
        found = [
            Drawing(
                f"{name}-edits",
                "Score right after each edit",
                "Running mean over the edits so far: of the prompt itself (reliability), of the rephrased prompt "
                "(generalisation) and of the unrelated prompt (locality), where the request has one. Locality is "
                "compared with the answer that the request names: what the unedited model gets wrong counts as wrong.",
                lambda axes: _along(axes, self.made),
            )
        ]
        if len(self.standing) > 1:
            found.append(
                Drawing(
                    f"{name}-standing",
                    "Score of all edits so far",
                    "After each task: means over every edit that was learned until then, on the model that holds them "
                    "all.",
                    lambda axes: _standing(axes, self.standing),
                )
            )
        if self.scored:
            found.append(
                Drawing(
                    f"{name}-final",
                    f"Score with all {self.final['edits']} edits in the model",
                    "The same running means on the final model, edits in the order in which they were learned: a curve "
                    "that lies below the one before lost something to later edits.",
                    lambda axes: _along(axes, self.scored),
                )
            )
        if any(r["threshold"] for rows in self.routes.values() for r in rows):
            found.append(_routing_drawing(f"{name}-routing", self.routes))
        memories = Counter(str(e["memory"]) for e in self.made if e.get("memory") is not None)
        if memories:
            most = f" The {_MOST} that hold most." if len(memories) > _MOST else ""
            found.append(
                Drawing(
                    f"{name}-memories",
                    "Edits by memory",
                    f"How many edits were put into each memory.{most}",
                    lambda axes: _memories(axes, memories.most_common(_MOST)),
                )
            )
        return found


def _routing_drawing(name: str, routes: dict[str, list[dict[str, Any]]]) -> Drawing:
    """The figure of scores (WISE) or of distances, which are negative (GRACE)."""
    near = any((r["threshold"] or 0) < 0 for rows in routes.values() for r in rows)
    there = "there unrelated prompts belong, and no others."
    caption = (
        "Distance to the key that comes nearest to answering, over its radius. Left of the line the key answers, right "
        f"of it the unedited model: {there}"
        if near
        else "Score of the memory that comes nearest to answering, over its threshold, or, where that is less, its "
        f"likeness over the least. Right of the line the memory answers, left of it the unedited model: {there}"
    )
    return Drawing(name, "Routing of queries", caption, lambda axes: _routing(axes, routes, near))


def _along(axes: Any, entries: list[dict[str, Any]]) -> None:
    drawn = 0
    for (part, label), style in zip(QUERIES.items(), styles(3), strict=True):
        points = [(i, e["after"][part]) for i, e in enumerate(entries, start=1) if part in e.get("after", {})]
        if points:
            numbers, values = zip(*points, strict=True)
            running = np.cumsum(values) / np.arange(1, len(values) + 1)
            axes.plot(numbers, running, label=label, marker="o" if len(points) < 30 else None, **style)
            drawn += 1
    axes.set_ylim(-0.03, 1.03)
    axis(axes, "edits", "mean score so far")
    legend_below(axes, drawn + (drawn == 1))


def _standing(axes: Any, standing: list[dict[str, Any]]) -> None:
    drawn = 0
    for label, style in zip(QUERIES.values(), styles(3), strict=True):
        points = [(row["edits"], row["means"][label]) for row in standing if label in row["means"]]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o", **style)
            drawn += 1
    axes.set_ylim(-0.03, 1.03)
    axis(axes, "edits", "mean score of all so far")
    legend_below(axes, drawn + (drawn == 1))


def _routing(axes: Any, routes: dict[str, list[dict[str, Any]]], near: bool) -> None:
    """A histogram per kind of query: of distances over radii, or on a logarithmic axis of scores over thresholds."""
    ratios = {k: np.array([_ratio(r) for r in rows if r["threshold"]]) for k, rows in routes.items()}
    if not near:
        ratios = {k: np.maximum(v, 1e-3) for k, v in ratios.items()}
    every = np.concatenate(list(ratios.values()))
    highest = max(2.0, every.max())
    edges = np.linspace(0, highest, 25) if near else np.geomspace(min(0.5, every.min()), highest, 25)
    for (label, values), style in zip(ratios.items(), styles(len(ratios)), strict=True):
        heights = np.histogram(values, np.append(edges[:-1], edges[-1] * 1.001))[0]
        axes.stairs(heights, edges, label=label, fill=True, alpha=0.25, color=style["color"])
        axes.stairs(heights, edges, color=style["color"], linewidth=1.4)
    axes.axvline(1, color=INK, linewidth=1, linestyle="--")
    if not near:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}" if edges[-1] < 8 * edges[0] else "")
    axis(axes, "distance over radius" if near else "score over threshold", "queries")
    legend_below(axes, len(ratios))


def _ratio(route: dict[str, Any]) -> float:
    """Above 1 (of distances: below) the memory answers."""
    ratio = float(route["score"] / route["threshold"])
    return min(ratio, route["likeness"] / route["least"]) if "likeness" in route else ratio


def _memories(axes: Any, memories: list[tuple[str, int]]) -> None:
    names, counts = zip(*memories, strict=True)
    bars = axes.bar(shortened(list(names), 14), counts, color=SERIES[0], width=0.6)
    axes.bar_label(bars, padding=2, fontsize=8, color=INK)
    axes.set_xlim(-0.8, max(len(memories), 3) - 0.2)
    if len(memories) > 5:
        axes.tick_params(axis="x", rotation=60)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axis(axes, "memory", "edits")
