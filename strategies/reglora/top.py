"""Which entries a task protects: the exact largest of |B A|, found block by block, or as many random ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 1 << 20  # entries looked at a time
_INDEX_BITS = 32
_LAST_INDEX = (1 << _INDEX_BITS) - 1


@torch.no_grad()
def top_entries(B: Tensor, A: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """The ``int(fraction * m * n)`` largest entries of |B A|, without the dense product.

    The product is formed in the factors' type and compared as float32, as published; of equal entries the one that
    comes first in row-major order wins. Memory: twice the entries wanted and one block.

    Args:
        B: (m, r).
        A: (r, n).
        fraction: in [0, 1].

    Returns:
        Row and column indices (k,) int64, largest first.

    Raises:
        ValueError: the matrix has more than 2**32 entries.
    """
    height, width = B.shape[0], A.shape[1]
    rows = max(1, _BLOCK // width)
    blocks = ((part @ A).abs().float() for part in torch.split(B, rows))
    flat = _largest(blocks, height * width, int(fraction * height * width), B.device)
    return flat // width, flat % width


def random_entries(shape: tuple[int, int], fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """As many distinct random entries as :func:`top_entries` gives: those of the largest of uniform numbers."""
    height, width = shape
    rows = max(1, _BLOCK // width)
    blocks = (torch.rand(min(rows, height - start), width, generator=generator) for start in range(0, height, rows))
    flat = _largest(blocks, height * width, int(fraction * height * width), torch.device("cpu"))
    return flat // width, flat % width


def _largest(blocks: Iterator[Tensor], size: int, count: int, device: torch.device) -> Tensor:
    """Flat positions (count,) of the largest of ``size`` non-negative float32 numbers, given in consecutive blocks.

    The bits of a non-negative float, read as an integer, are ordered as the float is. With the position counted down
    in the lower half, every entry has a different 64-bit key and the order is total.
    """
    if size > _LAST_INDEX + 1:
        raise ValueError(f"a matrix of {size} entries is too large for exact selection (at most {_LAST_INDEX + 1})")
    kept = torch.empty(0, dtype=torch.long, device=device)
    if not count:
        return kept
    start, floor = 0, -1
    for block in blocks:
        bits = block.contiguous().view(torch.int32).flatten()
        above = (bits > floor).nonzero().squeeze(1)
        keys = (bits[above].long() << _INDEX_BITS) | (_LAST_INDEX - start - above)
        kept = torch.cat([kept, keys])
        start += bits.numel()
        if len(kept) >= 2 * count:
            kept = kept.topk(count, sorted=False).values
            floor = int(kept.min()) >> _INDEX_BITS
    best = kept.topk(count).values
    return _LAST_INDEX - (best & _LAST_INDEX)
