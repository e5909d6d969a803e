"""The codebook: keys, the radius in which each answers, and how a new edit changes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clkit.models.additions import KeptTypes

# A key that was split down to nothing is still found by its own prompt in a padded batch, which rounds differently.
LEAST_RADIUS = 1e-3


@dataclass(frozen=True)
class Entry:
    """A key and what it stands for.

    Attributes:
        key: (in,) of length 1.
        radius: prompts whose activation is not further away are answered.
        target: the answer.
        edits: ids of the edits that it answers, the one that made it first.
        value: (out,) what the layer gives instead; None while it is not learned.
    """

    key: Tensor
    radius: float
    target: str
    edits: tuple[str, ...]
    value: Tensor | None = None

    @property
    def name(self) -> str:
        """``key-`` and the id of the edit that made it."""
        return f"key-{self.edits[0]}"


def unit(values: Tensor) -> Tensor:
    """(..., d) float32 at length 1, so that one radius suits every model."""
    return torch.nn.functional.normalize(values.float(), dim=-1)


def distances(queries: Tensor, keys: Tensor) -> Tensor:
    """(B, N) Euclidean, between rows of length 1: from 0 to 2; exact at 0."""
    return torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")


def nearest(gaps: Tensor) -> Tensor:
    """(B,) the column of each row's smallest distance; of equal ones the newest.

    >>> nearest(torch.tensor([[0.5, 0.1, 0.1], [0.0, 2.0, 1.0]])).tolist()
    [2, 0]
    """
    return gaps.shape[1] - 1 - gaps.flip(1).argmin(dim=1)


def admit(entries: Sequence[Entry], edit: str, key: Tensor, target: str, radius: float) -> tuple[list[Entry], int]:
    """The codebook with one more edit (Hartvigsen et al. 2023, algorithm 1), and which entry answers it.

    With d the distance to the nearest key and e its radius: ``d > e + radius`` makes an entry of its own; else, with
    the same target, the nearest entry takes the edit and grows to d if it is smaller; with another target a new entry
    is made and both get at most d / 2 (the published code sets both to d / 2, which can widen the old one).

    Args:
        entries: so far; not changed.
        edit: id of the new edit.
        key: (in,) of length 1.
        target: its answer.
        radius: of an entry without neighbours.
    """
    made = Entry(key, radius, target, (edit,))
    if not entries:
        return [made], 0
    gaps = distances(key[None], torch.stack([e.key for e in entries]))
    place = int(nearest(gaps))
    gap, close = float(gaps[0, place]), entries[place]
    changed = list(entries)
    if gap > close.radius + radius:
        return [*changed, made], len(changed)
    if close.target == target:
        changed[place] = replace(close, radius=max(close.radius, gap), edits=(*close.edits, edit))
        return changed, place
    half = max(gap / 2, LEAST_RADIUS)
    changed[place] = replace(close, radius=min(close.radius, half))
    return [*changed, replace(made, radius=min(radius, half))], len(changed)


class Codebook(KeptTypes):
    """The entries as tensors, for the forward pass.

    Attributes:
        keys: buffer (N, in).
        values: buffer (N, out).
        radii: buffer (N,).
    """

    keys: Tensor
    values: Tensor
    radii: Tensor

    def __init__(self, keys: Tensor, values: Tensor, radii: Tensor) -> None:
        super().__init__()
        self.register_buffer("keys", keys)
        self.register_buffer("values", values)
        self.register_buffer("radii", radii)

    def gaps(self, activations: Tensor) -> Tensor:
        """(B, N) distances of ``activations`` (B, in) to the keys."""
        return distances(unit(activations), self.keys)

    def find(self, gaps: Tensor) -> list[int]:
        """The entry that answers each row of :meth:`gaps`; -1 for none."""
        place = nearest(gaps)
        within = gaps.gather(1, place[:, None])[:, 0] <= self.radii[place]
        return torch.where(within, place, -1).tolist()
