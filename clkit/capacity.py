"""What a run needs on each device, by ZeRO stage, and the cheapest stage that fits; nothing is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from clkit import build
from clkit.config import RunConfig
from clkit.errors import CapabilityError, ConfigError
from clkit.models.sizes import estimate
from clkit.registry import STRATEGIES

_FLOAT = 4  # trained weights, their gradients and moments
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Need:
    """Bytes on one of several devices under one ZeRO stage, activations and communication buffers left out.

    Attributes:
        stage: 0 to 3.
        weights: frozen and trained.
        gradients: of the trained weights.
        optimizer: its moments and, from stage 1 on, the copy of the weights that it updates.
        kept: what the strategy keeps beside them.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    kept: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.kept


def need(stage: int, processes: int, sizes: Mapping[str, int], moments: int, kept: int) -> Need:
    """The formulas of docs/scaling.md.

    Args:
        stage: 0 to 3.
        processes: how many share what is split.
        sizes: ``trainable`` numbers and ``weight_bytes`` of all weights.
        moments: per trained number, 2 for Adam.
        kept: bytes that the strategy keeps on each device.

    Example:
        >>> need(2, 4, {"trainable": 100, "weight_bytes": 1000}, 2, 0)
        Need(stage=2, weights=1000, gradients=100, optimizer=300, kept=0)
    """
    trained = _FLOAT * sizes["trainable"]

    def split(size: int, since: int) -> int:
        return -(-size // processes) if stage >= since else size

    copy = split(trained, 1) if stage else 0
    return Need(stage, split(sizes["weight_bytes"], 3), split(trained, 2), split(moments * trained, 1) + copy, kept)


def parse_size(text: str) -> int:
    """Bytes of ``80GiB``.

    Raises:
        ConfigError: it is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|B)", text.strip())
    if found is None or not float(found[1]):
        raise ConfigError(f"--gpu-memory: got '{text}', expected a number and a unit, such as 80GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def plan(config: RunConfig, gpus: int, memory: int) -> str:
    """A line for each stage that the strategy supports, and the cheapest that fits.

    Raises:
        ConfigError: a number is out of range.
        CapabilityError: the size of the model is not known yet, or the strategy runs on one process only.
    """
    if gpus < 1:
        raise ConfigError(f"--gpus: got {gpus}, expected at least 1")
    strategy = STRATEGIES.get(config.strategy.name)
    stages = sorted(strategy.capabilities.zero_stages)
    if not stages:
        raise CapabilityError(f"strategy '{config.strategy.name}' runs on the local engine only; see `clkit validate`")
    tasks = build.make_tasks(config)
    sizes = estimate(config.model, build.num_classes(tasks), build.input_shape(tasks))
    if sizes is None:
        raise CapabilityError(f"model.name: the size of '{config.model.name}' is known once it is fetched")
    kept = strategy.kept_bytes(config.strategy.config, sizes, len(tasks))
    moments = 1 if config.train.optimizer == "sgd" else 2
    needs = [need(stage, gpus, sizes, moments, kept) for stage in stages]
    lines = [
        f"{config.name}: strategy {config.strategy.name}, {sizes['parameters']:,} parameters, {sizes['trainable']:,} "
        f"trained, {gpus} devices of {memory / 2**30:.1f} GiB",
        "  stage     weights   gradients   optimiser    strategy         all   (GiB on each device)",
    ]
    for found in needs:
        columns = (found.weights, found.gradients, found.optimizer, found.kept, found.total)
        lines.append(f"  {found.stage:>5}" + "".join(f"{size / 2**30:>12.2f}" for size in columns))
    fitting = [found for found in needs if found.total < memory]
    if not fitting:
        return "\n".join([*lines, "  No stage fits: take more devices, LoRA, or engine.offload_optimizer=cpu."])
    stage, room = fitting[0].stage, (memory - fitting[0].total) / 2**30
    advice = [
        f"  Cheapest that fits: engine=deepspeed engine.zero_stage={stage}. It leaves {room:.1f} GiB for activations",
        "  and buffers, which grow with train.micro_batch and shrink with model.gradient_checkpointing.",
    ]
    return "\n".join([*lines, *advice])
