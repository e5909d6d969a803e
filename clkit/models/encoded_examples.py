"""Labelled examples in the form that a classifier reads: tensors as they are, texts as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clkit.tasks.base import Inputs
from clkit.tasks.batch import Batch, Encoded


class EncodedLabelled(Encoded):
    """Examples with one class each.

    Attributes:
        labels: LongTensor (N,).
    """

    labels: Tensor


class EncodedTensors(EncodedLabelled):
    """Images or vectors. A batch is one ``index_select``: for small networks nothing else would be fast enough."""

    def __init__(self, inputs: Tensor | Inputs, labels: Tensor, ids: Sequence[str]) -> None:
        self.inputs = inputs
        self.labels = labels
        self.ids = ids

    def batch(self, indices: Tensor) -> Batch:
        """Inputs ``x`` (B, ...) and labels (B,)."""
        inputs = self.inputs
        x = inputs.index_select(0, indices) if isinstance(inputs, Tensor) else inputs[indices]
        return Batch({"x": x}, self.labels.index_select(0, indices), len(indices), indices, self)


class EncodedSentences(EncodedLabelled):
    """Texts, tokenised once with their special tokens; the end of a text longer than ``max_length`` is cut."""

    def __init__(
        self, texts: Sequence[str], labels: Tensor, ids: Sequence[str], tokenizer: Any, max_length: int
    ) -> None:
        self.labels = labels
        self.ids = ids
        self._pad: int = tokenizer.pad_token_id or 0  # masked wherever it stands
        rows = []
        if texts:
            encoded = tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)
            rows = [np.asarray(row, dtype=np.int32) for row in encoded["input_ids"]]
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self._flat = torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32))
        self._lengths = torch.from_numpy(self.lengths)
        self._starts = self._lengths.cumsum(0) - self._lengths

    def batch(self, indices: Tensor) -> Batch:
        """Right-padded ``input_ids`` and ``attention_mask`` (B, T), and labels (B,)."""
        lengths = self._lengths[indices]
        columns = torch.arange(int(lengths.max()) if len(indices) else 0)
        real = columns < lengths[:, None]
        places = torch.where(real, self._starts[indices][:, None] + columns, 0)
        ids = torch.where(real, self._flat[places], self._pad).long()
        inputs = {"input_ids": ids, "attention_mask": real.long()}
        return Batch(inputs, self.labels[indices], len(indices), indices, self)
