"""Log-likelihoods of several continuations of one prompt, with the prompt computed once.

The prompt and all its options form one sequence. A 4-D attention mask lets an option see the prompt and itself, and its
positions go on where the prompt ended, so each option is computed as if it stood alone behind the prompt::

    tokens      p p p p | a a | b b b      the last token of an option is not fed: it predicts nothing
    positions   0 1 2 3 | 4 5 | 4 5 6
    segment     0 0 0 0 | 1 1 | 2 2 2      a token sees earlier ones of segment 0 and of its own

Sequences are padded on the left, so that all positions whose logits are needed stand at the end.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from clkit.models.lora import base_model
from clkit.models.routing import marking_prompt

# Decoders of transformers that take a 4-D mask and position ids and mix tokens by attention alone, as a test shows.
# fmt: off
PACKABLE = frozenset(
    {
        "arcee", "cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2",
        "gpt_neox", "granite", "helium", "llama", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3",
        "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
        "stablelm", "starcoder2",
    }
)
# fmt: on

_ROWS = "_clkit_reads_rows"  # attribute of a model, see reads_rows
_CHUNK = 256  # positions whose logits are turned to float32 at once


def packed_logliks(
    module: nn.Module, prompts: Sequence[list[int]], options: Sequence[list[list[int]]]
) -> list[list[float]]:
    """Sum of the log-probabilities of each option's tokens given its prompt, in nats.

    Args:
        module: a causal language model for which :func:`why_not_packed` has no objection.
        prompts: token ids of B prompts, none empty.
        options: for each prompt the token ids of its options, none empty.

    Returns:
        One float per option, summed from float32 log-softmax.
    """
    device = next(module.parameters()).device
    rows = [p + [t for o in opts for t in o[:-1]] for p, opts in zip(prompts, options, strict=True)]
    width, keep = max(map(len, rows)), 1 + max(len(r) - len(p) for r, p in zip(rows, prompts, strict=True))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros_like(ids)
    segments = torch.full_like(ids, -1)  # padding is a segment of its own, so that no row of the mask is empty
    wanted: list[tuple[int, int, int]] = []  # (record, kept position, the token predicted there)
    for r, (prompt, opts) in enumerate(zip(prompts, options, strict=True)):
        at, size = width - len(rows[r]), len(prompt)
        ids[r, at:] = torch.tensor(rows[r])
        segments[r, at : at + size] = 0
        positions[r, at : at + size] = torch.arange(size)
        last = at = at + size
        for number, option in enumerate(opts, start=1):
            end = at + len(option) - 1
            segments[r, at:end] = number
            positions[r, at:end] = torch.arange(size, size + len(option) - 1)
            wanted += [(r, p - (width - keep), t) for p, t in zip([last - 1, *range(at, end)], option, strict=True)]
            at = end
    segments = segments.to(device)
    visible = (segments[:, :, None] == segments[:, None, :]) | (segments == 0)[:, None, :]
    mask = (visible & torch.ones(width, width, dtype=torch.bool, device=device).tril())[:, None]
    if module.config._attn_implementation == "eager":  # type: ignore[union-attr]
        dtype = next(module.parameters()).dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, torch.finfo(dtype).min)
    with marking_prompt(segments == 0):
        out = module(
            input_ids=ids.to(device),
            attention_mask=mask,
            position_ids=positions.to(device),
            use_cache=False,
            logits_to_keep=_last(width, keep, device),
        )
    return _sums(out.logits, wanted, options)


def rowwise_logliks(
    module: nn.Module, prompts: Sequence[list[int]], options: Sequence[list[list[int]]]
) -> list[list[float]]:
    """The same as :func:`packed_logliks` for any causal language model: one row per option, padded on the right."""
    device = next(module.parameters()).device
    pairs = [(p, o) for p, opts in zip(prompts, options, strict=True) for o in opts]
    rows = [torch.tensor(p + o[:-1]) for p, o in pairs]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    keep = ids.shape[1] - min(len(p) for p, _ in pairs) + 1
    first = ids.shape[1] - keep if _takes(module, "logits_to_keep") else 0
    extra: dict[str, Any] = {"logits_to_keep": _last(ids.shape[1], keep, device)} if first else {}
    lengths = torch.tensor([len(p) for p, _ in pairs])
    with marking_prompt((torch.arange(ids.shape[1]) < lengths[:, None]).to(device)):
        out = module(input_ids=ids.to(device), attention_mask=mask.to(device), **extra)
    wanted = [(r, len(p) - 1 + k - first, t) for r, (p, o) in enumerate(pairs) for k, t in enumerate(o)]
    return _sums(out.logits, wanted, options)


def _last(width: int, keep: int, device: torch.device) -> Tensor:
    """The last ``keep`` positions, as indices: of a slice, torch copies the output layer's weight once per row."""
    return torch.arange(width - keep, width, device=device)


def _sums(logits: Tensor, wanted: list[tuple[int, int, int]], options: Sequence[list[list[int]]]) -> list[list[float]]:
    """Add up the log-probabilities of the wanted tokens, which come in the order of ``options``."""
    row, column, token = torch.tensor(wanted, device=logits.device).unbind(1)
    flat = logits.flatten(0, 1)
    places, which = torch.unique(row * logits.shape[1] + column, return_inverse=True)  # first ones are shared
    # In pieces: the float32 copy of all logits would be the largest tensor of the evaluation.
    normaliser = torch.cat([flat[piece].float().logsumexp(-1) for piece in torch.split(places, _CHUNK)])
    values = iter((flat[places[which], token].float() - normaliser[which]).double().tolist())
    return [[sum(itertools.islice(values, len(option))) for option in opts] for opts in options]


def reads_rows(module: nn.Module, reads: bool = True) -> None:
    """Say of a transformers model that what was put on it wants one sequence per row, or take that back."""
    setattr(module, _ROWS, reads)


def why_not_packed(module: nn.Module, longest: int) -> str | None:
    """Why :func:`packed_logliks` is wrong for ``module`` and sequences of ``longest`` tokens; None if it is right."""
    if getattr(base_model(module), _ROWS, False):
        return "edits on the model put text before the prompt"
    config = getattr(module, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in PACKABLE:
        return f"it is not known to hold for {kind or type(module).__name__}"
    if getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False):
        return "the adapter puts tokens of its own before the prompt"
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"{attention} attention takes no mask; sdpa and eager do"
    window = getattr(config, "sliding_window", None)
    if window and window < longest:  # some configurations say 0 for none
        return f"some sequences are longer than the attention window of {window} tokens"
    return None


@functools.cache
def say_not_packed(reason: str) -> None:
    """Say once per reason that the slower way is taken."""
    logging.getLogger(__name__).warning("The prompt is computed anew for every option, not once for all: %s.", reason)


def _takes(module: nn.Module, name: str) -> bool:
    """Whether the forward of the model (below a peft adapter) has a parameter of this name."""
    base: Any = module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]
    return name in inspect.signature(base.forward).parameters
