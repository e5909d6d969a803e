"""Nearest keys: an exact search in blocks that fit the processor's cache."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores of one block, in numbers: 1 MiB on a CPU (its second-level cache), more on a GPU, which is kept busy by size.
_BLOCK = {"cpu": 1 << 18}
_LARGE_BLOCK = 1 << 25


def project(features: Tensor, projection: Tensor | None, heads: int) -> Tensor:
    """Queries of every head.

    Args:
        features: (N, D).
        projection: (C, D, k), or None for consecutive slices of length D / C.
        heads: C.

    Returns:
        (N, C, k).
    """
    if projection is None:
        return features.view(len(features), heads, -1)
    c, d, k = projection.shape
    queries: Tensor = features @ projection.permute(1, 0, 2).reshape(d, c * k)
    return queries.view(-1, c, k)


@torch.no_grad()
def nearest(
    queries: Tensor,
    keys: Tensor,
    *,
    top_k: int = 1,
    allowed: Tensor | None = None,
    noise: Tensor | None = None,
    temperature: float = 0.0,
) -> Tensor:
    """The ``top_k`` nearest keys of each head by Euclidean distance, nearest first; of equal ones the first.

    ``|q - K_j|^2 = |q|^2 - 2 (q K_j - |K_j|^2 / 2)``: the largest ``q K_j - |K_j|^2 / 2`` is the nearest. One head and
    few rows at a time, so that no more than a block of scores exists at once.

    Args:
        queries: (N, C, k).
        keys: (C, K, k), K < 2**15.
        top_k: how many.
        allowed: bool (C, K), the keys to choose from; None = all. Where a head has none, its first key is the answer.
        noise: (C, N, K) Gumbel noise; with ``temperature`` above 0 a key is drawn with probability
            softmax(-distance^2 / temperature).
        temperature: see ``noise``.

    Returns:
        int16 (N, C, top_k).
    """
    n, heads, _ = queries.shape
    pairs = keys.shape[1]
    bias = -0.5 * keys.square().sum(dim=2)
    if allowed is not None:
        bias = bias.masked_fill(~allowed, -torch.inf)
    found = torch.empty(n, heads, top_k, dtype=torch.int16, device=queries.device)
    rows = max(16, _BLOCK.get(queries.device.type, _LARGE_BLOCK) // pairs)
    for c in range(heads):
        transposed = keys[c].t()
        for start in range(0, n, rows):
            block = slice(start, start + rows)
            scores = torch.addmm(bias[c], queries[block, c], transposed)
            if noise is not None and temperature > 0:
                scores = scores * (2 / temperature) + noise[c, block]
            found[block, c] = _best(scores, top_k)
    return found


def _best(scores: Tensor, top_k: int) -> Tensor:
    """(R, K) to int16 (R, top_k)."""
    if top_k > 1:
        return scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k].to(torch.int16)
    if scores.device.type == "cpu":
        # numpy's argmax uses vector instructions where torch's does not: a tenth of the time.
        return torch.from_numpy(scores.numpy().argmax(axis=1)).to(torch.int16).unsqueeze(1)
    return scores.argmax(dim=1, keepdim=True).to(torch.int16)
