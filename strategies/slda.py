"""Streaming linear discriminant analysis: class means and one covariance, both updated example by example."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clkit.config import StrategyConfig, opt
from clkit.features import FeatureStatistics, FeatureStrategy, solve_positive


@dataclass
class SLDAConfig(StrategyConfig):
    """Options of streaming LDA."""

    shrinkage: float = opt(1e-4, "part of the identity in the covariance", above=0, max=1)


def covariance(statistics: FeatureStatistics) -> Tensor:
    """(W, W) covariance within the classes, over all examples: ``sum_c sum_i (x - m_c)(x - m_c)^T / N``."""
    within = statistics.moment - statistics.sums.T @ statistics.means
    return within / statistics.counts.sum().clamp(min=1)


def discriminants(statistics: FeatureStatistics, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Weight ``L m_c`` and bias ``-m_c L m_c / 2`` with ``L = ((1 - e) S + e I)^-1``; all classes equally probable."""
    shrunk = (1 - shrinkage) * covariance(statistics)
    shrunk.diagonal().add_(shrinkage)
    means = statistics.means
    weight = solve_positive(shrunk, means.T, "raise strategy.shrinkage").T
    return weight, -(weight * means).sum(dim=1) / 2


class SLDA(FeatureStrategy):
    """Hayes and Kanan 2020 (arXiv 1909.01520) on frozen features.

    The covariance is the exact one of all examples so far around the means of their classes. The published recursion
    approximates it: it weighs an example's deviation from a mean of the time by the number of all examples, not of
    those of its class.
    """

    config_class = SLDAConfig
    name = "slda"
    needs_moment = True

    def solve(self) -> tuple[Tensor, Tensor]:
        """See :func:`discriminants`."""
        return discriminants(self.statistics, self.config.shrinkage)
