"""The plots of one run: functions that draw on Matplotlib axes, and :class:`Plots` for notebooks (``result.plot``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from clkit.report.figures import (
    GRID,
    INK,
    MUTED,
    SERIES,
    Drawing,
    axis,
    in_legend,
    legend_below,
    plain,
    shortened,
    styles,
)
from clkit.report.history import History, Series

if TYPE_CHECKING:
    from clkit.result import RunResult


class Plots:
    """Plots of a run's result. Each method draws on ``ax``, or on axes of its own, and returns them.

    Example:
        >>> result.plot.matrix()  # doctest: +SKIP
    """

    def __init__(self, result: RunResult) -> None:
        self._result = result
        self._history = History.read(result.run_dir) if result.run_dir is not None else History()

    def matrix(self, ax: Any = None) -> Any:
        """The score matrix as a heat map with its numbers."""
        return _on(ax, "Scores after each task", lambda axes: matrix(axes, self._result))

    def scores(self, ax: Any = None) -> Any:
        """The score of each task along training."""
        return _on(ax, "Score of each task along training", lambda axes: scores(axes, self._result, self._history))

    def forgetting(self, ax: Any = None) -> Any:
        """How much of each task was forgotten."""
        return _on(ax, "Forgetting per task", lambda axes: forgetting(axes, self._result))

    def losses(self, ax: Any = None) -> Any:
        """The terms of the loss along training; empty without a run directory."""
        return _on(ax, "Loss terms", lambda axes: curves(axes, self._history.losses, self._history, "loss"))


def _on(ax: Any, title: str, draw: Callable[[Any], None]) -> Any:
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(layout="constrained")[1]
    draw(ax)
    ax.set_title(title)
    return ax


def drawings(result: RunResult, history: History, name: str) -> list[Drawing]:
    """All figures that the data of a run allow; ``name`` begins the names of their files."""
    tasks = [*result.tasks, *result.holdout]
    side = 70 + 44 * len(tasks), 66 + 24 * (len(result.tasks) + 1)
    found = [
        Drawing(
            f"{name}-scores",
            "Score of each task along training",
            "One line per task; it begins where the task was first scored. Grey lines: a new task begins.",
            lambda axes: scores(axes, result, history),
        )
    ]
    if bars := sum(row["forgetting"] is not None for row in result.metrics.get("per_task", [])):
        found.append(
            Drawing(
                f"{name}-forgetting",
                "Forgetting per task",
                "Best score since the task was learned minus the final one; below zero the task got better.",
                lambda axes: forgetting(axes, result),
                (340, max(230, 65 + 15 * bars)),
            )
        )
    if history.losses:
        found.append(
            Drawing(
                f"{name}-losses",
                "Loss terms",
                "Each term as the strategy sums it, one value per logged step; log scale where all are positive.",
                lambda axes: curves(axes, history.losses, history, "loss"),
            )
        )
    for i, (key, series) in enumerate(_families(history).items(), start=1):
        found.append(
            Drawing(
                f"{name}-values-{i}",
                f"Logged by the strategy: {key}",
                "One value each time that the strategy wrote one down.",
                partial(curves, series=series, history=history, label=key),
            )
        )
    found.append(
        Drawing(
            f"{name}-matrix",
            "Scores after each task",
            "Row: after training that task. Column: scored task. Darker is better.",
            lambda axes: matrix(axes, result),
            (max(200, side[0]), max(140, side[1])),
        )
    )
    return found


def _families(history: History) -> dict[str, dict[str, Series]]:
    """Logged values by the first part of their name, those of one point only left out."""
    found: dict[str, dict[str, Series]] = {}
    for name, series in history.values.items():
        head, _, rest = name.partition("/")
        found.setdefault(head, {})[rest or head] = series
    return {k: v for k, v in found.items() if max(len(s) for s in v.values()) > 1 or len(v) > 1}


def matrix(axes: Any, result: RunResult) -> None:
    """The score matrix as a heat map with its numbers; white where nothing was measured."""
    from matplotlib.colors import LinearSegmentedColormap

    names = [*result.tasks, *result.holdout]
    rows = np.vstack([result.initial, result.matrix])
    labels = ["before training", *(plain(f"after {t}") for t in shortened(result.tasks))]
    if np.isnan(result.initial).all():
        rows, labels = rows[1:], labels[1:]
    shown = shades(rows, result.higher_is_better)
    colours = LinearSegmentedColormap.from_list("clkit", ["#f1f6fb", SERIES[0]])
    axes.imshow(shown, cmap=colours, vmin=0, vmax=1, aspect="auto")
    shown_names = [plain(name) for name in shortened(names)]
    axes.set_xticks(range(len(names)), shown_names, rotation=30 if len(names) > 4 else 0, ha="center")
    axes.set_yticks(range(len(labels)), labels)
    axes.grid(False)
    for (i, j), value in np.ndenumerate(rows):
        if not np.isnan(value):
            ink = "#ffffff" if shown[i, j] > 0.6 else INK
            axes.text(j, i, f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}", ha="center", va="center", color=ink)
    axis(axes, "scored task", "trained so far")


def shades(rows: Any, higher_is_better: list[bool]) -> Any:
    """How good each score is in its column: 0 worst to 1 best. Scores in [0, 1] are taken as they are; NaN stays."""
    shown = np.array(rows, dtype=float)
    for j, higher in enumerate(higher_is_better):
        column = shown[:, j]
        seen = column[np.isfinite(column)]
        if not len(seen) or (higher and seen.min() >= 0 and seen.max() <= 1):
            continue
        low, high = float(seen.min()), float(seen.max())
        share = (column - low) / (high - low) if high > low else np.where(np.isnan(column), np.nan, 1.0)
        shown[:, j] = np.clip(share if higher else 1 - share, 0, 1)  # what is infinite is off the scale
    return shown


def _boundaries(axes: Any, history: History) -> None:
    for step, _ in history.stages:
        axes.axvline(step, color=GRID, linewidth=1.2, zorder=0)


def scores(axes: Any, result: RunResult, history: History) -> None:
    """A line per task over optimiser steps; over tasks where there are no events."""
    names = [*result.tasks, *result.holdout]
    for j, (name, style) in enumerate(zip(names, styles(len(names)), strict=True)):
        points: list[tuple[float, float]] = [*history.of_task(name, result.task_metrics[j])]
        if not points:
            column = [result.initial[j], *result.matrix[:, j]]
            points = [(k, v) for k, v in enumerate(column) if not np.isnan(v)]
        if points:
            marker = "o" if len(names) <= 8 or len(points) == 1 else None  # of many lines they hide one another
            axes.plot(*zip(*points, strict=True), marker=marker, label=in_legend(name), **style)
    _boundaries(axes, history)
    kinds = dict.fromkeys(result.task_metrics)
    axis(axes, "optimiser steps" if history.scores else "tasks learned", ", ".join(kinds))
    if all(result.higher_is_better) and np.nanmax([1, *result.matrix.ravel()]) <= 1:
        axes.set_ylim(-0.03, 1.03)
    legend_below(axes, len(names))


def forgetting(axes: Any, result: RunResult) -> None:
    """A bar per task that could be forgotten."""
    rows = [row for row in result.metrics["per_task"] if row["forgetting"] is not None]
    names = [plain(name) for name in shortened([result.tasks[row["task"]] for row in rows])]
    values = [row["forgetting"] for row in rows]
    bars = axes.barh(names, values, color=[SERIES[1] if v > 0 else SERIES[2] for v in values], height=0.6)
    axes.bar_label(
        bars, [f"{v:.3f}" if abs(v) < 1000 else f"{v:.3g}" for v in values], padding=3, fontsize=8, color=INK
    )
    axes.axvline(0, color=MUTED, linewidth=0.8)
    middle, half = (len(values) - 1) / 2, max(len(values), 3) / 2  # one bar alone would fill the figure
    axes.set_ylim(middle + half, middle - half)
    axes.margins(x=0.18)
    axes.grid(axis="y", visible=False)
    axis(axes, "forgetting (lower is better)", "task")


def curves(axes: Any, series: dict[str, Series], history: History, label: str) -> None:
    """A line per series over optimiser steps."""
    for (name, points), style in zip(series.items(), styles(len(series)), strict=True):
        steps, values = zip(*thinned(points), strict=True)
        axes.plot(steps, values, label=in_legend(name), marker="o" if len(points) < 12 else None, **style)
    everything = [v for points in series.values() for _, v in points]
    if min(everything) > 0 and max(everything) > 20 * min(everything):
        axes.set_yscale("log")
    _boundaries(axes, history)
    only = next(iter(series)) if len(series) == 1 else label
    axis(axes, "optimiser steps", label if only == label else f"{label}: {only.replace('_', ' ')}")
    legend_below(axes, len(series))


def thinned(points: Series, most: int = 300) -> Series:
    """At most about ``most`` points: means over neighbours, so that a long curve is drawn as its trend."""
    width = -(-len(points) // most)
    if width == 1:
        return points
    blocks = [points[i : i + width] for i in range(0, len(points), width)]
    return [(block[len(block) // 2][0], sum(v for _, v in block) / len(block)) for block in blocks]
