"""Features of many examples at once, by the network as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from clkit.evaluation.base import evaluation_mode
from clkit.models.base import Model
from clkit.tasks.batch import Encoded


def extract(model: Model, encoded: Encoded, batch_size: int, indices: Tensor | None = None) -> Tensor:
    """Features (N, D) of the examples at ``indices`` (all of them by default), in evaluation mode, on the CPU."""
    chosen = torch.arange(len(encoded)) if indices is None else indices
    rows = []
    with evaluation_mode(model):
        for part in torch.split(chosen, batch_size):
            rows.append(model.features(encoded.batch(part).to(model.device)).float().cpu())
    return torch.cat(rows).clone()  # a plain tensor: those made under inference mode can't meet autograd
