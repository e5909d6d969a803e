"""Tokens put into the rows of a batch: what is inserted where, and where everything else went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Insertion:
    """What is told before one sequence's prompt.

    Attributes:
        edit: id of the edit; None = nothing is inserted.
        at: index in the row (padding counts) before which it is inserted.
        tokens: it.
    """

    edit: str | None
    at: int
    tokens: tuple[int, ...]


class Widening:
    """The same number S of columns put into each row: padding, then the row's own tokens.

    Args:
        rows: one per sequence.
        device: of the batch.
    """

    def __init__(self, rows: Sequence[Insertion], device: torch.device) -> None:
        self.rows = rows
        self.extra = max(len(r.tokens) for r in rows)
        self._at = torch.tensor([r.at for r in rows], device=device)[:, None]

    def ids(self, ids: Tensor, pad: int) -> Tensor:
        """(B, T) -> (B, S + T) tokens."""
        return self._widened(ids, [[pad] * (self.extra - len(r.tokens)) + list(r.tokens) for r in self.rows])

    def mask(self, mask: Tensor) -> Tensor:
        """(B, T) -> (B, S + T) attention mask; also of rows that have grown since."""
        return self._widened(mask, [[0] * (self.extra - len(r.tokens)) + [1] * len(r.tokens) for r in self.rows])

    def narrowed(self, values: Tensor) -> Tensor:
        """(B, S + T, d) -> (B, T, d) at the tokens that were there before."""
        places = self._places(values.shape[1] - self.extra, values.device)
        return values.gather(1, places[..., None].expand(-1, -1, values.shape[2]))

    def _places(self, length: int, device: torch.device) -> Tensor:
        """(B, T) where each token of the original row is now."""
        places = torch.arange(length, device=device)[None].expand(len(self.rows), -1)
        return places + self.extra * (places >= self._at)

    def _widened(self, values: Tensor, inserted: list[list[int]]) -> Tensor:
        wide = values.new_empty(len(self.rows), values.shape[1] + self.extra)
        columns = self._at + torch.arange(self.extra, device=values.device)
        wide.scatter_(1, columns, torch.tensor(inserted, dtype=values.dtype, device=values.device))
        return wide.scatter_(1, self._places(values.shape[1], values.device), values)
