"""Experience replay: a small buffer of earlier examples is mixed into every batch."""

from __future__ import annotations

from dataclasses import dataclass

from clkit.config import ReplayConfig, StrategyConfig, opt
from clkit.errors import Problem
from clkit.strategy import Capabilities, Strategy, on_deepspeed


@dataclass
class RehearsalConfig(StrategyConfig):
    """Rehearsal with a buffer that is not empty by default."""

    replay: ReplayConfig = opt(lambda: ReplayConfig(size=200), "rehearsal buffer")


class Replay(Strategy):
    """Rehearsal (Rolnick et al. 2019; reservoir sampling after Vitter 1985).

    The same buffer can be put under any strategy with ``strategy.replay.size``; this one has it on by default.
    """

    config_class = RehearsalConfig
    capabilities = Capabilities(causal=True, **on_deepspeed())

    @classmethod
    def check(cls, config: RehearsalConfig) -> list[Problem]:
        """A buffer of size 0 would be `naive` under another name."""
        if config.replay.size == 0:
            return [
                Problem("strategy.replay.size", "out of range (got 0, expected >= 1; without a buffer use `naive`)")
            ]
        return []
