"""The Python entry points: ``fit``, ``run`` and ``open_run``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from clkit import build, resolve
from clkit.config import ModelConfig, RunConfig
from clkit.engine import launch
from clkit.errors import CapabilityError, CheckpointError, ClkitError, ConfigError, Problem
from clkit.models import wrap
from clkit.models.base import Model
from clkit.models.precision import DTYPES
from clkit.progress import Progress
from clkit.provenance import collect
from clkit.registry import STRATEGIES
from clkit.result import RunResult
from clkit.rundir import RunDirectory, run_directory
from clkit.strategy import Strategy
from clkit.tasks.base import TaskSequence
from clkit.trainer import SequentialTrainer
from clkit.unlearning.tombstones import in_force

# `section=name` replaces these sections whole (clkit.resolve.merge).
_WHOLE = frozenset({"model", "tasks", "strategy", "engine"})


def fit(
    model: str | Path | Model | nn.Module = "smollm2-135m",
    tasks: str | Path | Sequence[str | Path] | Mapping[str, Any] | TaskSequence = (),
    strategy: str | Mapping[str, Any] = "naive",
    output_dir: str | Path = "runs/run",
    *,
    fresh: bool = False,
    **overrides: Any,
) -> RunResult:
    """Learn a sequence of tasks: the whole job in one call. The same call again resumes, or returns the result.

    Args:
        model: alias, hub id, directory, ``.gguf`` file or built-in architecture; or a model made in Python (a module
            from tensors to logits, or what ``clkit.models.wrap`` gives), which is trained in place.
        tasks: one data file or several (JSONL, CSV, parquet), a ``tasks`` section as a mapping, or a TaskSequence.
        strategy: a name, or a ``strategy`` section as a mapping.
        output_dir: the run directory.
        fresh: delete an earlier run in ``output_dir`` first.
        **overrides: further sections (``train={"epochs": 3}``) or dotted keys (``**{"train.epochs": 3}``).

    Raises:
        ConfigError, DataError, ModelError, CapabilityError: found before training, all problems at once.

    Example:
        >>> result = clkit.fit(tasks=["law.jsonl", "medicine.jsonl"], strategy="replay")  # doctest: +SKIP
        >>> result.metrics["forgetting"]  # doctest: +SKIP
    """
    content: dict[str, Any] = {"strategy": strategy, "output_dir": str(output_dir), "name": Path(output_dir).name}
    made = model if isinstance(model, (Model, nn.Module)) else None
    if isinstance(model, (str, Path)):
        content["model"] = {"name": str(model)}
    elif made is None:
        raise ConfigError(f"model: got {type(model).__name__}, expected a name, a directory, a Model or an nn.Module")
    given = tasks if isinstance(tasks, TaskSequence) else None
    lost = _without_effect(overrides, made is not None, given is not None)
    if lost:
        raise ConfigError.collect("Options that would have no effect:", lost)
    if given is None:
        content["tasks"] = _tasks_section(tasks)
    for key, value in overrides.items():
        _put(content, key.split("."), value)
    return run(resolve.validate(content, origin="clkit.fit"), tasks=given, model=made, fresh=fresh)


def _without_effect(overrides: Mapping[str, Any], model: bool, tasks: bool) -> list[Problem]:
    """Options of a model or of tasks that were made in Python, and so are what they are."""
    problems = []
    for key in overrides:
        section = key.partition(".")[0]
        if section == "tasks" and tasks:
            problems.append(Problem(f"clkit.fit:{key}", "the tasks are given as a TaskSequence; make them so"))
        # The targets of LoRA are also where some methods put their own adapters.
        if section == "model" and model and not key.startswith("model.lora"):
            problems.append(Problem(f"clkit.fit:{key}", "the model is given as an object; make it so"))
    return problems


def _tasks_section(tasks: Any) -> dict[str, Any]:
    if isinstance(tasks, Mapping):
        return dict(tasks)
    files = [tasks] if isinstance(tasks, (str, Path)) else tasks
    if isinstance(files, Sequence) and not isinstance(files, bytes):
        wrong = sorted({type(f).__name__ for f in files if not isinstance(f, (str, Path))})
        if not wrong:
            return {"source": "jsonl", "tasks": [str(f) for f in files]}
        got = f"a {type(files).__name__} of {', '.join(wrong)}"
    else:
        got = type(files).__name__
    raise ConfigError(
        f"tasks: got {got}, expected a file, a list of files, a mapping (the `tasks` section) or a TaskSequence"
    )


def _put(content: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a dotted key; a mapping is merged into what is there."""
    *parents, last = path
    for key in parents:
        inner = content.get(key)
        if isinstance(inner, str):
            inner = {"name": inner}
        content[key] = inner = dict(inner or {})
        content = inner
    old = content.get(last)
    content[last] = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value


def run(
    config: RunConfig,
    *,
    tasks: TaskSequence | None = None,
    model: Model | nn.Module | None = None,
    strategy: Strategy | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Do one run, resume it, or return its result when it is finished.

    ``tasks``, ``model`` and ``strategy`` take the place of what the configuration names.

    Raises:
        ConfigError: the configuration has ``compare``, which is several runs (:func:`expand`); or as :func:`fit`.
    """
    if config.compare:
        raise ConfigError(
            "compare: stands for several runs, and this call does one. Use `clkit run`, or leave it empty."
        )
    progress = progress or Progress(enabled=False)
    config = build.located(config)
    made = {"tasks_from": tasks, "model_from": model, "strategy_from": strategy}
    forgotten = in_force(config.output_dir)
    given = build.make_tasks(config, tasks)
    tasks = forgotten.apply(given)
    if left_out := len(forgotten.places(given)):
        progress.say(f"{left_out} records are left out, because deletion requests took them out")
    strategy = strategy or build.make_strategy(config.strategy)
    directory = run_directory(config.output_dir, config.checkpoint.keep, launch.rank() == 0)
    finished = not fresh and directory.finished  # with --fresh what is damaged there does not matter
    engine = None if finished else build.check(config, tasks, strategy.capabilities)
    with directory.locked():
        if fresh:
            directory.clear()
        facts = collect(tasks) | {key: "python" for key, value in made.items() if value is not None}
        facts |= forgotten.facts()
        directory.begin(resolve.to_dict(config), facts)
        if engine is None:
            progress.say(f"{directory.path}: already finished; here is its result (--fresh starts again)")
            return RunResult.load(directory.path)
        engine.any(False)  # nobody reads the directory before the first process has put it in order
        with directory.recording_failure():
            if model is None:
                with engine.loading():
                    options = _as_begun(config.model, directory)
                    model = build.make_model(options, tasks, config.seed, progress.say, engine.device)
            elif isinstance(model, nn.Module):
                model = wrap(model)
            build.check_model_kind(model, tasks)
            return SequentialTrainer(
                model, strategy, config, engine=engine, directory=directory, progress=progress
            ).fit(tasks)


def _as_begun(model: ModelConfig, directory: RunDirectory) -> ModelConfig:
    """Options of a run's model with the type that ``dtype: auto`` meant when it began.

    Another machine, or a second measurement where no cache can be written, may find the other one faster.
    """
    begun = (directory.read("run.json") or {}).get("model")
    known = begun.get("computed_in") if isinstance(begun, dict) else None
    return dataclasses.replace(model, dtype=known) if model.dtype == "auto" and known in DTYPES else model


def check(configs: Sequence[RunConfig]) -> None:
    """Read the tasks of every run and check it as far as that goes without its weights.

    Raises:
        ClkitError: the one problem, or a ConfigError with the problems of all runs.
    """
    errors: dict[str, ClkitError] = {}
    for config in configs:
        try:
            tasks = in_force(config.output_dir).apply(build.make_tasks(config))
            build.check(config, tasks, STRATEGIES.get(config.strategy.name).capabilities)
        except ClkitError as error:
            errors[config.name] = error
    if len(errors) == 1 == len(configs):
        raise next(iter(errors.values()))
    if errors:
        found = [Problem(name, str(error).replace("\n", "\n  ")) for name, error in errors.items()]
        raise ConfigError.collect(f"{len(errors)} of {len(configs)} runs can't start:", found)


def expand(config: RunConfig, content: Mapping[str, Any], overrides: Sequence[str] = ()) -> list[RunConfig]:
    """The runs of a configuration: itself, or one for each entry of ``compare``, each in a directory of its own.

    Args:
        config: the validated configuration.
        content: the same as plain data; what an entry sets is put in the place of ``${...}`` that are still there.
        overrides: those of the command line, which ``content`` contains already.

    Raises:
        ConfigError: an entry is not valid, two entries would share a directory, or an override would have no effect.
    """
    if not config.compare:
        return [config]
    base = {k: v for k, v in content.items() if k != "compare"}
    names = ["-".join(o.partition("=")[2].replace("/", "_") for o in entry) for entry in config.compare]
    problems = [
        Problem(f"compare[{i}]", f"got {list(entry)}, which gives its run directory no name; list key=value overrides")
        for i, (name, entry) in enumerate(zip(names, config.compare, strict=True))
        if not name.strip("-. ")
    ]
    problems += [_lost(override, config.compare) for override in overrides if _setters(override, config.compare)]
    if problems:
        raise ConfigError.collect("The runs to compare are not usable:", problems)
    if len(set(names)) < len(names):
        raise ConfigError(
            f"compare: two entries would share a run directory ({', '.join(sorted(names))}); make their values differ"
        )
    runs, errors = [], []
    for name, entry in zip(names, config.compare, strict=True):
        try:
            varied = resolve.merge(base, entry)
            varied |= {"name": name, "output_dir": str(Path(config.output_dir) / name)}
            runs.append(resolve.validate(varied, origin=f"compare[{name}]"))
        except (ConfigError, CapabilityError) as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        found = [problem for error in errors for problem in error.problems or (Problem("", str(error)),)]
        raise ConfigError.collect(f"{len(errors)} of {len(names)} runs to compare are not usable:", found)
    return runs


def _setters(override: str, entries: Sequence[Sequence[str]]) -> int:
    """How many entries undo an override: they set the same key, or put another plug-in in the place of its section."""
    key = override.partition("=")[0]
    undoing = {key, key.partition(".")[0]} if key.partition(".")[0] in _WHOLE else {key}
    return sum(any(o.partition("=")[0] in undoing for o in entry) for entry in entries)


def _lost(override: str, entries: Sequence[Sequence[str]]) -> Problem:
    key, count = override.partition("=")[0], _setters(override, entries)
    which = "every entry" if count == len(entries) else f"{count} of {len(entries)} entries"
    section = key.partition(".")[0]
    return Problem(
        f"command line:{key}",
        f"{section if section in _WHOLE else key} is set by {which} of compare; add compare=[] to run one {section}",
    )


@contextmanager
def open_run(
    run_dir: str | Path, tasks: TaskSequence | None = None, model: Model | nn.Module | None = None
) -> Iterator[SequentialTrainer]:
    """A run as its newest checkpoint left it: model, strategy and tasks, ready to score or export.

    Args:
        run_dir: a run directory; nothing in it is changed.
        tasks: the sequence it learned, when that was made in Python rather than by a configuration.
        model: a new model like the one it trained, when that was made in Python.

    Raises:
        CheckpointError: no run, or no checkpoint, in ``run_dir``.
    """
    path = RunDirectory(run_dir).path
    if not (path / "config.yaml").is_file():
        raise CheckpointError(f"{path}: no run here (config.yaml is missing). Give the output_dir of a run.")
    directory = RunDirectory(path)
    facts = directory.read("run.json") or {}
    if tasks is None and facts.get("tasks_from") == "python":
        raise CheckpointError(f"{path}: this run's tasks were made in Python: give tasks= to open_run")
    if model is None and facts.get("model_from") == "python":
        raise CheckpointError(f"{path}: this run's model was made in Python: give model= to open_run")
    config = resolve.load(path / "config.yaml")
    config = dataclasses.replace(config, output_dir=str(path))
    # Its data as they were: what was forgotten after it began is still in what it learned.
    tasks = in_force(path, facts).apply(build.make_tasks(config, tasks))
    engine = build.make_engine(config.engine)
    with directory.locked(to_read=True):
        directory.begin(resolve.to_dict(config), collect(tasks))
        if model is None:
            with engine.loading():
                options = _as_begun(config.model, directory)
                model = build.make_model(options, tasks, config.seed, lambda text: None, engine.device)
        trainer = SequentialTrainer(model, build.make_strategy(config.strategy), config, engine=engine)
        trainer.directory = directory
        if not trainer.prepare(tasks, read_only=True):
            gone = f"its checkpoints are gone; what it exported is in {path / 'export'}. Make them with --fresh."
            how = gone if directory.finished else "no checkpoint yet. Run the same command again to go on."
            raise CheckpointError(f"{path}: {how}")
        yield trainer
