"""Merge the sparse deltas of several shards into one: TIES, linear, sign, DARE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clkit.strategies.wise.delta import SparseDelta


def merge(
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    how: str = "ties",
    density: float = 1.0,
    generator: torch.Generator | None = None,
) -> SparseDelta:
    """One delta for several; work and memory go with the union of their supports.

    Args:
        deltas: of the same shape.
        weights: how much each counts.
        how: ``ties`` (Yadav et al. 2023: keep the largest entries, elect a sign per entry by the weighted sum, average
            the shards that agree with it), ``sign`` (the same with every entry kept), ``linear`` (weighted sum),
            ``dare`` (Yu et al. 2024: drop entries at random, rescale the rest, weighted sum).
        density: part of the matrix's entries that ``ties`` keeps of each delta; part of a delta's own entries that
            ``dare`` keeps.
        generator: draws what ``dare`` drops.

    Raises:
        ValueError: no delta, or deltas of different shapes.
    """
    if not deltas or any(d.shape != deltas[0].shape for d in deltas):
        raise ValueError(f"need deltas of one shape (got {[d.shape for d in deltas]})")
    shape = deltas[0].shape
    index = torch.unique(torch.cat([d.index for d in deltas]))
    rows = torch.zeros(len(deltas), len(index), dtype=torch.float32)
    for row, delta in zip(rows, deltas, strict=True):
        row[torch.searchsorted(index, delta.index)] = delta.values
    if how == "ties":
        rows = torch.stack([_largest(row, int(density * shape[0] * shape[1])) for row in rows])
    elif how == "dare" and density < 1:
        kept = torch.rand(rows.shape, generator=generator, dtype=torch.float32) < density
        rows = rows * kept / density
    weight = torch.tensor(list(weights), dtype=torch.float32)[:, None]
    merged = agreed_mean(rows, weight) if how in ("ties", "sign") else (rows * weight).sum(dim=0)
    support = merged != 0
    return SparseDelta(shape, index[support], merged[support])


def agreed_mean(rows: Tensor, weight: Tensor) -> Tensor:
    """(N,) per entry the weighted mean of those of ``rows`` (K, N) whose sign is that of the weighted sum.

    A zero agrees with no sign, so an entry that only one shard changed keeps its whole change. ``weight`` is (K, 1).
    """
    weighted = rows * weight
    sign = torch.where(weighted.sum(dim=0) >= 0, 1.0, -1.0)
    agree = torch.sign(weighted) == sign
    total = (weight * agree).sum(dim=0)
    return (weighted * agree).sum(dim=0) / torch.where(total == 0, 1.0, total)


def _largest(row: Tensor, count: int) -> Tensor:
    """``row`` with all but its ``count`` largest entries by magnitude set to 0."""
    if int(row.count_nonzero()) <= count:
        return row
    kept = torch.zeros_like(row)
    top = row.abs().topk(count).indices
    kept[top] = row[top]
    return kept
