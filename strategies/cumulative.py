"""Cumulative training: every stage learns all tasks seen so far."""

from __future__ import annotations

from collections.abc import Sequence

from clkit.strategy import Capabilities, Strategy, on_deepspeed


class Cumulative(Strategy):
    """At stage t trains on the examples of tasks 0..t, going on from the weights of stage t-1."""

    capabilities = Capabilities(causal=True, **on_deepspeed())

    def training_set(self, stage: int) -> Sequence[int]:
        """All tasks up to and including ``stage``."""
        return range(stage + 1)
