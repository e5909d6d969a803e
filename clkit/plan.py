"""What a run would do, worked out without loading weights."""

from __future__ import annotations

from collections import Counter

import torch

from clkit import build
from clkit.config import RunConfig
from clkit.models.sizes import estimate
from clkit.provenance import answer_styles
from clkit.registry import STRATEGIES
from clkit.tasks.base import TaskSequence
from clkit.unlearning.tombstones import in_force

_ADAM_BYTES = 8
_SGD_BYTES = 4
_GRADIENT_BYTES = 4


def describe(config: RunConfig) -> str:
    """Tasks with sizes and steps, trainable parameters, memory, and where the run goes.

    Raises:
        ClkitError: what a run would raise before it loads weights.
    """
    tasks = in_force(config.output_dir).apply(build.make_tasks(config))
    capabilities = STRATEGIES.get(config.strategy.name).capabilities
    engine, edits = build.check(config, tasks, capabilities), capabilities.kinds == {"edit"}
    lines = [f"{config.name}: strategy {config.strategy.name}, engine {config.engine.name}, into {config.output_dir}"]
    width = max(len(t.name) for t in (*tasks, *tasks.holdout))
    counts = build.stage_steps(config, tasks)
    for task, steps in zip(tasks, counts, strict=True):
        lines.append(
            f"  {task.name:<{width}}  {len(task.train):>7} train  {len(task.eval):>6} eval"
            f"  {steps:>6} steps  {', '.join(dict.fromkeys([task.metric, *config.eval.also]))}"
        )
        if "asd" in task.metadata:
            styles = Counter(row["style"] for row in answer_styles([task]))
            shown = ", ".join(f"{count} {style}" for style, count in sorted(styles.items())) or "no other fits"
            lines.append(f"  {'':<{width}}  {styles.total():>7} of them in other answer styles: {shown}")
    lines += [
        f"  {t.name:<{width}}  {'holdout':>13}  {len(t.eval):>6} eval  {'':>12}  {t.metric}" for t in tasks.holdout
    ]
    unit = f"optimiser steps of {config.train.batch_size} examples"
    lines.append(f"  {sum(counts)} {'edits, one after another' if edits else unit}")
    lines += [f"  {note}" for note in engine.notes()]
    return "\n".join([*lines, *_memory(config, tasks, engine.device, edits)])


def _memory(config: RunConfig, tasks: TaskSequence, device: torch.device, edits: bool) -> list[str]:
    sizes = estimate(config.model, build.num_classes(tasks), build.input_shape(tasks), device)
    if sizes is None:
        return [f"  model {config.model.name}: its size is known once it is fetched"]
    states = _GRADIENT_BYTES + (_SGD_BYTES if config.train.optimizer == "sgd" else _ADAM_BYTES)
    if edits:  # the weights stay as they are, and what is learned is small beside them
        return [
            f"  model {config.model.name}: {sizes['parameters']:,} parameters, none of them trained",
            f"  about {sizes['weight_bytes'] / 2**20:,.0f} MiB for weights, and edits and activations on top",
        ]
    trained = STRATEGIES.get(config.strategy.name).trained(sizes)
    head = f"  model {config.model.name}: {sizes['parameters']:,} parameters, "
    if trained is None:
        return [
            f"{head}to which strategy {config.strategy.name} adds; it decides what is trained",
            f"  about {sizes['weight_bytes'] / 2**20:,.0f} MiB for weights, and what is added and activations on top",
        ]
    share = trained / max(1, sizes["parameters"])
    memory = sizes["weight_bytes"] + states * trained
    return [
        f"{head}{trained:,} trained ({share:.2%})",
        f"  about {memory / 2**20:,.0f} MiB for weights, gradients and optimiser, and activations on top",
    ]
