"""SimpleCIL: an example has the class whose mean feature vector has the most similar direction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clkit.features import FeatureHead, FeatureStatistics, FeatureStrategy


def prototypes(statistics: FeatureStatistics) -> tuple[Tensor, Tensor]:
    """Class means of length one, and no bias. The mean is over features as they are, as published."""
    return F.normalize(statistics.means, dim=1), torch.zeros_like(statistics.counts)


class CosineHead(FeatureHead):
    """Scores are cosines; the statistics are of features of any length."""

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) to cosines (B, C)."""
        return super().forward(F.normalize(features.double(), dim=1))


class SimpleCIL(FeatureStrategy):
    """Prototypes and cosine on a frozen pretrained model (Zhou et al. 2023, arXiv 2303.07338).

    The published classifier multiplies the cosines by a learned factor, which it never trains and which no decision
    depends on; there is none here.
    """

    name = "simplecil"
    head_class = CosineHead

    def solve(self) -> tuple[Tensor, Tensor]:
        """See :func:`prototypes`."""
        return prototypes(self.statistics)
