"""What happened in a run, read back from its events.jsonl."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clkit.result import RunResult
from clkit.rundir import RunDirectory
from clkit.scores import Scores

Series = list[tuple[int, float]]


@dataclass
class History:
    """Events by kind; a series is a list of (optimiser steps so far, value).

    Attributes:
        start: what the run is about; empty for runs of clkit before it was written down.
        stages: the first step of each task, with its name.
        losses: the terms of the loss.
        values: what the strategy logged.
        scores: the events of scoring, in order.
        costs: what each task's learning took.
        edits: the edits, in order, as journal entries.
        standing: after each task of edits, how all edits so far stand.
        training, scoring: seconds, pauses between two processes left out.
    """

    start: dict[str, Any] = field(default_factory=dict)
    stages: list[tuple[int, str]] = field(default_factory=list)
    losses: dict[str, Series] = field(default_factory=dict)
    values: dict[str, Series] = field(default_factory=dict)
    scores: list[dict[str, Any]] = field(default_factory=list)
    costs: list[dict[str, Any]] = field(default_factory=list)
    edits: list[dict[str, Any]] = field(default_factory=list)
    standing: list[dict[str, Any]] = field(default_factory=list)
    training: float = 0.0
    scoring: float = 0.0

    @classmethod
    def read(cls, run_dir: Path) -> History:
        """Read the events so far; a last line that is still being written is left out."""
        found, before = cls(), None
        file = run_dir / "events.jsonl"
        # Not splitlines(): U+2028 and the like stand as they are in the prompts of edits and the names of tasks.
        for line in file.read_bytes().split(b"\n") if file.is_file() else []:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event and "total_steps" in event:
                found._take(event, before)
                before = event.get("time")
        return found

    def _take(self, event: dict[str, Any], before: float | None) -> None:
        kind, step = event["event"], event["total_steps"]
        if before is not None and kind not in ("start", "resume"):
            seconds = max(0.0, event["time"] - before)
            if kind in ("score", "edits"):
                self.scoring += seconds
            else:
                self.training += seconds
        if kind == "start":
            self.start = event
        elif kind == "task":
            self.stages.append((step, event["name"]))
        elif kind == "step":
            for term, value in event["losses"].items():
                if value is not None:
                    self.losses.setdefault(term, []).append((step, value))
        elif kind == "value" and event["value"] is not None:
            self.values.setdefault(event["name"], []).append((step, event["value"]))
        elif kind == "score":
            self.scores.append(event)
        elif kind == "cost":
            self.costs.append(event)
        elif kind == "edit":
            self.edits.append({**event, "number": len(self.edits) + 1, "kind": kind})
        elif kind == "edits":
            self.standing.append(event)

    def of_task(self, task: str, metric: str) -> Series:
        """A task's score along training, by its own metric and with the weights that serve."""
        return [
            (e["total_steps"], e["value"])
            for e in self.scores
            if e["task"] == task and e["metric"] == metric and "weights" not in e and e["value"] is not None
        ]

    @property
    def last_cost(self) -> dict[str, Any]:
        """The cost after the last task so far."""
        return self.costs[-1] if self.costs else {}


def result_so_far(run_dir: str | Path) -> RunResult | None:
    """The result of a run that goes on, from its events; None before it wrote down what it is about."""
    directory = RunDirectory(run_dir)
    history = History.read(directory.path)
    if not history.start:
        return None
    tasks, holdout = history.start["tasks"], history.start["holdout"]
    metrics, names = history.start["task_metrics"], [*tasks, *holdout]
    matrix, initial = np.full((len(tasks), len(names)), np.nan), np.full(len(names), np.nan)
    for event in history.scores:
        if event["task"] in names and event["value"] is not None and "weights" not in event:
            column = names.index(event["task"])
            if event["metric"] == metrics[column]:
                row = _row(event, matrix, initial)
                if row is not None:
                    row[column] = event["value"]
    scores = Scores(metrics, history.start["higher_is_better"], matrix, initial)
    return RunResult(
        name=directory.path.name,
        tasks=tasks,
        holdout=holdout,
        task_metrics=metrics,
        matrix=matrix,
        initial=initial,
        metrics=scores.metrics(),
        higher_is_better=scores.higher_is_better,
        run_dir=directory.path,
    )


def _row(
    event: dict[str, Any], matrix: NDArray[np.float64], initial: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """The row that a score stands in; None for one in the middle of a task."""
    if event["after"] == "before training":
        return initial
    row: NDArray[np.float64] = matrix[event["stage"]]
    return row if event["after"].startswith("after ") else None
