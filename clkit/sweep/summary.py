"""What a sweep found: statistics over seeds per setting, the best setting per strategy, comparisons, Pareto rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clkit.errors import CheckpointError
from clkit.metrics.comparison import Estimate, Paired, estimate, front, paired
from clkit.result import RunResult, compared
from clkit.rundir import RunDirectory

MANIFEST = "sweep.json"
_MIB = 2**20

# Costs of a run, from its status.json; of each less is better.
COSTS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], float | None]] = {
    "wall_seconds": lambda cost, holds: cost.get("wall_seconds"),
    "cpu_seconds": lambda cost, holds: cost.get("cpu_seconds"),
    "peak_mib": lambda cost, holds: _mib(cost.get("peak_memory_bytes")),
    "peak_gpu_mib": lambda cost, holds: _mib(cost.get("peak_gpu_bytes")),
    "trained_parameters": lambda cost, holds: holds.get("trained_parameters"),
    "exemplar_mib": lambda cost, holds: _mib(holds.get("exemplar_bytes")),
}
AGAINST = ("forgetting", "peak_mib", "cpu_seconds")


def _mib(value: float | None) -> float | None:
    return None if value is None else value / _MIB


@dataclass(frozen=True)
class Row:
    """A setting.

    Attributes:
        problem: what is learned: the values of swept keys in `tasks`, `model` and `eval`. Only settings of one problem
            are compared.
        seeds: those whose runs are finished.
        values: per metric and cost, a value per seed; None = undefined.
        fronts: of "average accuracy against each of these" those that it is on.
        lower: the metrics and costs of which less is better for its problem.
    """

    setting: str
    strategy: str
    problem: str
    seeds: tuple[int, ...]
    values: Mapping[str, tuple[float | None, ...]]
    fronts: tuple[str, ...] = ()
    lower: frozenset[str] = frozenset()

    def estimate(self, metric: str) -> Estimate | None:
        """Over seeds; None where a seed has no value, because a mean over the others would be another one."""
        values = [v for v in self.values.get(metric, ()) if v is not None]
        return estimate(values) if values and len(values) == len(self.seeds) else None


@dataclass(frozen=True)
class Comparison:
    """The best settings of two strategies for one problem, on the seeds that both have; ``first`` minus ``second``."""

    problem: str
    first: str
    second: str
    paired: Paired


@dataclass(frozen=True)
class Summary:
    """Everything that is printed and written at the end of a sweep.

    Attributes:
        shown: metrics of the printed table.
        metric: the one that settings are chosen by.
        best: of each problem and strategy the best setting.
        missing: runs that are not finished.
        lower_is_better: of these metrics and costs less is better, for every problem.
    """

    name: str
    metric: str
    shown: tuple[str, ...]
    lower_is_better: frozenset[str]
    rows: tuple[Row, ...]
    best: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    missing: tuple[str, ...] = ()
    runs: tuple[Mapping[str, Any], ...] = field(default=())


def summarise(directory: Path) -> Summary:
    """Read the finished runs of a sweep's directory.

    Raises:
        CheckpointError: there is no sweep, or none of its runs is finished.
    """
    manifest = RunDirectory(directory).read(MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("runs"), list):
        raise CheckpointError(
            f"{directory}: no sweep here ({MANIFEST} is missing or damaged). Give a sweep's output_dir."
        )
    found: dict[tuple[str, str, str], dict[int, dict[str, float | None]]] = {}
    lower: dict[str, set[str]] = {}  # of perplexities less is better, of other scores more: each problem has its own
    missing, flat = [], []
    for run in manifest["runs"]:
        where = RunDirectory(directory / run["directory"])
        if not where.finished:
            missing.append(f"{run['setting']} seed {run['seed']}")
            continue
        values, worse = measured(where)
        lower.setdefault(run["problem"], set()).update(worse)
        key = (run["problem"], run["setting"], run["strategy"])
        found.setdefault(key, {})[run["seed"]] = values
        flat.append({**{k: run[k] for k in ("setting", "strategy", "problem", "seed", "hash")}, **values})
    if not found:
        raise CheckpointError(f"{directory}: none of the {len(missing)} runs of this sweep is finished")
    rows = []
    for (problem, setting, strategy), by_seed in found.items():
        metrics = dict.fromkeys(name for values in by_seed.values() for name in values)
        columns = {name: tuple(values.get(name) for values in by_seed.values()) for name in metrics}
        rows.append(Row(setting, strategy, problem, tuple(by_seed), columns, (), frozenset(lower[problem])))
    metric = str(manifest["best"])
    direction = frozenset.intersection(*(row.lower for row in rows))
    rows = _with_fronts(rows)
    best = choose(rows, metric)
    comparisons = tuple(compare(best, metric))
    shown = tuple(manifest["metrics"])
    name = str(manifest["name"])
    return Summary(name, metric, shown, direction, tuple(rows), best, comparisons, tuple(missing), tuple(flat))


def measured(directory: RunDirectory) -> tuple[dict[str, float | None], set[str]]:
    """Every metric and cost of a finished run, and those of which less is better."""
    result = RunResult.load(directory.path)
    rows = compared([result])
    values: dict[str, float | None] = {name: found[0] for name, found, _ in rows}
    lower = {name for name, _, direction in rows if direction == "lower"}
    state = directory.state
    cost, holds = state.get("cost") or {}, state.get("holds") or {}
    costs = {name: read(cost, holds) for name, read in COSTS.items()}
    values |= {name: value for name, value in costs.items() if value is not None}
    return values, lower | set(COSTS)


def _with_fronts(rows: Sequence[Row]) -> list[Row]:
    """Each row with the fronts it is on, among the rows of its problem."""
    on: dict[int, list[str]] = {i: [] for i in range(len(rows))}
    for problem in {row.problem for row in rows}:
        places = [i for i, row in enumerate(rows) if row.problem == problem]
        lower = rows[places[0]].lower
        for against in AGAINST:
            points = [[_mean(rows[i], name) for name in ("average_accuracy", against)] for i in places]
            better = ["average_accuracy" not in lower, against not in lower and against != "forgetting"]
            for i, good in zip(places, front(points, better), strict=True):
                on[i] += [against] if good else []
    return [replace(row, fronts=tuple(on[i])) for i, row in enumerate(rows)]


def _mean(row: Row, metric: str) -> float:
    found = row.estimate(metric)
    return math.nan if found is None else found.mean


def choose(rows: Sequence[Row], metric: str) -> tuple[Row, ...]:
    """The best setting of each strategy for each problem, the best strategies first; without a value, none.

    Settings with fewer finished seeds than others of their strategy are left aside: their means are not comparable.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.estimate(metric) is not None:
            groups.setdefault((row.problem, row.strategy), []).append(row)

    def rank(row: Row) -> float:
        return _mean(row, metric) * (1 if metric in row.lower else -1)

    found = []
    for group in groups.values():
        most = max(len(row.seeds) for row in group)
        found.append(min((r for r in group if len(r.seeds) == most), key=rank))
    return tuple(sorted(found, key=lambda r: (r.problem, rank(r))))


def compare(best: Sequence[Row], metric: str) -> list[Comparison]:
    """Every two strategies of one problem, on equal seeds."""
    found = []
    for first, second in itertools.combinations(best, 2):
        common = [seed for seed in first.seeds if seed in second.seeds]
        if first.problem == second.problem and common:
            a, b = ([_at(row, metric, seed) for seed in common] for row in (first, second))
            found.append(Comparison(first.problem, first.setting, second.setting, paired(a, b)))
    return found


def _at(row: Row, metric: str, seed: int) -> float:
    value = row.values[metric][row.seeds.index(seed)]
    return math.nan if value is None else value  # rows in which one is missing are not chosen
