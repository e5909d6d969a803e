"""What a run needs on each device, by ZeRO stage, and the cheapest stage that fits; nothing is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from clkit import build
from clkit.config import RunConfig
from clkit.engine.settings import BUCKET, LIVE, PREFETCH
from clkit.errors import CapabilityError, ConfigError
from clkit.models.activations import activation_bytes
from clkit.models.sizes import estimate
from clkit.registry import STRATEGIES

_FLOAT = 4  # trained weights, their gradients and moments
_COLUMNS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimiser": "optimizer",
    "strategy": "kept",
    "buffers": "buffers",
    "activations": "activations",
    "all": "total",
}
_NOTHING = (
    "  No stage fits: take more devices, LoRA, a smaller train.micro_batch, model.gradient_checkpointing=true, or\n"
    "  engine.offload_optimizer=cpu."
)
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Need:
    """Bytes on one of several devices under one ZeRO stage.

    Attributes:
        stage: 0 to 3.
        weights: frozen and trained.
        gradients: of the trained weights.
        optimizer: its moments and, from stage 1 on, the copy of the weights that it updates.
        kept: what the strategy keeps beside them.
        buffers: what DeepSpeed lays by for communication; at stage 3 the weights that are whole for the moment.
        activations: of one forward and backward pass, at most.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    kept: int = 0
    buffers: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        parts = (self.weights, self.gradients, self.optimizer, self.kept, self.buffers, self.activations)
        return sum(parts)


def need(stage: int, processes: int, sizes: Mapping[str, int], moments: int, *, offload: bool = False) -> Need:
    """What follows from the sizes alone; the formulas of docs/scaling.md.

    Args:
        stage: 0 to 3.
        processes: how many share what is split.
        sizes: ``parameters``, ``trainable`` and ``weight_bytes``.
        moments: per trained number, 2 for Adam.
        offload: the optimiser's part lies in main memory.

    Example:
        >>> need(2, 4, {"parameters": 250, "trainable": 100, "weight_bytes": 1000}, 2)
        Need(stage=2, weights=1000, gradients=100, optimizer=300, kept=0, buffers=400, activations=0)
    """
    trained = _FLOAT * sizes["trainable"]

    def split(size: int, since: int) -> int:
        return -(-size // processes) if stage >= since else size

    buffers = min(trained, _FLOAT * BUCKET)
    if stage == 3:
        # What stays whole, and what is fetched: one bucket is copied to its place while the next is on its way.
        parts = (min(1.0, count / sizes["parameters"]) for count in (LIVE, 2 * PREFETCH))
        buffers += round(sum(parts) * sizes["weight_bytes"])
    copy = split(trained, 1) if stage else 0
    optimizer = 0 if offload and stage else split(moments * trained, 1) + copy
    return Need(stage, split(sizes["weight_bytes"], 3), split(trained, 2), optimizer, buffers=buffers)


def parse_size(text: str) -> int:
    """Bytes of ``80GiB``.

    Raises:
        ConfigError: it is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|B)", text.strip())
    if found is None or not float(found[1]):
        raise ConfigError(f"--gpu-memory: got '{text}', expected a number and a unit, such as 80GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def rows_at_once(config: RunConfig, processes: int) -> int:
    """The rows, rehearsed ones included, that go through the model together on one process."""
    replay = config.strategy.config.replay
    batch = config.train.batch_size
    batch += round(batch * replay.ratio) if replay.size else 0
    share = -(-batch // processes)
    return min(share, config.train.micro_batch or share)


@dataclass(frozen=True)
class Capacity:
    """What a run needs on several devices.

    Attributes:
        sizes: of the model: ``parameters``, ``trainable`` and ``weight_bytes``.
        rows: that go through the model together.
        needs: under each stage that the strategy supports.
    """

    sizes: Mapping[str, int]
    rows: int
    needs: list[Need]


def capacity(config: RunConfig, processes: int) -> Capacity:
    """The formulas and a pretended pass of the model, for a run.

    Raises:
        CapabilityError: the size of the model is not known yet, or the strategy runs on one process only.
    """
    strategy = STRATEGIES.get(config.strategy.name)
    stages = sorted(strategy.capabilities.zero_stages)
    if not stages:
        raise CapabilityError(f"strategy '{config.strategy.name}' runs on the local engine only; see `clkit validate`")
    tasks = build.make_tasks(config)
    classes, rows = build.num_classes(tasks), rows_at_once(config, processes)
    sizes = estimate(config.model, classes, build.input_shape(tasks))
    if sizes is None:
        raise CapabilityError(f"model.name: the size of '{config.model.name}' is known once it is fetched")
    extra = {
        "kept": strategy.kept_bytes(config.strategy.config, sizes, len(tasks)),
        "activations": (activation_bytes(config.model, rows) or 0) if classes is None else 0,
    }
    moments = 1 if config.train.optimizer == "sgd" else 2
    offload = getattr(config.engine.config, "offload_optimizer", "none") != "none"
    needs = [replace(need(stage, processes, sizes, moments, offload=offload), **extra) for stage in stages]
    return Capacity(sizes, rows, needs)


def plan(config: RunConfig, gpus: int, memory: int) -> str:
    """A line for each stage that the strategy supports, and the cheapest that fits.

    Raises:
        ConfigError: a number is out of range.
        CapabilityError: as from :func:`capacity`.
    """
    if gpus < 1:
        raise ConfigError(f"--gpus: got {gpus}, expected at least 1")
    found = capacity(config, gpus)
    lines = [
        f"{config.name}: strategy {config.strategy.name}, {found.sizes['parameters']:,} parameters, "
        f"{found.sizes['trainable']:,} trained, {gpus} devices of {memory / 2**30:.1f} GiB",
        f"  stage{''.join(f'{name:>12}' for name in _COLUMNS)}   (GiB on each device)",
    ]
    for one in found.needs:
        lines.append(f"  {one.stage:>5}" + "".join(f"{getattr(one, key) / 2**30:>12.2f}" for key in _COLUMNS.values()))
    if found.needs[0].activations:
        lines.append(f"  Activations: {found.rows} rows of {config.model.max_length} tokens, each of them a target.")
    else:
        lines.append("  Activations are estimated for language models only; here they come on top.")
    fitting = [one for one in found.needs if one.total < memory]
    if not fitting:
        return "\n".join([*lines, _NOTHING])
    room = (memory - fitting[0].total) / 2**30
    lines.append(
        f"  Cheapest that fits: engine=deepspeed engine.zero_stage={fitting[0].stage}, with {room:.1f} GiB to spare."
    )
    return "\n".join(lines)
