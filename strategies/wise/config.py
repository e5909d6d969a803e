"""Options of WISE: what is edited, how one edit is learned, how edits are kept and found again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from clkit.config import StrategyConfig, opt
from clkit.errors import Problem


@dataclass
class WISEConfig(StrategyConfig):
    """Options of WISE. What is left null is decided by :func:`settled`."""

    layer: str = opt(
        "auto", "projection to edit: auto (by depth), the number of a block (-1 = the last), or a module's name"
    )
    depth: float = opt(0.85, "auto: how deep the edited block lies, as a part of the blocks", min=0, max=0.999)
    mode: str = opt(
        "retrieve",
        "retrieve: merged memories stand side by side and the best one answers; merge: all edits in one memory",
        choices=("retrieve", "merge"),
    )
    mask_ratio: float = opt(0.2, "part of the matrix that one shard of edits may change", above=0, max=1)
    shard_size: int | None = opt(
        None,
        "edits that share one mask; the fewer, the less they disturb each other. null: as many as the layer's width "
        "allows (10 for SmolLM2-135M); 500 where shards are merged",
        min=1,
    )
    merge_every: int | None = opt(
        None,
        "edits after which shards are merged; a multiple of shard_size; 0 = only when asked. "
        "null: 0, and 1000 with mode=merge or compat",
        min=0,
    )
    merge: str = opt("ties", "how shards are merged", choices=("ties", "sign", "linear", "dare"))
    density: float = opt(
        0.53, "ties: part of the matrix kept of a shard; dare: part of a shard's entries", above=0, max=1
    )
    steps: int | None = opt(None, "most steps per edit", min=1)
    learning_rate: float | None = opt(
        None, "step size, relative to the layer's activations (compat: as it is)", above=0
    )
    alpha: float | None = opt(None, "largest score wanted of irrelevant prompts, relative (compat: as it is)", above=0)
    beta: float | None = opt(None, "smallest score wanted of the edit's prompts", above=0)
    gamma: float | None = opt(None, "smallest distance wanted between the two", above=0)
    clamp: float | None = opt(
        None, "largest change of one weight, relative to the layer's activations (compat: as it is)", above=0
    )
    routing: str = opt(
        "router",
        "router: the prompt decides whether a memory answers; none: the one with the largest score always does",
        choices=("router", "none"),
    )
    reach: str = opt(
        "answer",
        "what a memory changes: answer = from the prompt's last token on; sequence = every token, as published",
        choices=("answer", "sequence"),
    )
    slack: float | None = opt(None, "a memory answers above its threshold times this", above=0, max=1)
    likeness: float = opt(
        0.55,
        "and only what looks at least so much like one of its edits (a cosine; 0 and compat: whatever it looks like)",
        min=0,
        max=1,
    )
    false_positive_rate: float = opt(
        0.05,
        "likeness rises with the edits so that at most this part of the newest 512 edits' irrelevant prompts passes, "
        "from 200 such prompts on (1 and compat: it stays)",
        above=0,
        max=1,
    )
    stop_loss: float | None = opt(None, "an edit is learned when its loss is not above", min=0)
    contexts: int = opt(
        10, "texts that the model writes itself, put before the prompt to learn paraphrases", min=0, max=10
    )
    negatives: int = opt(48, "built-in irrelevant prompts per edit, of 48 (compat: none)", min=0)
    history: int = opt(
        64,
        "per edit, prompts of earlier edits to go on answering, and as many of earlier edits to go on leaving alone, "
        "drawn anew for each (compat: none)",
        min=0,
    )
    keep: float = opt(
        100.0,
        "how strongly an edit leaves alone what its memory says to other prompts (compat: 0)",
        min=0,
    )
    eos: bool = opt(True, "teach that the answer ends (compat: not)")
    storage: str = opt(
        "float16",
        "type of the values of a finished shard, in memory as on disk",
        choices=("float16", "bfloat16", "float32"),
    )
    compat: bool = opt(False, "the published code's algorithm and numbers")


# Chosen on kept-apart edits of SmolLM2-135M, README.md "Defaults".
DEFAULTS = {
    "steps": 50,
    "learning_rate": 0.1,
    "clamp": 3.0,
    "alpha": 0.1,
    "beta": 0.8,
    "gamma": 0.4,
    "stop_loss": 0.05,
    "slack": 0.5,
}
# EasyEdit @ 14cea82, hparams/WISE/llama-7b.yaml.
PUBLISHED = {
    "steps": 70,
    "learning_rate": 1.0,
    "clamp": 1.0,
    "alpha": 5.0,
    "beta": 20.0,
    "gamma": 10.0,
    "stop_loss": 0.02,
    "slack": 0.88,
}


# Shards that are merged, EasyEdit @ 14cea82: save_freq and merge_freq.
_MERGED_SHARD, _MERGE_EVERY = 500, 1000
# Of the entries that a shard may change in a row of the matrix, one edit takes about this many (README.md, "Shards").
_ENTRIES_PER_EDIT = 30


def settled(config: WISEConfig, width: int) -> WISEConfig:
    """The configuration with every number decided and, for ``compat``, the fixes switched off.

    Args:
        config: as given.
        width: what the edited projection reads, numbers per token.
    """
    numbers = PUBLISHED if config.compat else DEFAULTS
    numbers = numbers | {"merge_every": _MERGE_EVERY if config.compat or config.mode == "merge" else 0}
    open_ = {name: value for name, value in numbers.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **open_)  # type: ignore[arg-type]
    if config.shard_size is None:
        few = max(1, int(config.mask_ratio * width / _ENTRIES_PER_EDIT))
        config = dataclasses.replace(config, shard_size=_MERGED_SHARD if config.merge_every or config.compat else few)
    if config.compat:
        config = dataclasses.replace(
            config, eos=False, negatives=0, storage="float32", reach="sequence", keep=0.0, likeness=0.0
        )
    return config


def problems(config: WISEConfig) -> list[Problem]:
    """Options that do not fit together."""
    found = []
    if config.replay.size:
        found.append(Problem("strategy.replay.size", f"got {config.replay.size}, expected 0: edits rehearse nothing"))
    whole = settled(config, width=1)
    if whole.merge_every and whole.shard_size and whole.merge_every % whole.shard_size:
        found.append(
            Problem(
                "strategy.merge_every",
                f"got {whole.merge_every}, expected a multiple of shard_size ({whole.shard_size})",
            )
        )
    if whole.alpha is not None and whole.beta is not None and whole.alpha >= whole.beta:
        found.append(Problem("strategy.alpha", f"got {whole.alpha}, expected less than beta ({whole.beta})"))
    return found
