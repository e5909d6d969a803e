"""From a RunConfig to the objects it names: tasks, model, strategy, engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch

from clkit import tracking
from clkit.config import EvalConfig, ModelConfig, Plugin, RunConfig
from clkit.engine import ENGINES, launch
from clkit.errors import CapabilityError, ClkitError, ConfigError, DataError, ModelError, Problem
from clkit.evaluation import SCORERS
from clkit.models import load_model, wrap
from clkit.models.own_module import ModuleClassifier
from clkit.models.resolve import resolve
from clkit.registry import STRATEGIES
from clkit.resolve import validate
from clkit.rng import fresh_generator
from clkit.tasks import build_tasks
from clkit.tasks.base import LabelledExamples, Task, TaskSequence, TextExamples
from clkit.tasks.harness import holdout_tasks

if TYPE_CHECKING:
    from clkit.engine.base import Engine
    from clkit.models.base import Model
    from clkit.strategy import Strategy


def make_tasks(config: RunConfig, tasks: TaskSequence | None = None) -> TaskSequence:
    """Read or generate the tasks, or take those given; `eval.lm_eval` adds its holdout tasks to either.

    A DataError lists everything that is wrong with them.
    """
    tasks = tasks or build_tasks(config.tasks.name, config.tasks.config, config.seed)
    if not config.eval.lm_eval:
        return tasks
    general, files = holdout_tasks(config.eval.lm_eval, config.eval.lm_eval_limit)
    return TaskSequence(tasks.tasks, [*tasks.holdout, *general], tasks.scenario, [*tasks.files, *files])


def make_strategy(plugin: Plugin) -> Strategy:
    """A fresh strategy object."""
    strategy: Strategy = STRATEGIES.get(plugin.name)(plugin.config)
    return strategy


def make_engine(plugin: Plugin) -> Engine:
    """The engine."""
    return ENGINES.get(plugin.name)(plugin.config)


def input_shape(tasks: TaskSequence) -> tuple[int, ...] | None:
    """Shape of one input of a classification sequence; None for text."""
    first = tasks[0].train if len(tasks[0].train) else tasks[0].eval
    if not isinstance(first, LabelledExamples) or isinstance(first.inputs, tuple):
        return None
    row: torch.Tensor = first.inputs[torch.tensor([0])]
    return tuple(row.shape[1:])


def num_classes(tasks: TaskSequence) -> int | None:
    """How many classes a classifier of the sequence tells apart; None where a language model learns it."""
    return tasks.num_classes if any(t.kind == "classification" for t in tasks) else None


def make_model(
    config: ModelConfig,
    tasks: TaskSequence,
    seed: int,
    say: Callable[[str], None],
    device: torch.device | None = None,
) -> Model:
    """Load the model; classification gets a head over all classes of the sequence.

    ``device`` is the engine's, which decides ``dtype: auto``; None = a GPU when there is one.
    """
    return load_model(
        config,
        num_classes=num_classes(tasks),
        input_shape=input_shape(tasks),
        generator=fresh_generator(seed, "model"),
        device=device,
        say=say,
    )


def located(config: RunConfig) -> RunConfig:
    """The same configuration with the paths of data and model made absolute: it means the same in every directory."""
    model, options = config.model, config.tasks.config
    if resolve(model.name).form in ("directory", "gguf"):
        model = dataclasses.replace(model, name=str(Path(model.name).expanduser().resolve()))
    if getattr(options, "root", None):
        root = Path(options.root).expanduser()
        listed = {k: v for k in ("tasks", "holdout") if isinstance(v := getattr(options, k, None), list)}
        if listed:  # the entries alone say where the data is
            paths = {k: [_absolute(root / Path(entry).expanduser()) for entry in v] for k, v in listed.items()}
            options = dataclasses.replace(options, root=".", **paths)
        else:
            options = dataclasses.replace(options, root=_absolute(root))
    if data_sets := getattr(options, "datasets", None):  # directories, or names on the hub
        local = {entry: path for entry in data_sets if (path := Path(entry).expanduser()).is_dir()}
        found = [_absolute(local[entry]) if entry in local else entry for entry in data_sets]
        options = dataclasses.replace(options, datasets=found)
    strategy = Plugin(config.strategy.name, _located_fields(config.strategy.config))
    harness = [_absolute(Path(entry).expanduser()) for entry in config.eval.lm_eval]
    return dataclasses.replace(
        config,
        model=model,
        tasks=Plugin(config.tasks.name, options),
        strategy=strategy,
        eval=dataclasses.replace(config.eval, lm_eval=harness),
    )


def _located_fields(options: Any) -> Any:
    """A strategy's options with those made absolute that name a file or folder."""
    if not dataclasses.is_dataclass(options) or isinstance(options, type):
        return options
    named = [f.name for f in dataclasses.fields(options) if f.metadata.get("path") and getattr(options, f.name)]
    return dataclasses.replace(options, **{n: _absolute(Path(getattr(options, n)).expanduser()) for n in named})


def _absolute(path: Path) -> str:
    """The path from the root; a link keeps its own name, because tasks are called after their files."""
    return str(path.parent.resolve() / path.name)


def stage_steps(config: RunConfig, tasks: TaskSequence) -> list[int]:
    """Optimiser steps of each stage, by what the strategy trains on there; 0 for a stage that it skips."""
    strategy = _before_the_run(config, tasks)
    return [strategy.stage_steps(stage) for stage in range(len(tasks))]


def _before_the_run(config: RunConfig, tasks: TaskSequence) -> Strategy:
    """The strategy as it can answer before there is a model."""
    strategy = make_strategy(config.strategy)
    strategy.run = cast(Any, SimpleNamespace(tasks=tasks, config=config))
    return strategy


def check(config: RunConfig, tasks: TaskSequence, capabilities: Any) -> Engine:
    """Everything that can be known to be wrong with a run before its weights are loaded.

    Args:
        config: the run.
        tasks: its tasks.
        capabilities: its strategy's.

    Returns:
        The engine, which had to be made to be checked.

    Raises:
        ConfigError, CapabilityError, DataError, ModelError: as what the problems are; a ConfigError where they differ.
    """
    errors: list[ClkitError] = []
    engine: Engine | None = None
    try:
        check_capabilities(config.strategy.name, capabilities, tasks)
    except CapabilityError as error:
        errors.append(error)
    errors += _alone_among_many(config)
    errors += ENGINES.get(config.engine.name).refuse(config, capabilities)
    errors += _metric_errors(tasks, config.eval.also)
    errors += [ConfigError(str(p)) for p in tracking.problems(config.tracking.to)]
    try:
        _check_size(config.model, tasks)
    except ModelError as error:
        errors.append(error)
    shape = input_shape(tasks)
    if config.train.augment != "none" and (shape is None or len(shape) != 3):
        got = "texts" if shape is None else f"inputs of shape {shape}"
        errors.append(CapabilityError(f"train.augment: '{config.train.augment}' needs images, and these are {got}"))
    elif config.train.augment != "none" and config.model.freeze_backbone:
        errors.append(
            CapabilityError(
                "train.augment: features of a frozen backbone (model.freeze_backbone) are computed once, from images "
                "as they are; drop one"
            )
        )
    try:
        engine = make_engine(config.engine)
        if not errors:
            planned = _before_the_run(config, tasks)
            planned.admit()
            engine.admit(planned)
    except ClkitError as error:
        errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors or engine is None:
        title = f"Run '{config.name}' can't start; it has {len(errors)} problems:"
        kinds = {type(error) for error in errors}
        kind = kinds.pop() if len(kinds) == 1 else ConfigError
        raise kind.collect(title, [Problem("", str(e).replace("\n", "\n  ")) for e in errors])
    return engine


def _metric_errors(tasks: TaskSequence, also: Sequence[str]) -> list[ClkitError]:
    """Metrics that are unknown, do not score the kind of their task, or lack something in its records."""
    errors: dict[str, ClkitError] = {}  # by message: a metric that is unknown in every task is one problem
    for task in (*tasks, *tasks.holdout):
        for metric in dict.fromkeys([task.metric, *also]):
            try:
                _check_metric(task, metric)
            except (ConfigError, CapabilityError, DataError) as error:
                errors.setdefault(str(error), error)
    return list(errors.values())


def _check_metric(task: Task, metric: str) -> None:
    from clkit.evaluation.base import Scoring
    from clkit.evaluation.generation import TolerantMatch
    from clkit.evaluation.harness import HarnessAcc
    from clkit.evaluation.options import OptionLogLikelihood

    if metric not in SCORERS:
        raise ConfigError(f"tasks.metric: {SCORERS.unknown(metric)}")
    scorer = SCORERS.get(metric)()
    if task.kind not in scorer.kinds:
        raise CapabilityError(
            f"task '{task.name}': metric '{metric}' scores {' and '.join(sorted(scorer.kinds))} tasks, "
            f"and this is of kind {task.kind}; set another metric for it"
        )
    if not len(task.eval):
        raise DataError(f"task '{task.name}' has no evaluation examples to score with '{metric}'")
    if isinstance(scorer, OptionLogLikelihood | TolerantMatch | HarnessAcc) and isinstance(task.eval, TextExamples):
        # The metric's own check, with every option taken to have tokens: those are known once there is a tokeniser.
        records = cast(Any, SimpleNamespace(records=task.eval.records, option_ids=lambda i: [[0]]))
        model = cast(Any, SimpleNamespace(generate=None))  # that it writes text follows from the kind of the tasks
        scorer.check(Scoring(model, task, records, EvalConfig()))


def _check_size(config: ModelConfig, tasks: TaskSequence) -> None:
    from clkit.models.sizes import too_large

    if why := too_large(config, num_classes(tasks), input_shape(tasks)):
        raise ModelError(why)


def coerce(model: Any, strategy: Any, config: Any) -> tuple[Model, Strategy, RunConfig]:
    """What a user gives the trainer in Python, as the objects that it works with.

    Raises:
        ConfigError: a strategy's name or a section of the configuration is wrong.
    """
    sections = not isinstance(config, RunConfig)
    if sections:
        config = validate({"tasks": "facts", **(config or {})}, origin="SequentialTrainer")
    if isinstance(strategy, str):
        plugin = validate({"strategy": strategy}, origin="SequentialTrainer").strategy
        config = dataclasses.replace(config, strategy=plugin)
        strategy = make_strategy(plugin)
    elif (names := STRATEGIES.names_of(type(strategy))) and (sections or config.strategy.name not in names):
        # So that a resume, ``open_run`` and the model card know what learned.
        config = dataclasses.replace(config, strategy=Plugin(names[0], strategy.config))
    if isinstance(model, torch.nn.Module):
        model = wrap(model)
    return model, strategy, config


def _alone_among_many(config: RunConfig) -> list[ClkitError]:
    """An engine for one process, in one of several that a launcher started: only the first would keep its run."""
    if not launch.running() or launch.world() == 1 or ENGINES.get(config.engine.name).several:
        return []
    return [
        ConfigError(
            f"engine.name: '{config.engine.name}' is for a single process, and the launcher started {launch.world()} "
            "(RANK and WORLD_SIZE are set); take engine=deepspeed (or private), or start one process"
        )
    ]


def check_capabilities(name: str, capabilities: Any, tasks: TaskSequence) -> None:
    """Refuse tasks that the strategy can't learn, before weights are loaded.

    Raises:
        CapabilityError: a task's kind, or a task id at test that this sequence does not give.
    """
    wrong = sorted({t.kind for t in tasks} - set(capabilities.kinds))
    if wrong:
        raise CapabilityError(
            f"Strategy '{name}' can't learn tasks of kind {', '.join(wrong)}; "
            f"it learns {', '.join(sorted(capabilities.kinds))}."
        )
    if capabilities.needs_task_id and tasks.scenario != "task":
        raise CapabilityError(
            f"Strategy '{name}' must know the task at test: use tasks.scenario=task (got {tasks.scenario})."
        )


def check_model_kind(model: Model, tasks: TaskSequence) -> None:
    """Refuse a model that can't read the tasks."""
    wrong = sorted({t.kind for t in (*tasks, *tasks.holdout)} - set(model.kinds))
    if wrong:
        advice = ""
        if isinstance(model, ModuleClassifier):
            advice = "; a transformers language model comes with its tokenizer: clkit.models.wrap(module, tokenizer)"
        raise ConfigError(
            f"model.name: '{model.name}' can't learn tasks of kind {', '.join(wrong)} "
            f"(it reads {', '.join(sorted(model.kinds))}){advice}"
        )
