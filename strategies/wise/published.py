"""What only ``compat`` needs: the published code's rows, and the edited matrix itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clkit.editing.rows import Rows, pad_left
from clkit.errors import CapabilityError
from clkit.models.prompts import PromptFormat


def build_published(form: PromptFormat, prompt: str, target: str, contexts: Sequence[str], irrelevant: str) -> Rows:
    """The rows as the published code makes them: labels by the padded width of the prompts, every position scored.

    Where the irrelevant text is the longest row, tokens of the prompt are learned too; where it holds words of the
    template's, they are not shown. Kept to compare numbers.
    """
    tokenizer = form.tokenizer
    shown = form.render([prompt, *(f"{context} {prompt}" for context in contexts)])
    ids = [list(tokenizer(text).input_ids) for text in (*(f"{s} {target}" for s in shown), irrelevant)]
    width = max(len(tokenizer(s).input_ids) for s in shown)
    input_ids, mask = pad_left(ids, tokenizer.pad_token_id)
    labels = input_ids.clone()
    labels[: len(shown), :width] = -100
    labels[mask == 0] = -100
    return Rows(input_ids, mask, labels, torch.ones_like(mask, dtype=torch.bool), len(shown))


def dense_weight(module: nn.Module) -> Tensor:
    """(out, in) float32 copy of a plain layer's matrix.

    Raises:
        CapabilityError: the layer has a bias, or is adapted or quantised.
    """
    weight = getattr(module, "weight", None)
    if type(module) is not nn.Linear or module.bias is not None or not isinstance(weight, Tensor):
        raise CapabilityError(
            "strategy.compat reads the edited matrix itself, and the published code ignores a bias: take a model whose "
            "down-projection is a plain linear layer without bias, adapter or quantisation, or leave compat away"
        )
    return weight.detach().float().clone()
