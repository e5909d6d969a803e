"""What a page says beside a run's numbers: the journal of edits, and the certificates of deletion requests."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clkit.editing.journal import Journal
from clkit.report.figures import INK, SERIES, Drawing, axis, legend_below, styles
from clkit.unlearning.certificate import NAME
from clkit.unlearning.ledger import FILE, Ledger, find_folder

_PARTS = {"prompt": "reliability", "rephrase": "generalisation", "locality": "locality"}


@dataclass
class Edits:
    """A directory of edits: what was changed, and how well it took."""

    path: Path
    entries: list[dict[str, Any]]
    head: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> Edits | None:
        """The edits in a directory; None where there are none."""
        file = directory / "edits.json"
        if not file.is_file():
            return None
        journal = Journal.open(directory / "journal.jsonl")
        return cls(directory, journal.entries, json.loads(file.read_text(encoding="utf-8")))

    @property
    def made(self) -> list[dict[str, Any]]:
        """The entries that are edits, not rollbacks."""
        return [e for e in self.entries if e.get("kind") == "edit"]

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


def _memories(axes: Any, memories: Counter[str]) -> None:
    bars = axes.bar(list(memories), list(memories.values()), color=SERIES[0], width=0.6)
    axes.bar_label(bars, padding=2, fontsize=8, color=INK)
    axis(axes, "memory", "edits")


@dataclass(frozen=True)
class Deletion:
    """A certificate in which a run stands, and the way of its job through the ledger."""

    role: str
    content: dict[str, Any]
    history: list[tuple[str, str | None, float]]
    path: Path


def deletions(run_dir: Path) -> list[Deletion]:
    """The certificates that name this run, as the new one or as the one that it takes the place of."""
    folder = find_folder(run_dir)
    if folder is None or not (folder / FILE).is_file():
        return []
    found, ledger = [], Ledger(folder)
    try:
        for file in sorted(folder.glob(f"*/{NAME}")):
            content = json.loads(file.read_text(encoding="utf-8"))
            for role in ("new_run", "superseded"):
                if (file.parent / content[role]["path"]).resolve() == run_dir.resolve():
                    found.append(Deletion(role, content, ledger.history(content["job"]), file))
    finally:
        ledger.close()
    return found
