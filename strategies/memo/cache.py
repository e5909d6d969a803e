"""What a frozen shared part makes of every example of a stage, computed once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clkit.tasks.batch import Batch, Encoded

Compute = Callable[[Batch], "tuple[Tensor, Tensor]"]


class CachedMaps(Encoded):
    """Batches with the shared part's ``maps`` and the old blocks' features ``old`` in the place of the images.

    Args:
        source: where the examples come from; batches keep its positions.
        positions: (N,) of the examples to compute.
        compute: a batch to maps (B, ...) and features (B, D), without a graph.
        batch_size: of the computation. The same at every call, so that a resumed run rounds alike.
    """

    def __init__(self, source: Encoded, positions: Tensor, compute: Compute, batch_size: int) -> None:
        self.ids = source.ids
        self._row = torch.full((len(source),), -1, dtype=torch.long)
        self._row[positions] = torch.arange(len(positions))
        self._labels = torch.empty(len(positions), dtype=torch.long)
        done = 0
        for part in torch.split(positions, batch_size):
            batch = source.batch(part)
            maps, old = (value.cpu() for value in compute(batch))
            if not done:
                # One allocation each: a list of parts would need twice the memory to be joined.
                self._maps = torch.empty((len(positions), *maps.shape[1:]), dtype=maps.dtype)
                if maps.dim() == 4:
                    self._maps = self._maps.to(memory_format=torch.channels_last)
                self._old = old.new_empty((len(positions), old.shape[1]))
            rows = slice(done, done + len(part))
            self._maps[rows], self._old[rows], self._labels[rows] = maps, old, batch.labels
            done += len(part)

    @property
    def bytes(self) -> int:
        """What the maps and features occupy."""
        return self._maps.nbytes + self._old.nbytes

    def batch(self, indices: Tensor) -> Batch:
        """Inputs ``maps`` and ``old``, and labels (B,)."""
        rows = self._row[indices]
        inputs = {"maps": self._maps[rows], "old": self._old[rows]}
        return Batch(inputs, self._labels[rows], len(indices), indices, self)
