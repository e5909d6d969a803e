"""Options of the discrete key-value bottleneck; README.md says what each stands for in the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clkit.config import StrategyConfig, opt


@dataclass
class DKVBConfig(StrategyConfig):
    """How features are split, quantised and read."""

    heads: int = opt(64, "C, codebooks; each sees its own projection of the features", min=1)
    pairs: int = opt(1024, "K, key-value pairs in each codebook", min=1, max=32767)
    key_dim: int = opt(14, "k, length of a key", min=1)
    split: str = opt(
        "random",
        "how features become C vectors: random projections, or consecutive slices (C * k must be their length)",
        choices=("random", "chunk"),
    )
    tokens: bool = opt(False, "look each token of a text or image encoder up by itself and average what they read")
    top_k: int = opt(1, "nearest keys that are read; their values are summed", min=1)
    decoder: str = opt(
        "voting",
        "voting = trained values are logits, averaged over heads; votes = values are counts of classes, filled in one "
        "pass without gradients; linear, mlp = a network on all values read",
        choices=("voting", "votes", "linear", "mlp"),
    )
    value_dim: int = opt(10, "linear, mlp: length of a value (voting and votes: the number of classes)", min=1)
    hidden: int = opt(128, "mlp: hidden units", min=1)
    train_decoder: bool = opt(False, "linear, mlp: train the decoder too, not the values alone")
    vote_scale: str = opt(
        "count",
        "votes: sum counts, or logarithms of smoothed class shares",
        choices=("count", "log"),
    )
    smoothing: float = opt(1.0, "votes, log: what is added to every count", above=0)
    label_smoothing: float = opt(0.1, "of the cross entropy", min=0, max=0.99)
    unused: str = opt(
        "exclude",
        "in evaluation: find the nearest key among those that training has read, or among all",
        choices=("exclude", "allow"),
    )
    key_data: str = opt(
        "first",
        "unlabelled inputs that place the keys: of the first task, of all tasks, or of the tasks in key_tasks",
        choices=("first", "all", "tasks"),
    )
    key_tasks: dict[str, Any] = opt({}, "key_data=tasks: a `tasks` section (source and its options)")
    key_limit: int = opt(20_000, "most vectors that place the keys, drawn at random", min=1)
    key_start: str = opt(
        "sample",
        "first keys: distinct inputs, cluster means, or normal draws",
        choices=("sample", "kmeans", "normal"),
    )
    key_rounds: int = opt(10, "kmeans: rounds of Lloyd's algorithm", min=1)
    key_passes: int = opt(10, "passes of the moving average over the key data", min=0)
    key_batch: int = opt(256, "vectors in one step of the moving average", min=1)
    key_decay: float = opt(0.95, "decay of the moving average", min=0, max=0.9999)
    key_dead: float = opt(0.1, "a key with less than this part of a fair share of hits is replaced; 0 = none is", min=0)
    compat: bool = opt(
        False,
        "the published code's way with keys and masks: normal start, replacement with repetition and stale averages, "
        "first epoch of each later task with the usage mask on",
    )
