"""Sequential fine-tuning with no protection: the lower bound."""

from __future__ import annotations

from clkit.strategy import Capabilities, Strategy, on_deepspeed


class Naive(Strategy):
    """Learns each task in turn and nothing else. With ``strategy.replay.size`` it rehearses."""

    capabilities = Capabilities(causal=True, **on_deepspeed(also={"private"}))
