"""Attacks that bring back what was only hidden: training a little on some of it, and rounding the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clkit.models.base import Model
from clkit.models.lora import base_model
from clkit.tasks.batch import Encoded


def relearn(
    model: Model, parameters: Sequence[nn.Parameter], encoded: Encoded, *, steps: int, rate: float, rows: int = 8
) -> None:
    """Train briefly on records that were forgotten: AdamW on so many rows a step, in their order, over and over.

    The same attack on a retrained model is what the outcome is compared with
    (:func:`clkit.metrics.unlearning.relearning_robustness`).
    """
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for step in range(steps):
        drawn = torch.arange(rows * step, rows * (step + 1)) % len(encoded)
        optimizer.zero_grad()
        torch.autograd.backward(model.loss(encoded.batch(torch.unique(drawn)).to(model.device)))
        optimizer.step()
    optimizer.zero_grad()


@contextmanager
def quantised(module: nn.Module, bits: int) -> Iterator[None]:
    """Within, the weights of all linear layers but the output layer are rounded; adapters are merged before.

    Round to nearest, symmetric, one scale per output: what post-training quantisation without data does. Small changes,
    such as those of approximate unlearning, can be rounded away (Zhang et al. 2024).

    Args:
        module: a language model, with or without a peft adapter.
        bits: 4 or 8, say; at least 2.
    """
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, its weight transposed

    adapted: Any = module if hasattr(module, "merge_adapter") else None
    whole: Any = base_model(module)
    head = whole.get_output_embeddings() if hasattr(whole, "get_output_embeddings") else None
    linear = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    layers: list[Any] = [m for n, m in linear if "lora_" not in n and m is not head]
    before = [layer.weight.detach().clone() for layer in layers]
    if adapted is not None:
        adapted.merge_adapter()
    try:
        with torch.no_grad():
            for layer in layers:
                weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
                weight.copy_(rounded(weight, bits))
        yield
    finally:
        if adapted is not None:
            adapted.unmerge_adapter()
        with torch.no_grad():
            for layer, weight in zip(layers, before, strict=True):
                layer.weight.copy_(weight)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A matrix (out, in) as ``bits``-bit integers times a scale per row.

    >>> rounded(torch.tensor([[7.0, -3.4, 0.4], [0.0, 0.0, 0.0]]), 4)
    tensor([[ 7., -3.,  0.],
            [ 0.,  0.,  0.]])
    """
    most = 2 ** (bits - 1) - 1
    scale = weight.float().abs().amax(dim=1, keepdim=True) / most
    found: Tensor = (weight.float() / scale.clamp(min=1e-30)).round().clamp(-most, most) * scale + 0.0
    return found.to(weight.dtype)
