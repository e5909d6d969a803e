"""From a sweep's file to its runs: every problem found at once, before anything starts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clkit import build, resolve
from clkit.config import RunConfig
from clkit.errors import ClkitError, ConfigError, Problem
from clkit.provenance import fingerprints
from clkit.registry import STRATEGIES
from clkit.rundir import RunDirectory, fixed
from clkit.sweep import axes as axes_
from clkit.sweep.axes import Axis, Setting
from clkit.sweep.config import SweepConfig, cross_checks
from clkit.unlearning.tombstones import in_force

ASK_ABOVE = 500  # runs that nobody starts by mistake
_LONGEST = 120  # characters in the name of a directory
_AXES = "sweep.axes."
_SHORT = re.compile(r"^sweep\.launcher=([\w-]+)$")  # the name of a launcher, whose other options stay


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a sweep.

    Attributes:
        setting: what is varied, without the seed.
        seed: the run's.
        config: complete and valid; its ``output_dir`` is the run directory.
    """

    setting: Setting
    seed: int
    config: RunConfig

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.output_dir)

    def __str__(self) -> str:
        return f"{self.setting.name} seed {self.seed}"


@dataclass(frozen=True)
class Sweep:
    """A sweep, checked as far as that goes without data.

    Attributes:
        origin: the file it came from, for messages.
        content: the configuration that is varied, as plain data, interpolations and all.
        runs: in the order in which they start: all settings with one seed, then with the next. Empty for a search,
            which finds its settings itself.
    """

    origin: str
    name: str
    directory: Path
    content: Mapping[str, Any]
    options: SweepConfig
    axes: Sequence[Axis]
    seeds: Sequence[int]
    runs: Sequence[Run] = field(default=())


def load(path: str, overrides: Sequence[str] = (), *, small: bool = False, yes: bool = False) -> Sweep:
    """Read a sweep and make its runs.

    Args:
        path: a configuration with a `sweep` section.
        overrides: ``key=value``; those of `sweep` change the section, ``sweep.axes.KEY=[...]`` one axis.
        small: apply `sweep.small` first.
        yes: more than 500 runs are meant.

    Raises:
        ConfigError: one error with all problems.
    """
    content = resolve.read_file(resolve.find(path))
    if not isinstance(content.get("sweep"), dict):
        raise ConfigError(f"{path}: has no `sweep` section, so there is one run of it: start it with `clkit run`")
    changes = [*_small(content["sweep"], path), *overrides] if small else list(overrides)
    raw = {"seed": RunConfig().seed, **_apply(content, changes)}  # written out: ${seed} stands for each run's own
    section = resolve.merge(raw, (), origin=path)["sweep"]
    base = {k: v for k, v in raw.items() if k != "sweep"}
    problems: list[Problem] = []
    found = axes_.parse(section, problems)
    own = {k: v for k, v in section.items() if k not in ("axes", "zip", "seeds")}
    options = resolve.section(SweepConfig, own, "sweep.", problems)
    problems += cross_checks(options)
    plain = resolve.merge(base, (), origin=path)
    chosen = axes_.seeds(section, plain["seed"], problems)
    problems += [_undone(o, axis) for o in overrides for axis in found if _undoes(axis, o.partition("=")[0])]
    if "seeds" in section and any(o.startswith("seed=") for o in overrides):
        problems.append(Problem("sweep.seeds", "takes the place of `seed`; change sweep.seeds"))
    if plain.get("compare"):
        problems.append(Problem("compare", "a sweep has axes; make an axis of what is compared, or delete one of both"))
    if problems:
        raise ConfigError.collect("The sweep is not usable:", [Problem(f"{path}:{p.where}", p.what) for p in problems])
    directory = Path(str(plain.get("output_dir", RunConfig().output_dir))).expanduser()
    sweep = Sweep(path, str(plain.get("name", directory.name)), directory, base, options, found, chosen)
    if options.search.trials:
        return sweep
    expanded = _expand(sweep, yes)
    return Sweep(path, sweep.name, directory, base, options, found, chosen, make_runs(sweep, expanded))


def _small(section: Mapping[str, Any], path: str) -> list[str]:
    found = section.get("small")
    if not isinstance(found, list) or not all(isinstance(o, str) for o in found) or not found:
        raise ConfigError(f"{path}:sweep.small: --small needs a list of key=value overrides here (got {found!r})")
    return found


def _apply(content: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Overrides put in; ``sweep.axes.a.b=[...]`` is about the key `a.b`, which no dotted path would find."""
    axes, problems = dict(content["sweep"].get("axes") or {}), []
    for change in changes:
        key, _, text = change.partition("=")
        if key.startswith(_AXES):
            try:
                axes[key.removeprefix(_AXES)] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                problems.append(Problem(f"command line:{key}", f"not valid YAML ({str(error).splitlines()[0]})"))
    if problems:
        raise ConfigError.collect("The overrides are not usable:", problems)
    section = {**content["sweep"], "axes": axes}
    if isinstance(section.get("launcher"), str):
        section["launcher"] = {"name": section["launcher"]}
    rest = [_SHORT.sub(r"sweep.launcher.name=\1", c) for c in changes if not c.startswith(_AXES)]
    return resolve.merge({**content, "sweep": section}, rest, interpolate=False)


def _undoes(axis: Axis, key: str) -> bool:
    """Whether an axis sets a key again: the same one, the whole section that it is in, or by a mapping with it."""
    section = key.partition(".")[0]
    if key in axis.keys or (section in axis.keys and section in ("model", "tasks", "strategy", "engine")):
        return True
    parts = [
        (i, key.removeprefix(f"{own}.").split(".")) for i, own in enumerate(axis.keys) if key.startswith(f"{own}.")
    ]
    return any(_within(row[i], path) for i, path in parts for row in axis.values)


def _within(value: Any, path: Sequence[str]) -> bool:
    """Whether plain data set what stands at a path, or something above it."""
    for part in path:
        if not isinstance(value, Mapping):
            return True
        if part not in value:
            return False
        value = value[part]
    return True


def _undone(override: str, axis: Axis) -> Problem:
    key = override.partition("=")[0]
    return Problem(axis.where, f"sets what the override {override!r} sets too; change the axis ({_AXES}{key}=[...])")


def _expand(sweep: Sweep, yes: bool) -> list[Setting]:
    """All settings; what is wrong with conditions is an error, and so are very many runs."""
    found = []
    for setting in axes_.settings(sweep.content, sweep.axes):
        found.append(setting)
        if len(found) * len(sweep.seeds) > ASK_ABOVE and not yes:
            many = axes_.most(sweep.axes, len(sweep.seeds))
            raise ConfigError(
                f"{sweep.origin}:sweep: more than {ASK_ABOVE} runs (up to {many:,}); add --yes if they are meant"
            )
    problems = []
    for axis in sweep.axes:
        for key in axis.when:
            if not any(_known(key, sweep, setting) for setting in found):
                problems.append(Problem(f"{sweep.origin}:{axis.where}.when", f"'{key}' is no option of any setting"))
    if problems:
        raise ConfigError.collect("The sweep is not usable:", problems)
    return found


def _known(key: str, sweep: Sweep, setting: Setting) -> bool:
    try:
        resolve.lookup(resolve.merge(sweep.content, (), values=setting.values), key)
    except KeyError:
        return False
    return True


def make_runs(sweep: Sweep, settings: Sequence[Setting]) -> list[Run]:
    """A valid run for each setting and seed.

    Raises:
        ConfigError: all that is wrong with any of them, and directories that two settings would share.
    """
    swept = {key: axis.where for axis in sweep.axes for key in axis.keys}
    found: list[Run] = []
    problems: dict[Problem, list[str]] = {}
    total = len(settings) * len(sweep.seeds)
    for seed in sweep.seeds:
        for setting in settings:
            directory = sweep.directory / folder_name(setting.name) / f"seed-{seed}"
            values = {**setting.values, "seed": seed, "name": f"{setting.name}-{seed}", "output_dir": str(directory)}
            try:
                config = resolve.validate(resolve.merge(sweep.content, (), values=values), origin="")
                found.append(Run(setting, seed, config))
            except ClkitError as error:
                for problem in error.problems or [Problem("", str(error))]:
                    key = problem.where.removeprefix(":")
                    where = next((place for k, place in swept.items() if _about(k, key, setting)), "")
                    what = problem.what if not where or key in swept else f"{key}: {problem.what}"
                    located = Problem(f"{sweep.origin}:{where or key}", what)
                    problems.setdefault(located, []).append(f"{setting.name} seed {seed}")
    listed = [_in_runs(problem, names, total) for problem, names in problems.items()]
    listed += [Problem(f"{sweep.origin}:sweep", text) for text in _collisions(settings, found)]
    if listed:
        raise ConfigError.collect(f"The sweep has {len(listed)} problem{'s' if len(listed) > 1 else ''}:", listed)
    return found


def _about(axis_key: str, key: str, setting: Setting) -> bool:
    """Whether a problem with ``key`` comes from what the axis sets at ``axis_key``."""
    if isinstance(setting.values.get(axis_key), Mapping):
        return key.startswith(f"{axis_key}.")
    return key in (axis_key, f"{axis_key}.name", f"{axis_key}.source")


def _in_runs(problem: Problem, names: Sequence[str], total: int) -> Problem:
    if len(names) == total:
        return problem
    shown = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    return Problem(problem.where, f"{problem.what} (in {shown})")


def _collisions(settings: Sequence[Setting], runs: Sequence[Run]) -> list[str]:
    by_folder: dict[str, list[Setting]] = {}
    for setting in settings:
        by_folder.setdefault(folder_name(setting.name).casefold(), []).append(setting)  # some disks ignore case
    found = [
        f"settings {' and '.join(str(dict(s.values)) for s in same[:3])} would share the directory "
        f"'{folder_name(same[0].name)}'; name their values (`values: {{name: value}}`) or delete one"
        for same in by_folder.values()
        if len(same) > 1
    ]
    clashing = {s.name for same in by_folder.values() if len(same) > 1 for s in same}
    by_content: dict[str, Run] = {}
    for run in runs:
        if run.setting.name in clashing:
            continue
        other = by_content.setdefault(_digest(fixed(resolve.to_dict(run.config))), run)
        if other is not run:
            found.append(f"'{other}' and '{run}' are the same run; delete one")
    return found


def folder_name(setting: str) -> str:
    """A setting's name as the name of a directory on any disk."""
    name = re.sub(r"[^A-Za-z0-9._,=+-]+", "_", setting).strip(". ") or "_"
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 9]}-{hashlib.sha256(setting.encode()).hexdigest()[:8]}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def content_hash(config: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """A hash of what decides a run's numbers: its resolved configuration and its data."""
    return _digest([fixed(config), data])[:16]


def check(runs: Sequence[Run], origin: str) -> dict[Run, str]:
    """Read the data of every run once, and check it as far as that goes without weights.

    Returns:
        The content hash of each run.

    Raises:
        ConfigError: runs that can't start, or whose directory holds another run; all of them at once.
    """
    hashes: dict[Run, str] = {}
    errors: dict[str, list[str]] = {}
    groups: dict[str, list[Run]] = {}
    for run in runs:
        plain = resolve.to_dict(run.config)["tasks"]
        groups.setdefault(_digest([plain, run.config.seed]), []).append(run)
    for group in groups.values():
        try:
            given = build.make_tasks(group[0].config)
            prints: dict[str, dict[str, Any]] = {}
            for run in group:
                tombstones = in_force(run.directory)
                tasks = tombstones.apply(given)
                forgotten = f"{tombstones.facts()}"
                if forgotten not in prints:
                    prints[forgotten] = fingerprints(tasks)
                data = prints[forgotten]
                plain = resolve.to_dict(build.located(run.config))
                try:
                    if changed := RunDirectory(run.directory).differences(plain, data):
                        raise ConfigError(
                            f"holds a run with another configuration or other data ({'; '.join(changed[:3])}); choose "
                            "another output_dir, or delete it"
                        )
                    build.check(run.config, tasks, STRATEGIES.get(run.config.strategy.name).capabilities)
                except ClkitError as error:
                    errors.setdefault(str(error), []).append(str(run))
                hashes[run] = content_hash(plain, data)
        except ClkitError as error:
            errors.setdefault(str(error), []).extend(map(str, group))
    if errors:
        listed = [
            _in_runs(Problem(origin, text.replace("\n", "\n  ")), names, len(runs)) for text, names in errors.items()
        ]
        raise ConfigError.collect("The sweep can't start:", listed)
    return hashes
