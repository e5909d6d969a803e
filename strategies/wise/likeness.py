"""Whether a prompt looks like one of a memory's edits: what the projection reads, without what all prompts share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clkit.models.routing import at_last_token, mean_over

# Of what is read at the last token, and of the mean: leading directions that are taken out, and the part of the cosine
# that each makes up; signs that are kept of both together (README.md, "Likeness").
_SHARED, _WEIGHTS = (8, 1), (0.8, 0.2)
_SIGNS = 768
# That the limit rises to. An edit's own prompt has 1, give or take .03, by its signs.
_HIGHEST = 0.8
# Of a standard normal number: what a sign keeps of it.
_MEAN_SIZE = (2 / torch.pi) ** 0.5


def readings_of(x: Tensor, mask: Tensor | None, mean: Tensor | None = None) -> Tensor:
    """(B, 2, in) float32 of ``x`` (B, T, in): at the last token that ``mask`` marks, and the mean over all of those.

    ``mean``: that of a longer prompt, whose first tokens are in a cache.
    """
    return torch.stack([at_last_token(x, mask)[:, 0].float(), mean_over(x, mask) if mean is None else mean], dim=1)


class Likeness:
    """Cosines between readings, without the directions in which all prompts are alike.

    What is read at the last token knows what is asked, the mean over all tokens also of whom; their cosines are added
    up by fixed weights. Of an edit only the signs of random projections are kept (96 bytes), against which a prompt's
    projections themselves are compared: their mean product is the cosine, give or take .045 (Charikar 2002, the query
    left whole).

    Args:
        shared: for the last token and for the mean, (k, in) orthonormal; without the second only the last token counts,
            as it was in directories of before.
    """

    def __init__(self, shared: Sequence[Tensor]) -> None:
        self.shared = [directions.cpu() for directions in shared]
        self._weights = _WEIGHTS if len(self.shared) > 1 else (1.0,)
        width = sum(directions.shape[1] for directions in self.shared)
        signs = _unpacked(hashlib.shake_256(b"clkit wise likeness").digest(width * _SIGNS // 8))
        self._projections = signs.view(width, _SIGNS)
        self._there: dict[torch.device, tuple[list[Tensor], Tensor]] = {}  # the model may move

    @classmethod
    def between(cls, readings: Tensor) -> Likeness:
        """From (N, 2, in) readings of prompts that have nothing to do with each other."""
        found = []
        for read, most in zip(readings.float().unbind(dim=1), _SHARED, strict=True):
            count = min(most, len(read) // 2, read.shape[1] // 4)
            shared = torch.linalg.svd(F.normalize(read, dim=-1), full_matrices=False).Vh[:count]
            found.append(shared.half().float())  # as it is saved
        return cls(found)

    def prints(self, readings: Tensor) -> Tensor:
        """(N, 96) uint8 on the CPU: what is kept of readings (N, 2, in)."""
        bits = (self._projected(readings) > 0).cpu().numpy()
        return torch.from_numpy(np.packbits(bits, axis=1))

    def __call__(self, readings: Tensor, prints: Tensor) -> Tensor:
        """(B, N) how alike readings (B, 2, in) are to those that ``prints`` (N, 96) were made of."""
        kept = _unpacked(prints.cpu().numpy().tobytes()).view(-1, _SIGNS).to(readings.device)
        found: Tensor = self._projected(readings) @ kept.T / (_SIGNS * _MEAN_SIZE)
        return found.clamp(-1.0, 1.0)

    def _projected(self, readings: Tensor) -> Tensor:
        device = readings.device
        if device not in self._there:
            self._there = {device: ([s.to(device) for s in self.shared], self._projections.to(device))}
        shared, projections = self._there[device]
        parts = []
        for read, directions, weight in zip(readings.float().unbind(dim=1), shared, self._weights, strict=False):
            own = F.normalize(read, dim=-1)
            parts.append(weight**0.5 * F.normalize(own - own @ directions.T @ directions, dim=-1))
        return torch.cat(parts, dim=-1) @ projections


def _unpacked(packed: bytes) -> Tensor:
    """(8 n,) -1 and 1 from n bytes."""
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8))
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1)


class Gate:
    """How alike a prompt is to the nearest edit of each memory; a memory answers only what is alike enough.

    Args:
        least: the lowest that the limit can be; 0 = there is no gate.
        false_positive_rate: the part of unrelated prompts that may pass once enough are known; 1 = the limit stays.

    Attributes:
        limit: what a prompt's likeness must be at least.
        likeness: how readings are compared; None before the first edit.
        prints: per edit, (96,) uint8.
    """

    def __init__(self, least: float, false_positive_rate: float = 1.0) -> None:
        self.limit = self.least = least
        self.false_positive_rate = false_positive_rate
        self.likeness: Likeness | None = None
        self.prints: dict[str, Tensor] = {}

    def add(self, edit: str, reading: Tensor) -> None:
        """Remember the readings (2, in) of an edit's prompt."""
        self.prints[edit] = self._settled().prints(reading[None])[0]

    def __call__(self, readings: Tensor, edits: Sequence[Sequence[str]]) -> Tensor:
        """(B, M) the likeness of readings (B, 2, in) to the nearest of each memory's edits."""
        found = self.alike(readings, [i for ids in edits for i in ids])
        parts = torch.split(found, [len(ids) for ids in edits], dim=1)
        return torch.stack([part.amax(dim=1) for part in parts], dim=1)

    def alike(self, readings: Tensor, edits: Sequence[str]) -> Tensor:
        """(B, N) the likeness of readings (B, 2, in) to edits; all must have been added."""
        return self._settled()(readings, torch.stack([self.prints[i] for i in edits]))

    def adjust(self, unrelated: Sequence[Tensor]) -> None:
        """Put the limit where no more of readings (2, in) pass than may, and not below ``least``.

        The more edits there are, the more prompts happen to look like one of them.
        """
        count = int(self.false_positive_rate * len(unrelated))  # that may pass
        self.limit = self.least
        if self.prints and count < len(unrelated):
            nearest = self.alike(torch.stack(list(unrelated)), list(self.prints)).amax(dim=1).cpu()
            first = nearest.sort(descending=True).values[count]  # of those that may not
            above = float(torch.nextafter(first, torch.full_like(first, math.inf)))
            self.limit = max(self.least, min(above, _HIGHEST))

    def _settled(self) -> Likeness:
        if self.likeness is None:
            raise RuntimeError("a gate compares with edits, and there are none yet")
        return self.likeness

    def state_dict(self) -> dict[str, Any] | None:
        """What all prompts share, and the prints of all edits, one after another; None without a gate."""
        if self.likeness is None:
            return None
        prints = torch.stack(list(self.prints.values())) if self.prints else torch.zeros(0, _SIGNS // 8).byte()
        return {"shared": [s.half() for s in self.likeness.shared], "prints": prints, "limit": self.limit}

    def load_state_dict(self, state: dict[str, Any] | None, edits: Sequence[str]) -> None:
        """Inverse of :meth:`state_dict`, for the same edits in the same order."""
        self.likeness, self.prints, self.limit = None, {}, self.least
        if state is not None:
            shared = state["shared"]  # one tensor in directories from before the mean counted
            self.likeness = Likeness([s.float() for s in ([shared] if isinstance(shared, Tensor) else shared)])
            self.prints = dict(zip(edits, state["prints"], strict=True))
            if self.false_positive_rate < 1:
                self.limit = max(self.least, state.get("limit", self.least))  # in directories from before it could rise
