"""Rehearsal with a running average of the adapter: I-LoRA without its consistency term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clkit.config import ReplayConfig, StrategyConfig, opt
from clkit.errors import Problem
from clkit.strategies.ilora.strategy import ILoRA, ILoRAConfig


@dataclass
class EMAConfig(StrategyConfig):
    """The options of I-LoRA that are left; its defaults."""

    replay: ReplayConfig = opt(lambda: ILoRAConfig().replay, "rehearsal buffer")
    interpolation: float = opt(ILoRAConfig.interpolation, "weight of the old average at each step", min=0, max=1)
    ramp: bool = opt(False, "at most 1 - 1/(k+1) in step k, so that early values are forgotten sooner")
    serve: str = opt("slow", "which is evaluated and exported: average or trained adapter", choices=("slow", "fast"))


class EMA(ILoRA):  # type: ignore[misc]  # mypy knows the strategies by another name
    """The average is updated once per optimiser step, in float32; training is that of `replay`, bit for bit.

    The control of I-LoRA: what averaging alone gives.
    """

    config_class = EMAConfig

    def __init__(self, config: EMAConfig | None = None) -> None:
        own = config or EMAConfig()
        options: dict[str, Any] = {name: getattr(own, name) for name in ("replay", "interpolation", "ramp", "serve")}
        super().__init__(ILoRAConfig(**options, gamma=0.0))

    @classmethod
    def check(cls, config: EMAConfig) -> list[Problem]:
        """Rehearsal is part of the method."""
        if config.replay.size == 0:
            return [Problem("strategy.replay.size", "out of range (got 0, expected >= 1: this strategy rehearses)")]
        return []
