"""What a change of the matrix costs on ordinary text: the second moment of the keys, and the ridge solution."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyMoment:
    """``C = X^T X / N + ridge * mean(x^2) * I``, without ever making the (in, in) matrix.

    Args:
        keys: (N, in) what the projection reads at the tokens of some text.
        ridge: what directions that the text does not use count, as a part of the mean square of an entry.
    """

    def __init__(self, keys: Tensor, ridge: float) -> None:
        self.keys = keys.double()
        self.floor = ridge * float(self.keys.square().mean())
        eye = torch.eye(len(keys), dtype=torch.float64, device=keys.device)
        self._factor = torch.linalg.cholesky(self.floor * len(keys) * eye + self.keys @ self.keys.T)

    def times(self, rows: Tensor) -> Tensor:
        """(n, in) each row times C, float64."""
        rows = rows.double()
        return (rows @ self.keys.T) @ self.keys / len(self.keys) + self.floor * rows

    def solve(self, rows: Tensor) -> Tensor:
        """(n, in) C^-1 times each row, float64, by the Woodbury identity."""
        rows = rows.double()
        inner = torch.cholesky_solve(self.keys @ rows.T, self._factor)
        return (rows - inner.T @ self.keys) / self.floor


def readers(keys: Tensor, moment: KeyMoment, weight: float) -> Tensor:
    """(n, in) float32: the change of the matrix is ``residuals @ readers``, residuals (out, n).

    It minimises ``|dW K - R|^2 + weight * tr(dW C dW^T)``, whose solution is
    ``dW = R K^T (weight C + K K^T)^-1 = R (I + K^T P K)^-1 K^T P`` with ``P = (weight C)^-1`` (MEMIT, eq. 14).

    Args:
        keys: (n, in), K^T.
        moment: C.
        weight: of ordinary text against the edits.
    """
    solved = moment.solve(keys) / weight
    gram = keys.double() @ solved.T
    eye = torch.eye(len(keys), dtype=torch.float64, device=keys.device)
    found: Tensor = torch.linalg.solve(eye + gram, solved).float()
    return found.contiguous()  # as it is when it was saved and loaded
