"""A sparse change of one matrix: a bit per entry and the values where the bit is set."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class SparseDelta:
    """A matrix (out, in) that is zero outside its support.

    Attributes:
        shape: (out, in).
        index: (N,) int64, flat positions of the support in row-major order.
        values: (N,) float32.
    """

    def __init__(self, shape: tuple[int, int], index: Tensor, values: Tensor) -> None:
        self.shape = shape
        self.index = index
        self.values = values

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseDelta:
        """The entries of ``dense`` (out, in) that are not 0."""
        flat = dense.detach().float().cpu().flatten()
        index = flat.nonzero().squeeze(1)
        return cls((dense.shape[0], dense.shape[1]), index, flat[index])

    def dense(self) -> Tensor:
        """(out, in) float32."""
        flat = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.float32)
        flat[self.index] = self.values
        return flat.view(self.shape)

    def rounded(self, storage: str) -> SparseDelta:
        """The same with values that ``storage`` (a name in ``DTYPES``) holds exactly; nothing is lost by saving it."""
        limit = torch.finfo(DTYPES[storage]).max
        return SparseDelta(self.shape, self.index, self.values.clamp(-limit, limit).to(DTYPES[storage]).float())

    def state_dict(self, storage: str = "float32") -> dict[str, Any]:
        """Shape, one bit per entry (packed), and the values as ``storage``."""
        bits = np.zeros(self.shape[0] * self.shape[1], dtype=bool)
        bits[self.index.numpy()] = True
        return {
            "shape": list(self.shape),
            "bits": torch.from_numpy(np.packbits(bits)),
            "values": self.values.to(DTYPES[storage]),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> SparseDelta:
        """Inverse of :meth:`state_dict`."""
        out, into = state["shape"]
        bits = np.unpackbits(state["bits"].cpu().numpy(), count=out * into).astype(bool)
        return cls((out, into), torch.from_numpy(np.flatnonzero(bits)), state["values"].float().cpu())
