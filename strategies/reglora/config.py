"""Options of RegLoRA; the defaults are the published code's."""

from __future__ import annotations

from dataclasses import dataclass

from clkit.config import StrategyConfig, opt


@dataclass
class RegLoRAConfig(StrategyConfig):
    """How strongly, where and how often the update of a new task is held back."""

    lam: float = opt(2500.0, "strength of the regulariser; 0 = a fresh LoRA per task and nothing else", min=0)
    fraction: float = opt(0.02, "part of each weight matrix that one task protects", above=0, max=1)
    mask: str = opt(
        "top",
        "what a task protects: the largest entries of its update; as many random ones, or all (controls)",
        choices=("top", "random", "all"),
    )
    accumulate: str = opt(
        "concat",
        "an entry that several tasks chose: counts once for each of them, or once (union)",
        choices=("concat", "union"),
    )
    norm: str = opt("l1", "penalty on a protected entry x of the update: |x|, or x * x (control)", choices=("l1", "l2"))
    reduction: str = opt("mean", "over the protected entries of a matrix", choices=("mean", "sum"))
    scaled: bool = opt(False, "penalise alpha / r * B A, the change of the weight itself, instead of B A")
    n_div: int = opt(0, "divides the sum over the matrices; 0 = their number (the published 224 on a 7B)", min=0)
    every: int = opt(1, "regularise at every so many optimiser steps, so many times as strongly", min=1)
