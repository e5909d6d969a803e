"""Whether a prompt looks like one of a memory's edits: what the projection reads, without what all prompts share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Leading directions that are taken out, and signs that are kept of each edit (README.md, "Likeness").
_SHARED = 8
_SIGNS = 768
# Of a standard normal number: what a sign keeps of it.
_MEAN_SIZE = (2 / torch.pi) ** 0.5


class Likeness:
    """Cosines between readings, without the directions in which all prompts are alike.

    Of an edit only the signs of random projections are kept (96 bytes), against which a prompt's projections
    themselves are compared: their mean product is the cosine, give or take .045 (Charikar 2002, the query left whole).

    Args:
        shared: (k, in) orthonormal.
    """

    def __init__(self, shared: Tensor) -> None:
        self.shared = shared.cpu()
        signs = _unpacked(hashlib.shake_256(b"clkit wise likeness").digest(shared.shape[1] * _SIGNS // 8))
        self._projections = signs.view(shared.shape[1], _SIGNS)
        self._there: dict[torch.device, tuple[Tensor, Tensor]] = {}  # the model may move

    @classmethod
    def between(cls, readings: Tensor) -> Likeness:
        """From (N, in) readings of prompts that have nothing to do with each other."""
        alike = F.normalize(readings.float(), dim=-1)
        count = min(_SHARED, len(alike) // 2, alike.shape[1] // 4)
        shared = torch.linalg.svd(alike, full_matrices=False).Vh[:count]
        return cls(shared.half().float())  # as it is saved

    def prints(self, readings: Tensor) -> Tensor:
        """(N, 96) uint8 on the CPU: what is kept of readings (N, in)."""
        bits = (self._projected(readings) > 0).cpu().numpy()
        return torch.from_numpy(np.packbits(bits, axis=1))

    def __call__(self, readings: Tensor, prints: Tensor) -> Tensor:
        """(B, N) how alike readings (B, in) are to those that ``prints`` (N, 96) were made of."""
        kept = _unpacked(prints.cpu().numpy().tobytes()).view(-1, _SIGNS).to(readings.device)
        found: Tensor = self._projected(readings) @ kept.T / (_SIGNS * _MEAN_SIZE)
        return found.clamp(-1.0, 1.0)

    def _projected(self, readings: Tensor) -> Tensor:
        device = readings.device
        if device not in self._there:
            self._there = {device: (self.shared.to(device), self._projections.to(device))}
        shared, projections = self._there[device]
        own = F.normalize(readings.float(), dim=-1)
        return F.normalize(own - own @ shared.T @ shared, dim=-1) @ projections


def _unpacked(packed: bytes) -> Tensor:
    """(8 n,) -1 and 1 from n bytes."""
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8))
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1)


class Gate:
    """How alike a prompt is to the nearest edit of each memory; a memory answers only what is alike enough.

    Args:
        limit: the least likeness; 0 = there is no gate.

    Attributes:
        likeness: how readings are compared; None before the first edit.
        prints: per edit, (96,) uint8.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.likeness: Likeness | None = None
        self.prints: dict[str, Tensor] = {}

    def add(self, edit: str, reading: Tensor) -> None:
        """Remember the reading (in,) of an edit's prompt."""
        self.prints[edit] = self._settled().prints(reading[None])[0]

    def __call__(self, readings: Tensor, edits: Sequence[Sequence[str]]) -> Tensor:
        """(B, M) the likeness of readings (B, in) to the nearest of each memory's edits."""
        found = self.alike(readings, [i for ids in edits for i in ids])
        parts = torch.split(found, [len(ids) for ids in edits], dim=1)
        return torch.stack([part.amax(dim=1) for part in parts], dim=1)

    def alike(self, readings: Tensor, edits: Sequence[str]) -> Tensor:
        """(B, N) the likeness of readings (B, in) to edits; all must have been added."""
        return self._settled()(readings, torch.stack([self.prints[i] for i in edits]))

    def _settled(self) -> Likeness:
        if self.likeness is None:
            raise RuntimeError("a gate compares with edits, and there are none yet")
        return self.likeness

    def state_dict(self) -> dict[str, Any] | None:
        """What all prompts share, and the prints of all edits, one after another; None without a gate."""
        if self.likeness is None:
            return None
        prints = torch.stack(list(self.prints.values())) if self.prints else torch.zeros(0, _SIGNS // 8).byte()
        return {"shared": self.likeness.shared.half(), "prints": prints}

    def load_state_dict(self, state: dict[str, Any] | None, edits: Sequence[str]) -> None:
        """Inverse of :meth:`state_dict`, for the same edits in the same order."""
        self.likeness, self.prints = None, {}
        if state is not None:
            self.likeness = Likeness(state["shared"].float())
            self.prints = dict(zip(edits, state["prints"], strict=True))
