"""What a run would do, worked out without loading weights."""

from __future__ import annotations

from clkit import build
from clkit.config import RunConfig
from clkit.loader import steps_in_stage
from clkit.models import estimate
from clkit.registry import STRATEGIES
from clkit.tasks.base import TaskSequence

_ADAM_BYTES = 8
_SGD_BYTES = 4
_GRADIENT_BYTES = 4


def describe(config: RunConfig) -> str:
    """Tasks with sizes and steps, trainable parameters, memory, and where the run goes.

    Raises:
        DataError, CapabilityError: what a run would raise before it loads weights.
    """
    tasks = build.make_tasks(config)
    build.check_capabilities(config.strategy.name, STRATEGIES.get(config.strategy.name).capabilities, tasks)
    lines = [f"{config.name}: strategy {config.strategy.name}, engine {config.engine.name}, into {config.output_dir}"]
    width = max(len(t.name) for t in (*tasks, *tasks.holdout))
    total = 0
    for task in tasks:
        steps = steps_in_stage(len(task.train), config.train)
        total += steps
        lines.append(
            f"  {task.name:<{width}}  {len(task.train):>7} train  {len(task.eval):>6} eval"
            f"  {steps:>6} steps  {task.metric}"
        )
    lines += [
        f"  {t.name:<{width}}  {'holdout':>13}  {len(t.eval):>6} eval  {'':>12}  {t.metric}" for t in tasks.holdout
    ]
    lines.append(
        f"  {total} optimiser steps of {config.train.batch_size} examples, if every task is learned on its own examples"
    )
    return "\n".join([*lines, *_memory(config, tasks)])


def _memory(config: RunConfig, tasks: TaskSequence) -> list[str]:
    classes = tasks.num_classes if any(t.kind == "classification" for t in tasks) else None
    sizes = estimate(config.model, num_classes=classes, input_shape=build.input_shape(tasks))
    if sizes is None:
        return [f"  model {config.model.name}: its size is known once it is fetched"]
    states = _GRADIENT_BYTES + (_SGD_BYTES if config.train.optimizer == "sgd" else _ADAM_BYTES)
    memory = sizes["weight_bytes"] + states * sizes["trainable"]
    share = sizes["trainable"] / max(1, sizes["parameters"])
    return [
        f"  model {config.model.name}: {sizes['parameters']:,} parameters, "
        f"{sizes['trainable']:,} trained ({share:.2%})",
        f"  about {memory / 2**20:,.0f} MiB for weights, gradients and optimiser, and activations on top",
    ]
