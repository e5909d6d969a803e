"""How many tokens a model of texts has learned positions for."""

from __future__ import annotations

from typing import Any

from torch import nn

from clkit.models.lora import base_model


def learned_positions(module: nn.Module) -> int | None:
    """The length of a model's table of position embeddings (GPT-2, OPT, BERT, RoBERTa); None of models without one.

    A token beyond it ends in an index error. Rotary and relative positions have no such end, but for those that are
    looked up in a table made in advance (GPT-J, CodeGen).
    """
    known = getattr(getattr(base_model(module), "config", None), "max_position_embeddings", None)
    for name, part in base_model(module).named_modules():
        leaf: Any = part
        called = name.rpartition(".")[2]
        if isinstance(known, int) and isinstance(part, nn.Embedding) and (called == "wpe" or "position" in called):
            skipped = 0 if leaf.padding_idx is None else leaf.padding_idx + 1  # RoBERTa counts from behind it
            return min(known, int(leaf.num_embeddings) - skipped)
    for name, table in base_model(module).named_buffers():
        if name.rpartition(".")[2] == "embed_positions":
            return len(table)
    return None
