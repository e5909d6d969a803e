"""Encoded examples and the batches made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(slots=True)
class Batch:
    """Examples, collated and ready for the module.

    Attributes:
        inputs: keyword arguments of the module's forward; for a language model ``input_ids`` and
            ``attention_mask`` (B, T), for a classifier what its backbone takes.
        labels: (B, T) next-token targets with -100 where nothing is learned (a label stands at the position of its
            own token, as in transformers), or (B,) classes.
        num_targets: how many labels are learned from; the loss is a mean over them.
        indices: (B,) positions in ``source``.
        source: where the examples come from.
        replayed: (B,) bool, True for rehearsed examples; None when there are none.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    num_targets: int
    indices: Tensor
    source: Encoded
    replayed: Tensor | None = None

    @property
    def ids(self) -> list[str]:
        """Record ids of the rows."""
        return [self.source.ids[i] for i in self.indices.tolist()]

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device`` (itself when it is there already)."""
        if self.labels.device == device:
            return self
        return replace(
            self,
            inputs={k: v.to(device, non_blocking=True) for k, v in self.inputs.items()},
            labels=self.labels.to(device, non_blocking=True),
            replayed=None if self.replayed is None else self.replayed.to(device),
        )

    def rows(self, mask: Tensor) -> Batch:
        """The rows where the bool ``mask`` (B,) holds."""
        labels = self.labels[mask]
        return Batch(
            {k: v[mask] for k, v in self.inputs.items()},
            labels,
            count_targets(labels),
            self.indices[mask.to(self.indices.device)],
            self.source,
            None if self.replayed is None else self.replayed[mask],
        )


def count_targets(labels: Tensor) -> int:
    """How many labels are learned from: classes (B,), or next-token targets (B, T); position 0 predicts nothing."""
    return labels.numel() if labels.dim() == 1 else int((labels[:, 1:] != -100).sum())


class Encoded(ABC):
    """Examples in the model's own form (token ids, tensors), from which batches are cut.

    Attributes:
        ids: record ids, one per example.
        lengths: tokens per example, or None when all are alike; batches are grouped by it.
    """

    ids: Sequence[str]
    lengths: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def batch(self, indices: Tensor) -> Batch:
        """Collate the examples at ``indices`` (LongTensor (B,)) on the CPU."""
