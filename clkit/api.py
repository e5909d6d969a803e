"""The Python entry points: ``fit``, ``run``, ``compare`` and ``open_run``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clkit import build, resolve
from clkit.config import RunConfig
from clkit.errors import CheckpointError, ConfigError
from clkit.progress import Progress
from clkit.provenance import collect
from clkit.result import RunResult
from clkit.rundir import RunDirectory
from clkit.tasks.base import TaskSequence
from clkit.trainer import SequentialTrainer


def fit(
    model: str = "smollm2-135m",
    tasks: Sequence[str | Path] | Mapping[str, Any] | TaskSequence = (),
    strategy: str | Mapping[str, Any] = "naive",
    output_dir: str | Path = "runs/run",
    *,
    fresh: bool = False,
    **overrides: Any,
) -> RunResult:
    """Learn a sequence of tasks: the whole job in one call. The same call again resumes, or returns the result.

    Args:
        model: alias, hub id, directory, ``.gguf`` file or built-in architecture.
        tasks: data files (JSONL, CSV, parquet), a ``tasks`` section as a mapping, or a TaskSequence.
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
    content: dict[str, Any] = {
        "model": {"name": model},
        "strategy": strategy,
        "output_dir": str(output_dir),
        "name": Path(output_dir).name,
    }
    given = None
    if isinstance(tasks, TaskSequence):
        given = tasks
    elif isinstance(tasks, Mapping):
        content["tasks"] = dict(tasks)
    else:
        content["tasks"] = {"source": "jsonl", "tasks": [str(t) for t in tasks]}
    for key, value in overrides.items():
        _put(content, key.split("."), value)
    return run(resolve.validate(content, origin="clkit.fit"), tasks=given, fresh=fresh)


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
    config: RunConfig, *, tasks: TaskSequence | None = None, fresh: bool = False, progress: Progress | None = None
) -> RunResult:
    """Do one run, resume it, or return its result when it is finished."""
    progress = progress or Progress(enabled=False)
    tasks = tasks or build.make_tasks(config)
    strategy = build.make_strategy(config.strategy)
    build.check_capabilities(config.strategy.name, strategy.capabilities, tasks)
    directory = RunDirectory(config.output_dir, config.checkpoint.keep)
    with directory.locked():
        if fresh:
            directory.clear()
        directory.begin(resolve.to_dict(config), collect(tasks))
        if directory.finished:
            progress.say(f"{directory.path}: already finished; here is its result (--fresh starts again)")
            return RunResult.load(directory.path)
        with directory.recording_failure():
            model = build.make_model(config.model, tasks, config.seed, progress.say)
            build.check_model_kind(model, tasks)
            engine = build.make_engine(config.engine)
            return SequentialTrainer(
                model, strategy, config, engine=engine, directory=directory, progress=progress
            ).fit(tasks)


def expand(config: RunConfig, content: Mapping[str, Any]) -> list[RunConfig]:
    """The runs of a configuration: itself, or one for each entry of ``compare``, each in a directory of its own.

    Raises:
        ConfigError: an entry is not valid, or two entries would share a directory.
    """
    if not config.compare:
        return [config]
    base = {k: v for k, v in content.items() if k != "compare"}
    names = ["-".join(o.partition("=")[2].replace("/", "_") for o in overrides) for overrides in config.compare]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"compare: two entries would share a run directory ({', '.join(sorted(names))}); make their values differ"
        )
    runs = []
    for name, overrides in zip(names, config.compare, strict=True):
        varied = resolve.merge(base, overrides)
        varied |= {"name": name, "output_dir": str(Path(config.output_dir) / name)}
        runs.append(resolve.validate(varied, origin=f"compare[{name}]"))
    return runs


@contextmanager
def open_run(run_dir: str | Path, tasks: TaskSequence | None = None) -> Iterator[SequentialTrainer]:
    """A run as its newest checkpoint left it: model, strategy and tasks, ready to score or export.

    Args:
        run_dir: a run directory.
        tasks: the sequence it learned, when that was made in Python rather than by a configuration.

    Raises:
        CheckpointError: no run, or no checkpoint, in ``run_dir``.
    """
    path = Path(run_dir)
    if not (path / "config.yaml").is_file():
        raise CheckpointError(f"{path}: no run here (config.yaml is missing). Give the output_dir of a run.")
    config = resolve.load(path / "config.yaml")
    config = dataclasses.replace(config, output_dir=str(path))
    tasks = tasks or build.make_tasks(config)
    directory = RunDirectory(path, config.checkpoint.keep)
    with directory.locked():
        directory.begin(resolve.to_dict(config), collect(tasks))
        model = build.make_model(config.model, tasks, config.seed, lambda text: None)
        trainer = SequentialTrainer(
            model, build.make_strategy(config.strategy), config, engine=build.make_engine(config.engine)
        )
        trainer.directory = directory
        if not trainer.prepare(tasks):
            raise CheckpointError(f"{path}: no checkpoint yet. Run the same command again to go on.")
        yield trainer
