"""The cumulative masks: what earlier tasks protect, per matrix, in little memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clkit.strategies.reglora.sparse import Mask, Pattern

_CHUNK = 1 << 20  # bytes of a bit mask that are read at a time


def extend(old: Mask | None, rows: Tensor, cols: Tensor, shape: tuple[int, int], accumulate: str) -> Mask:
    """The mask after one more task.

    Args:
        old: None after the first task.
        rows: (k,) distinct positions, with ``cols``.
        cols: see ``rows``.
        shape: of the matrix.
        accumulate: ``concat``: a position chosen by c tasks counts c times; ``union``: once.
    """
    flat = rows * shape[1] + cols
    weights = torch.ones_like(flat)
    if old is not None:
        past = old.pattern.flat()
        flat = torch.cat([flat, past])
        weights = torch.cat([weights, torch.ones_like(past) if old.multiplicity is None else old.multiplicity.long()])
    distinct, inverse = torch.unique(flat, return_inverse=True)
    counts = torch.zeros_like(distinct).index_add_(0, inverse, weights)
    multiplicity = None
    if accumulate == "concat" and bool((counts > 1).any()):
        multiplicity = counts.to(torch.uint8 if int(counts.max()) < 256 else torch.int32)
    return Mask.of(Pattern.of(distinct, shape), shape, multiplicity)


def to_state(mask: Mask) -> dict[str, Any]:
    """What is stored: int32 compressed rows with one byte of multiplicity, or one bit per entry where that is less."""
    pattern = mask.pattern
    height, width = pattern.shape
    state: dict[str, Any] = {"shape": [height, width]}
    size = -(-height * width // 8)
    if mask.multiplicity is None and size < 4 * (len(pattern.col) + len(pattern.crow)):
        flat = pattern.flat().cpu()
        bits = torch.ones_like(flat, dtype=torch.uint8) << (7 - flat % 8).to(torch.uint8)
        # Positions are distinct, so adding sets bits.
        return {**state, "bits": torch.zeros(size, dtype=torch.uint8).index_add_(0, flat // 8, bits)}
    return {**state, "crow": pattern.crow, "col": pattern.col, "multiplicity": mask.multiplicity}


def from_state(state: dict[str, Any], device: torch.device) -> Mask:
    """Inverse of :func:`to_state`."""
    shape = (int(state["shape"][0]), int(state["shape"][1]))
    if "bits" in state:
        return Mask.of(Pattern.of(_positions(state["bits"]), shape).to(device), shape)
    multiplicity = state["multiplicity"]
    pattern = Pattern(shape, state["crow"], state["col"]).to(device)
    return Mask.of(pattern, shape, None if multiplicity is None else multiplicity.to(device))


def _positions(bits: Tensor) -> Tensor:
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    found = [
        ((chunk[:, None] >> shifts) & 1).flatten().nonzero().squeeze(1) + 8 * _CHUNK * i
        for i, chunk in enumerate(torch.split(bits, _CHUNK))
    ]
    return torch.cat(found)


def stored_bytes(mask: Mask) -> int:
    """Size of :func:`to_state`'s tensors."""
    return sum(v.numel() * v.element_size() for v in to_state(mask).values() if isinstance(v, Tensor))
