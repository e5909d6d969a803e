"""What a page says of edits: their journal, how well they took, and what answers which query."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clkit.editing.journal import FINAL, Journal
from clkit.report.figures import INK, SERIES, Drawing, axis, legend_below, styles

_PARTS = {"prompt": "reliability", "rephrase": "generalisation", "locality": "locality"}


@dataclass
class Edits:
    """A directory of edits: what was changed, and how well it took."""

    path: Path
    entries: list[dict[str, Any]]
    final: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> Edits | None:
        """The edits in a directory; None where there are none."""
        file = directory / "edits.json"
        if not file.is_file():
            return None
        journal = Journal.open(directory / "journal.jsonl")
        final = directory / FINAL
        return cls(directory, journal.entries, json.loads(final.read_text(encoding="utf-8")) if final.is_file() else {})

    @property
    def made(self) -> list[dict[str, Any]]:
        """The entries that are edits, not rollbacks."""
        return [e for e in self.entries if e.get("kind") == "edit"]

    @property
    def scored(self) -> list[dict[str, Any]]:
        """The edits as the final model has them, where `clkit edit` scored them."""
        return list(self.final.get("rows", []))

    @property
    def routes(self) -> dict[str, list[dict[str, Any]]]:
        """How queries were routed on the final model (else right after each edit), by what kind of query it was."""
        rows = [row["routes"] for row in self.scored or self.made if row.get("routes")]
        return {label: found for part, label in _PARTS.items() if (found := [r[part] for r in rows if part in r])}

    @property
    def answered(self) -> list[tuple[str, int, int]]:
        """Kind of query, how many a memory answers, and how many the unedited model."""
        counts = [(label, sum(r["memory"] is not None for r in rows), len(rows)) for label, rows in self.routes.items()]
        return [(label, by_memory, total - by_memory) for label, by_memory, total in counts]

    def drawings(self, name: str) -> list[Drawing]:
        """Scores along the edits, and edits per memory."""
        if not self.made:
            return []
        found = [
            Drawing(
                f"{name}-edits",
                "Score right after each edit",
                "Running mean over the edits so far: of the prompt itself (reliability), of the rephrased prompt "
                "(generalisation) and of the unrelated prompt (locality), where the request has one.",
                lambda axes: _along(axes, self.made),
            )
        ]
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
            found.append(
                Drawing(
                    f"{name}-routing",
                    "Routing of queries",
                    "Score of the memory that responds most, over its threshold. Right of the line a memory answers, "
                    "left of it the unedited model: there unrelated prompts belong, and no others.",
                    lambda axes: _routing(axes, self.routes),
                )
            )
        memories = Counter(str(e["memory"]) for e in self.made if e.get("memory") is not None)
        if memories:
            found.append(
                Drawing(
                    f"{name}-memories",
                    "Edits by memory",
                    "How many edits each side memory holds.",
                    lambda axes: _memories(axes, memories),
                )
            )
        return found


def _along(axes: Any, entries: list[dict[str, Any]]) -> None:
    drawn = 0
    for (part, label), style in zip(_PARTS.items(), styles(3), strict=True):
        points = [(i, e["after"][part]) for i, e in enumerate(entries, start=1) if part in e.get("after", {})]
        if points:
            numbers, values = zip(*points, strict=True)
            running = np.cumsum(values) / np.arange(1, len(values) + 1)
            axes.plot(numbers, running, label=label, marker="o" if len(points) < 30 else None, **style)
            drawn += 1
    axes.set_ylim(-0.03, 1.03)
    axis(axes, "edits", "mean score so far")
    legend_below(axes, drawn + (drawn == 1))


def _routing(axes: Any, routes: dict[str, list[dict[str, Any]]]) -> None:
    """A histogram per kind of query on a logarithmic axis."""
    ratios = {k: [max(r["score"], 0.0) / r["threshold"] for r in rows if r["threshold"]] for k, rows in routes.items()}
    every = np.maximum(np.concatenate([np.array(v) for v in ratios.values()]), 1e-3)
    edges = np.geomspace(min(0.5, every.min()), max(2.0, every.max()), 25)
    for (label, values), style in zip(ratios.items(), styles(len(ratios)), strict=True):
        heights = np.histogram(np.maximum(values, 1e-3), np.append(edges[:-1], edges[-1] * 1.001))[0]
        axes.stairs(heights, edges, label=label, fill=True, alpha=0.25, color=style["color"])
        axes.stairs(heights, edges, color=style["color"], linewidth=1.4)
    axes.axvline(1, color=INK, linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}" if edges[-1] < 8 * edges[0] else "")
    axis(axes, "score over threshold", "queries")
    legend_below(axes, len(ratios))


def _memories(axes: Any, memories: Counter[str]) -> None:
    bars = axes.bar(list(memories), list(memories.values()), color=SERIES[0], width=0.6)
    axes.bar_label(bars, padding=2, fontsize=8, color=INK)
    axes.set_xlim(-0.8, max(len(memories), 3) - 0.2)
    axis(axes, "memory", "edits")
