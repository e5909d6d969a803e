"""From a RunConfig to the objects it names: tasks, model, strategy, engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from clkit.config import ModelConfig, Plugin, RunConfig
from clkit.engine import ENGINES
from clkit.errors import CapabilityError, ConfigError
from clkit.models import load_model, wrap
from clkit.registry import STRATEGIES
from clkit.resolve import validate
from clkit.rng import fresh_generator
from clkit.tasks import build_tasks
from clkit.tasks.base import LabelledExamples, Task, TaskSequence, TextExamples

if TYPE_CHECKING:
    from clkit.engine.base import Engine
    from clkit.models.base import Model
    from clkit.strategy import Strategy


def make_tasks(config: RunConfig) -> TaskSequence:
    """Read or generate the tasks; a DataError lists everything that is wrong with them."""
    return build_tasks(config.tasks.name, config.tasks.config, config.seed)


def whole(tasks: TaskSequence) -> list[Task]:
    """Text tasks in which every record is scored, also those that would be trained on.

    Raises:
        CapabilityError: a task is of another kind.
    """
    found = []
    for task in tasks:
        if not isinstance(task.train, TextExamples) or not isinstance(task.eval, TextExamples):
            raise CapabilityError("only text files can be scored as a whole; give files with `prompt` and `answer`")
        found.append(dataclasses.replace(task, eval=TextExamples(task.train.records + task.eval.records)))
    return found


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


def make_model(config: ModelConfig, tasks: TaskSequence, seed: int, say: Callable[[str], None]) -> Model:
    """Load the model; classification gets a head over all classes of the sequence."""
    classes = tasks.num_classes if any(t.kind == "classification" for t in tasks) else None
    return load_model(
        config, num_classes=classes, input_shape=input_shape(tasks), generator=fresh_generator(seed, "model"), say=say
    )


def coerce(model: Any, strategy: Any, config: Any) -> tuple[Model, Strategy, RunConfig]:
    """What a user gives the trainer in Python, as the objects that it works with.

    Raises:
        ConfigError: a strategy's name or a section of the configuration is wrong.
    """
    if not isinstance(config, RunConfig):
        config = validate({"tasks": "facts", **(config or {})}, origin="SequentialTrainer")
    if isinstance(strategy, str):
        plugin = validate({"strategy": strategy}, origin="SequentialTrainer").strategy
        config = dataclasses.replace(config, strategy=plugin)
        strategy = make_strategy(plugin)
    if isinstance(model, torch.nn.Module):
        model = wrap(model)
    return model, strategy, config


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
        raise ConfigError(
            f"model.name: '{model.name}' can't learn tasks of kind {', '.join(wrong)} "
            f"(it reads {', '.join(sorted(model.kinds))})"
        )
