"""Nearest class mean: an example has the class whose mean feature vector is nearest."""

from __future__ import annotations

from torch import Tensor

from clkit.features import FeatureStatistics, FeatureStrategy


def nearest_mean(statistics: FeatureStatistics) -> tuple[Tensor, Tensor]:
    """Weight and bias with ``-|x - m|^2 / 2 = m.x - |m|^2 / 2 + const``."""
    means = statistics.means
    return means, -means.square().sum(dim=1) / 2


class NCM(FeatureStrategy):
    """Nearest class mean in Euclidean distance (Mensink et al. 2013) on frozen features."""

    name = "ncm"

    def solve(self) -> tuple[Tensor, Tensor]:
        """See :func:`nearest_mean`."""
        return nearest_mean(self.statistics)
