"""Axes: what varies between the runs of a sweep, and all the settings that follow."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clkit import resolve
from clkit.errors import Problem, did_you_mean

_DIGITS = 12  # a range counts up in decimal steps: 0.1, 0.2, 0.3, not 0.30000000000000004
_SPEC = ("values", "from", "to", "step", "count", "scale", "when")
_OWN = {
    "seed": "use sweep.seeds",
    "output_dir": "each run gets a directory of its own in it",
    "name": "runs are named after their settings",
    "compare": "axes take the place of compare",
}


@dataclass(frozen=True)
class Axis:
    """One dimension of a sweep: a key, or several keys that change together.

    Attributes:
        keys: dotted keys of the configuration.
        values: one tuple per position, a value for each key.
        names: what each position is called.
        when: the axis is there only in settings in which each of these keys has one of these values.
        span: (low, high, logarithmic) of a range, for a search between its values.
        where: the place in the file.
    """

    keys: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]
    names: tuple[str, ...]
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    span: tuple[float, float, bool] | None = None
    where: str = ""


@dataclass(frozen=True)
class Setting:
    """One point of a sweep.

    Attributes:
        name: made of the names of its values; also the name of its directory.
        values: by dotted key, in the order in which they are set.
    """

    name: str
    values: Mapping[str, Any]


def parse(raw: Mapping[str, Any], problems: list[Problem]) -> list[Axis]:
    """The axes of a `sweep` section; what is wrong with them is added to ``problems``."""
    axes = raw.get("axes") or {}
    groups = raw.get("zip") or []
    found: list[Axis] = []
    if isinstance(axes, Mapping):
        for key, spec in axes.items():
            if spec is not None:  # null takes an axis away, which an override can do
                found += _axis(str(key), spec, f"sweep.axes.{key}", problems)
    else:
        problems.append(Problem("sweep.axes", f"got {axes!r}, expected a mapping from keys to values"))
    if isinstance(groups, list):
        for i, group in enumerate(groups):
            found += _group(group, f"sweep.zip[{i}]", problems)
    else:
        problems.append(Problem("sweep.zip", f"got {groups!r}, expected a list of groups"))
    places: dict[str, str] = {}
    for axis in found:
        for key in axis.keys:
            if key in _OWN:
                problems.append(Problem(axis.where, f"'{key}' can't be swept: {_OWN[key]}"))
            if key in places:
                problems.append(Problem(axis.where, f"'{key}' is swept twice (also in {places[key]})"))
            places[key] = axis.where
    return found


def seeds(raw: Mapping[str, Any], default: int, problems: list[Problem]) -> list[int]:
    """`seeds`: how many from 0 on, or which; the configuration's own where nothing is said."""
    given = raw.get("seeds", [default])
    found = list(range(given)) if isinstance(given, int) and not isinstance(given, bool) else given
    whole = isinstance(found, list) and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in found)
    if not whole or not found:
        problems.append(Problem("sweep.seeds", f"got {given!r}, expected a number >= 1 or a list of whole numbers"))
        return [default]
    if len(set(found)) < len(found):
        problems.append(Problem("sweep.seeds", f"a seed is listed twice ({found})"))
    return list(dict.fromkeys(found))


def _axis(key: str, spec: Any, where: str, problems: list[Problem]) -> list[Axis]:
    if isinstance(spec, list):
        spec = {"values": spec}
    if not isinstance(spec, Mapping):
        problems.append(Problem(where, f"got {spec!r}, expected a list, or a mapping with `values` or `from` and `to`"))
        return []
    for name in spec:
        if name not in _SPEC:
            problems.append(
                Problem(f"{where}.{name}", f"unknown.{did_you_mean(str(name), _SPEC)} Known: {', '.join(_SPEC)}")
            )
    span = None
    named = spec.get("values")
    if isinstance(named, Mapping):
        names, values = [str(name) for name in named], list(named.values())
    elif "values" in spec:
        values = named if isinstance(named, list) else []
        names = [shown(key, value) for value in values]
    else:
        values, span = _range(spec, where, problems)
        names = [shown(key, value) for value in values]
        if not values:
            return []
    if not values:
        problems.append(Problem(where, "an empty axis; give at least one value, or null to take the axis away"))
        return []
    rows = tuple((value,) for value in values)
    return [Axis((key,), rows, tuple(names), _when(spec.get("when"), where, problems), span, where)]


def _range(
    spec: Mapping[str, Any], where: str, problems: list[Problem]
) -> tuple[list[Any], tuple[float, float, bool] | None]:
    """The numbers from `from` to `to`, both included, by `step` or in `count` equal parts."""
    low, high, step, count = (spec.get(name) for name in ("from", "to", "step", "count"))
    scale = spec.get("scale", "linear")
    wrong = [
        f"`{name}` must be a number (got {value!r})"
        for name, value in (("from", low), ("to", high), ("step", 1 if step is None else step))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
    ]
    if (step is None) == (count is None):
        wrong.append("give either `step` or `count`")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        wrong.append(f"`count` must be a whole number >= 1 (got {count!r})")
    if scale not in ("linear", "log"):
        wrong.append(f"`scale` must be linear or log (got {scale!r})")
    if not wrong and (low > high or (count == 1) != (low == high and count is not None)):  # type: ignore[operator]
        wrong.append(f"an empty range, or one value from two ends (from {low} to {high})")
    if not wrong and step is not None and (step <= 0 or scale == "log"):
        wrong.append("`step` must be above 0, and a log scale needs `count`")
    if not wrong and scale == "log" and low <= 0:  # type: ignore[operator]
        wrong.append(f"a log scale needs `from` above 0 (got {low})")
    if wrong:
        problems += [Problem(where, text) for text in wrong]
        return [], None
    start, end = float(low), float(high)  # type: ignore[arg-type]
    if step is not None:
        count = math.floor((end - start) / step + 1e-9) + 1
        values: list[Any] = [start + i * step for i in range(count)]
    elif scale == "log":
        ratio = (end / start) ** (1 / max(1, count - 1))  # type: ignore[operator]
        values = [start * ratio**i for i in range(count)]  # type: ignore[arg-type]
    else:
        values = [start + i * (end - start) / max(1, count - 1) for i in range(count)]  # type: ignore[operator, arg-type]
    values = [float(f"{value:.{_DIGITS}g}") for value in values]
    if all(isinstance(bound, int) for bound in (low, high)) and all(value.is_integer() for value in values):
        values = [int(value) for value in values]
    return values, (start, end, scale == "log")


def _group(group: Any, where: str, problems: list[Problem]) -> list[Axis]:
    """Keys that change together: lists of one length."""
    if not isinstance(group, Mapping):
        problems.append(Problem(where, f"got {group!r}, expected a mapping from keys to lists of equal length"))
        return []
    lists = {str(key): value for key, value in group.items() if key != "when"}
    bad = [key for key, value in lists.items() if not isinstance(value, list) or not value]
    problems += [
        Problem(f"{where}.{key}", f"got {lists[key]!r}, expected a list with at least one value") for key in bad
    ]
    lengths = {key: len(value) for key, value in lists.items() if key not in bad}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} has {n}" for key, n in lengths.items())
        problems.append(Problem(where, f"lists of unequal length: {counts}"))
    if not lists:
        problems.append(Problem(where, "an empty group"))
    if bad or not lists or len(set(lengths.values())) > 1:
        return []
    rows = tuple(zip(*lists.values(), strict=True))
    names = tuple(",".join(shown(key, value) for key, value in zip(lists, row, strict=True)) for row in rows)
    return [Axis(tuple(lists), rows, names, _when(group.get("when"), where, problems), None, where)]


def _when(raw: Any, where: str, problems: list[Problem]) -> dict[str, tuple[Any, ...]]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping) or not raw:
        problems.append(Problem(f"{where}.when", f"got {raw!r}, expected a mapping from keys to a value or a list"))
        return {}
    return {str(key): tuple(value) if isinstance(value, list) else (value,) for key, value in raw.items()}


def shown(key: str, value: Any) -> str:
    """A value in the name of a setting: a plug-in by its name, anything else with its key.

    >>> shown("strategy", {"name": "dkvb", "decoder": "votes"}), shown("train.epochs", 3), shown("strategy", "naive")
    ('dkvb,decoder=votes', 'epochs=3', 'naive')
    """
    if key in ("strategy", "model", "tasks", "engine"):
        if isinstance(value, Mapping):
            first = next((value[k] for k in ("name", "source") if k in value), key)
            rest = {k: v for k, v in value.items() if k not in ("name", "source")}
            return ",".join([str(first), *(shown(k, v) for k, v in rest.items())])
        return str(value)
    last = key.rpartition(".")[2]
    if isinstance(value, Mapping):
        return ",".join(shown(f"{k}", v) for k, v in value.items()) or last
    return str(value) if last in ("name", "source") else f"{last}={_plain(value)}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(_plain(v) for v in value)
    if isinstance(value, str):
        return value
    return json.dumps(value)


def settings(content: Mapping[str, Any], axes: Sequence[Axis]) -> Iterator[Setting]:
    """All settings, the last axis changing fastest; an axis whose condition does not hold is left out of a setting.

    Args:
        content: the configuration that is varied, as plain data, interpolations and all.
        axes: in the order in which their values are set.
    """
    names = [axis.names if len(axis.values) > 1 or len(axes) == 1 else None for axis in axes]

    def walk(at: int, values: dict[str, Any], parts: list[str]) -> Iterator[Setting]:
        if at == len(axes):
            yield Setting(",".join(parts) or "base", values)
            return
        axis = axes[at]
        if not holds(axis, content, values):
            yield from walk(at + 1, values, parts)
            return
        for i, row in enumerate(axis.values):
            chosen = names[at]
            added = [] if chosen is None else [chosen[i]]
            yield from walk(at + 1, {**values, **dict(zip(axis.keys, row, strict=True))}, [*parts, *added])

    yield from walk(0, {}, [])


def holds(axis: Axis, content: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether an axis is part of a setting in which ``values`` are set; what a plug-in lacks equals nothing."""
    if not axis.when:
        return True
    composed = resolve.merge(content, (), values=values)
    for key, wanted in axis.when.items():
        try:
            if resolve.lookup(composed, key) not in wanted:
                return False
        except KeyError:
            return False
    return True


def most(axes: Sequence[Axis], repeats: int) -> int:
    """An upper bound of the number of runs, conditions left aside."""
    return math.prod(len(axis.values) for axis in axes) * repeats
