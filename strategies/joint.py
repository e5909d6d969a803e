"""Joint training on all tasks at once: the upper bound."""

from __future__ import annotations

from collections.abc import Sequence

from clkit.strategy import Capabilities, Strategy, on_deepspeed


class Joint(Strategy):
    """Trains once, on the union of all tasks; only the last row of R is measured."""

    capabilities = Capabilities(causal=True, **on_deepspeed(also={"private"}))

    def training_set(self, stage: int) -> Sequence[int]:
        """Everything at the last stage, nothing before."""
        count = len(self.run.tasks)
        return range(count) if stage == count - 1 else ()
