"""Several runs side by side: settings and their seeds, means with intervals, paired differences, Pareto fronts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clkit.metrics.comparison import estimate
from clkit.metrics.comparison import front as unbeaten
from clkit.metrics.continual import DEFINITIONS
from clkit.report.figures import GRID, INK, MUTED, SERIES, Drawing, axis, plain, shortened, styles
from clkit.report.history import History
from clkit.result import RunResult

# Options that do not make another setting: repetitions differ in them.
_REPETITION = ("name", "output_dir", "seed", "checkpoint", "tracking", "compare")
# Of `tasks`: in which order the same things are learned; the last two are Avalanche's.
_ORDER = ("class_order", "order_seed", "fixed_class_order", "seed")
_SCORING = ("max_new_tokens", "lm_eval", "lm_eval_limit")  # of `eval`: what changes a score
PAIRED = ("average_accuracy", "forgetting")


@dataclass
class Entry:
    """One run in a comparison."""

    result: RunResult
    history: History
    config: dict[str, Any]

    @property
    def pair(self) -> tuple[Any, ...]:
        """What two runs must share to be compared as a pair: the seed, and the tasks in their order."""
        return self.config.get("seed"), *self.result.tasks, _text(self.config.get("tasks"))

    @property
    def setting(self) -> dict[str, Any]:
        """The options that repetitions share: all but the seed and the order of tasks, and how a run is watched."""
        found = {k: v for k, v in self.config.items() if k not in _REPETITION}
        if isinstance(tasks := found.get("tasks"), dict):
            found["tasks"] = _unordered(tasks)
        if isinstance(scoring := found.get("eval"), dict):
            found["eval"] = {k: v for k, v in scoring.items() if k in _SCORING}
        return found

    @property
    def memory(self) -> float | None:
        """Bytes of model and exemplars after the last task."""
        cost = self.history.last_cost
        model, exemplars = cost.get("model_bytes"), cost.get("exemplar_bytes")
        return None if model is None or exemplars is None else float(model + exemplars)

    def value(self, key: str) -> float | None:
        """A metric, None where undefined."""
        found = self.result.metrics.get(key)
        return None if found is None or math.isnan(found) else float(found)


@dataclass
class Group:
    """Runs of one setting that differ in seed or order of tasks."""

    label: str
    entries: list[Entry] = field(default_factory=list)

    def values(self, key: str) -> list[float]:
        """The metric of every run that has it."""
        return [v for e in self.entries if (v := e.value(key)) is not None]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval (Student's t); no interval for a single value."""

    mean: float
    half: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {self.half:.4f}" if self.half is not None else "") + f" (n = {self.n})"


def interval(values: Sequence[float]) -> Interval | None:
    """Mean and half-width of the 95 % interval of the mean.

    >>> interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, half=2.484137..., n=3)
    """
    if not values:
        return None
    found = estimate(values)
    return Interval(found.mean, None if found.high is None else found.high - found.mean, found.n)


def grouped(entries: Sequence[Entry]) -> list[Group]:
    """Runs by setting, in the order in which they were given, under labels that say what differs."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        key = _text([entry.setting or entry.result.name, sorted(entry.result.tasks)])
        found.setdefault(key, []).append(entry)
    groups = [Group("", members) for members in found.values()]
    for group, label in zip(groups, _labels([g.entries[0] for g in groups]), strict=True):
        group.label = label
    return groups


def _unordered(tasks: dict[str, Any]) -> dict[str, Any]:
    """The options of a task source but for the order of tasks."""
    found: dict[str, Any] = {}
    for key, value in tasks.items():
        if key not in _ORDER:
            found[key] = sorted(value, key=str) if isinstance(value, list) else value
            found[key] = _unordered(value) if isinstance(value, dict) else found[key]
    return found


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _labels(firsts: Sequence[Entry]) -> list[str]:
    """The strategy's name and the options that set it apart from what is most usual among its namesakes."""
    names = [str(e.config.get("strategy", {}).get("name", e.result.name)) for e in firsts]
    options = [_flat(e.setting) for e in firsts]
    labels = []
    for i, name in enumerate(names):
        same = [options[j] for j in range(len(names)) if names[j] == name]
        told = []
        for key, value in sorted(options[i].items()):
            usual = Counter(repr(o[key]) for o in same if key in o).most_common(1)[0][0]
            if repr(value) != usual:
                told.append(f"{key.rpartition('.')[2]}={value}")
        labels.append(" ".join([name, *told]) if len(told) <= 4 else firsts[i].result.name)
    return [label if labels.count(label) == 1 else f"{label} [{i + 1}]" for i, label in enumerate(labels)]


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def differences(groups: Sequence[Group], key: str) -> list[tuple[str, Interval]]:
    """Each group minus the first one, over the runs of both with the same seed and the same order of tasks."""
    if not groups:
        return []
    base = {e.pair: e.value(key) for e in groups[0].entries}
    found = []
    for group in groups[1:]:
        pairs = [(e.value(key), base.get(e.pair)) for e in group.entries]
        mean = interval([ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None])
        if mean is not None:
            found.append((group.label, mean))
    return found


def front(points: Sequence[tuple[float, float]], lower_y: bool = True, higher_x: bool = True) -> list[int]:
    """Indices of the points that no other one beats in both ways, along x.

    >>> front([(0.9, 0.3), (0.8, 0.1), (0.7, 0.2)])
    [1, 0]
    """
    kept = unbeaten(points, [higher_x, not lower_y])
    return sorted((i for i, good in enumerate(kept) if good), key=lambda i: points[i])


def direction(groups: Sequence[Group], key: str) -> str:
    """Which direction of a metric is better in these runs; as defined where they differ."""
    found = {e.result.scores.direction(key) for g in groups for e in g.entries}
    return found.pop() if len(found) == 1 else str(DEFINITIONS[key].direction)


# --- figures ---------------------------------------------------------------------------------------------------------
def means(groups: Sequence[Group]) -> list[Drawing]:
    """Accuracy and forgetting of each group."""
    return [
        Drawing(
            f"compare-{key}",
            f"{key.replace('_', ' ').capitalize()} of each setting",
            "Mean over its runs with the 95 % interval (Student's t); small dots are single runs.",
            partial(_means, groups=groups, key=key),
            (340, 80 + 22 * len(groups)),
        )
        for key in PAIRED
        if any(g.values(key) for g in groups)
    ]


def fronts(groups: Sequence[Group]) -> list[Drawing]:
    """Accuracy against forgetting and against memory; none where a lower accuracy is better."""
    found = []
    up = direction(groups, "average_accuracy") == "higher"
    if up and sum(bool(g.values("forgetting")) for g in groups) > 1:
        found.append(
            Drawing(
                "compare-pareto-forgetting",
                "Accuracy against forgetting",
                "One mark per setting (mean). Up and left is better; the line joins settings that none beats in both.",
                lambda axes: _pareto(
                    axes,
                    [(g.label, g.values("forgetting"), g.values("average_accuracy")) for g in groups],
                    "forgetting (lower is better)",
                ),
            )
        )
    spent = [(g.label, [e.memory for e in g.entries if e.memory is not None]) for g in groups]
    unit, size = _unit([m for _, memory in spent for m in memory])
    if (
        up
        and sum(bool(memory and g.values("average_accuracy")) for (_, memory), g in zip(spent, groups, strict=True)) > 1
    ):
        found.append(
            Drawing(
                "compare-pareto-memory",
                "Accuracy against memory",
                "Model and exemplars together, after the last task. Up and left is better.",
                lambda axes: _pareto(
                    axes,
                    [
                        (label, [m / size for m in memory], g.values("average_accuracy"))
                        for (label, memory), g in zip(spent, groups, strict=True)
                    ],
                    f"model and exemplars ({unit})",
                ),
            )
        )
    return found


def _unit(sizes: Sequence[float]) -> tuple[str, int]:
    """The unit that the largest of some sizes is told in, and its bytes."""
    for power, unit in ((3, "GiB"), (2, "MiB")):
        if max(sizes, default=0) >= 1024**power:
            return unit, 1024**power
    return "KiB", 1024


def gaps(groups: Sequence[Group]) -> list[Drawing]:
    """Paired differences to the first group."""
    found = []
    for key in PAIRED:
        if rows := differences(groups, key):
            found.append(
                Drawing(
                    f"compare-paired-{key}",
                    f"{key.replace('_', ' ').capitalize()}: difference to {shortened([groups[0].label], 20)[0]}",
                    f"Mean over pairs of runs with the same seed and tasks, 95 % interval; "
                    f"{direction(groups, key)} is better.",
                    partial(_paired, rows=rows, key=key),
                    (340, 80 + 22 * len(rows)),
                )
            )
    return found


def multiples(groups: Sequence[Group]) -> list[Drawing]:
    """One small figure per group: its mean accuracy over the tasks seen so far, the other groups in grey."""
    lines = [(g.label, _seen(g)) for g in groups]
    return [
        Drawing(
            f"compare-setting-{i + 1}",
            shortened([label], 34)[0],
            f"Runs: {len(groups[i].entries)}. Band: 95 % interval, from three runs on; thin: two single runs. "
            "Grey: the other settings.",
            partial(_multiple, lines=lines, which=i),
            (230, 170),
        )
        for i, (label, _) in enumerate(lines)
    ]


def _seen(group: Group) -> NDArray[np.float64]:
    """(runs, T) mean score over the tasks seen after each task; NaN where one was not measured."""
    length = max(len(e.result.matrix) for e in group.entries)
    rows = np.full((len(group.entries), length), np.nan)
    for row, entry in zip(rows, group.entries, strict=True):
        for k, scores in enumerate(entry.result.matrix):
            row[k] = scores[: k + 1].mean()
    return rows


def _multiple(axes: Any, lines: Sequence[tuple[str, NDArray[np.float64]]], which: int) -> None:
    for i in sorted(range(len(lines)), key=lambda i: i == which):
        rows, chosen = lines[i][1], i == which
        steps = np.arange(1, rows.shape[1] + 1)
        kept = ~np.isnan(rows).any(axis=0)
        mean = rows[:, kept].mean(axis=0)
        style: dict[str, Any] = {"color": SERIES[0], "linewidth": 2.2, "marker": "o"} if chosen else {"color": GRID}
        axes.plot(steps[kept], mean, **(style if chosen or kept.sum() > 1 else style | {"marker": "o"}))
        if chosen and len(rows) == 2:  # the interval of two would fill the panel
            axes.plot(steps, rows.T, color=SERIES[0], linewidth=0.8, alpha=0.6)
        if chosen and len(rows) > 2:
            found = [interval(rows[:, k].tolist()) for k in np.flatnonzero(kept)]
            half = np.array([(f.half or 0.0) if f is not None else 0.0 for f in found])
            axes.fill_between(steps[kept], mean - half, mean + half, color=SERIES[0], alpha=0.18, linewidth=0)
    means = np.concatenate([rows.mean(axis=0) for _, rows in lines])
    if len(known := means[~np.isnan(means)]):  # all is unknown where every model diverged
        low, high = float(known.min()), float(known.max())
        pad = 0.15 * (high - low) or 0.05
        axes.set_ylim(low - pad, high + pad)  # the same in all; a wide band is cut off rather than flatten the lines
    longest = max(rows.shape[1] for _, rows in lines)
    axes.set_xticks(np.arange(1, longest + 1, -(-longest // 10)))
    axis(axes, "tasks learned", "mean score, seen tasks")


def _means(axes: Any, groups: Sequence[Group], key: str) -> None:
    labels = [plain(label) for label in shortened([g.label for g in groups], 24)]
    for i, group in enumerate(groups):
        values, found = group.values(key), interval(group.values(key))
        if found is None:
            continue
        axes.plot(values, [i] * len(values), "o", color=MUTED, markersize=3, alpha=0.7)
        axes.errorbar(found.mean, i, xerr=found.half, fmt="D", color=SERIES[0], markersize=5, capsize=3, zorder=3)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axis(axes, f"{key.replace('_', ' ')} ({direction(groups, key)} is better)", "setting")


def _paired(axes: Any, rows: Sequence[tuple[str, Interval]], key: str) -> None:
    axes.axvline(0, color=MUTED, linewidth=1)
    for i, (_, found) in enumerate(rows):
        axes.errorbar(found.mean, i, xerr=found.half, fmt="D", color=SERIES[0], markersize=5, capsize=3)
    axes.set_yticks(range(len(rows)), [plain(label) for label in shortened([label for label, _ in rows], 24)])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axis(axes, f"difference in {key.replace('_', ' ')}", "setting")


def _pareto(axes: Any, points: Sequence[tuple[str, list[float], list[float]]], label: str) -> None:
    """Means; x is better lower and y higher."""
    known = [(name, float(np.mean(x)), float(np.mean(y))) for name, x, y in points if x and y]
    best = front([(y, x) for _, x, y in known])
    line = sorted((known[i][1], known[i][2]) for i in best)
    if len(line) > 1:
        axes.plot(*zip(*line, strict=True), color=GRID, linewidth=2, drawstyle="steps-post", zorder=1)
    for i, ((_, x, y), style) in enumerate(zip(known, styles(len(known)), strict=True)):
        axes.plot(x, y, "o", color=style["color"], markersize=6, zorder=2)
        axes.annotate(str(i + 1), (x, y), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8, color=INK)
    names = [plain(f"{i + 1} {name}") for i, name in enumerate(shortened([k[0] for k in known], 22))]
    axes.margins(0.15)
    spread = [x for _, x, _ in known]
    if max(spread) - min(spread) < 0.01 * abs(max(spread)):  # as good as equal: the axis says so, without an offset
        room = 0.05 * abs(max(spread))
        axes.set_xlim(min(spread) - room, max(spread) + room)
    axis(axes, label, "average accuracy")
    columns = 2 if max(map(len, names), default=0) > 10 else 3
    marks = [axes.plot([], [], "o", color=s["color"], markersize=5)[0] for s in styles(len(names))]
    axes.legend(marks, names, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, handletextpad=0.2)
