"""Which entries of the matrix a shard of edits may change."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clkit.rng import fresh_generator


def shard_mask(shape: tuple[int, int], ratio: float, seed: int, shard: int, compat: bool = False) -> Tensor:
    """Bool mask (out, in) of shard number ``shard``; each entry is in it with probability ``ratio``.

    Masks of different shards are independent, so a part ``ratio ** 2`` of the entries is shared by two of them: the
    anchors of the merge. A function of its arguments alone.

    Args:
        shape: (out, in).
        ratio: expected part of the entries.
        seed: of the run.
        shard: number of the shard, from 0.
        compat: as the published code draws it from numpy's global generator, when nothing else has drawn from it.
    """
    if compat:
        state = np.random.RandomState(seed % 2**32)
        for _ in range(shard + 1):
            drawn = state.choice([1, 0], size=shape[0] * shape[1], p=[ratio, 1 - ratio])
        return torch.from_numpy(drawn.astype(bool)).view(shape)
    return torch.rand(shape, generator=fresh_generator(seed, "wise mask", shard), dtype=torch.float32) < ratio
