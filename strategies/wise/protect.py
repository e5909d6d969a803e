"""Steps that leave alone what a memory says elsewhere: the masked gradient without what other prompts read too."""

from __future__ import annotations

import torch
from torch import Tensor

# Of conjugate gradients. On SmolLM2's layer, 500 readings, a mask of 0.2: what other prompts feel of a step falls from
# .62 of what the edit's own does to .39, .20 and .05 after 1, 3 and 5.
_ITERATIONS = 5
# A step is made longer by at most this factor to move the edit's own scores as the gradient itself would.
_LONGEST = 20.0


class Protection:
    """The step in a mask that is closest to the gradient and hardly changes what the memory says to other prompts.

    Per row of the matrix, with M its mask, g its gradient and K what the projection reads at other prompts, it is
    ``argmin_u |u - M g|^2 + strength / size * |K u|^2`` over the entries of M:
    ``u = M (g - K^T y), (size / strength * I + K M K^T) y = K M g``, by conjugate gradients for all rows at once. Then
    all of it is made longer, so that the edit's own score moves as it would with ``M g``.

    Args:
        others: (N, in) K.
        own: (in,) what the edit reads where it is scored, the mean over its rows.
        size: mean squared norm of one such row.
        strength: 0 = nothing is protected.
    """

    def __init__(self, others: Tensor, own: Tensor, size: float, strength: float) -> None:
        self.others, self.own = others, own
        self.floor = size / strength if strength and len(others) else None
        self._inverse: Tensor | None = None

    def step(self, gradient: Tensor, mask: Tensor) -> Tensor:
        """(out, in) a step within ``mask`` in the direction of ``gradient``, both (out, in)."""
        plain = gradient * mask
        if self.floor is None:
            return plain
        step = plain - (self._solved(plain @ self.others.T, mask, self.floor) @ self.others) * mask
        wanted, found = (plain @ self.own).norm(), (step @ self.own).norm()
        longer: Tensor = (wanted / found.clamp(min=1e-12)).clamp(max=_LONGEST)
        return step * longer

    def _solved(self, right: Tensor, mask: Tensor, floor: float) -> Tensor:
        """(out, N) y for each row of ``right`` (out, N)."""
        near = self._near(float(mask.float().mean()), floor)
        y, rest = torch.zeros_like(right), right
        guess = direction = rest @ near
        size = (rest * guess).sum(dim=1, keepdim=True)
        for _ in range(_ITERATIONS):
            image = ((direction @ self.others) * mask) @ self.others.T + floor * direction
            length = size / (direction * image).sum(dim=1, keepdim=True).clamp(min=1e-30)
            y, rest = y + length * direction, rest - length * image
            guess = rest @ near
            before, size = size, (rest * guess).sum(dim=1, keepdim=True)
            direction = guess + size / before.clamp(min=1e-30) * direction
        return y

    def _near(self, ratio: float, floor: float) -> Tensor:
        """(N, N) the inverse for a mask that keeps that part of every entry: the preconditioner."""
        if self._inverse is None:
            eye = torch.eye(len(self.others), dtype=self.others.dtype, device=self.others.device)
            self._inverse = torch.linalg.inv(floor * eye + ratio * self.others @ self.others.T)
        return self._inverse
