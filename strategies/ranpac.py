"""RanPAC: ridge regression onto the classes from random projections of frozen features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clkit.config import StrategyConfig, opt
from clkit.features import FeatureHead, FeatureStatistics, FeatureStrategy, solve_positive
from clkit.rng import derive_seed, fresh_generator
from clkit.strategy import RunContext
from clkit.tasks.batch import Batch

RIDGES = tuple(10.0**k for k in range(-5, 3))


@dataclass
class RanPACConfig(StrategyConfig):
    """Options of RanPAC."""

    width: int = opt(
        0, "M, random features; 0 = three times the features (published: 10000). Memory is 16 M^2 bytes", min=0
    )
    ridge: float = opt(
        0.0, "lambda in units of the mean eigenvalue of the Gram matrix; 0 = chosen on held-out examples", min=0
    )
    held_out: float = opt(0.2, "part of the examples that the ridge is chosen on", above=0, max=0.9)


class RandomHead(FeatureHead):
    """Scores linear in ``max(0, x P)``.

    Attributes:
        projection: (D, M), standard normal, never trained.
    """

    projection: Tensor

    def __init__(self, in_features: int, width: int, num_classes: int) -> None:
        super().__init__(in_features, width, num_classes)
        self.register_buffer("projection", torch.zeros(in_features, width))

    def transform(self, features: Tensor) -> Tensor:
        """(B, D) to (B, M)."""
        return (features.double() @ self.projection.double()).relu()


def ridge_weights(statistics: FeatureStatistics, factor: float) -> Tensor:
    """``(G + lambda I)^-1 H^T Y`` (M, C) with ``lambda = factor tr(G) / M``; zeros when G is zero."""
    mean = statistics.moment.diagonal().mean()
    if not mean:
        return torch.zeros_like(statistics.sums.T)
    gram = statistics.moment.clone()
    gram.diagonal().add_(factor * mean)
    return solve_positive(gram, statistics.sums.T, "raise strategy.ridge")


def choose_ridge(fit: FeatureStatistics, held: FeatureStatistics) -> float:
    """The factor among ``RIDGES`` whose weights, fitted on one part, have the smallest squared error on the other.

    The error ``|Y - H W|^2 = tr(W^T G W) - 2 tr(W^T H^T Y) + N`` needs the other part's statistics only. Of factors
    that are equal to a millionth of N, the largest; so also without anything held out.
    """
    errors = []
    for factor in RIDGES:
        weights = ridge_weights(fit, factor)
        errors.append(float((weights * (held.moment @ weights - 2 * held.sums.T)).sum()))
    bound = min(errors) + 1e-6 * float(held.counts.sum())
    return max(factor for factor, error in zip(RIDGES, errors, strict=True) if error <= bound)


class RanPAC(FeatureStrategy):
    """McDonnell et al. 2023 (arXiv 2307.02251) without its first-task adaptation of the backbone.

    A fixed part of the examples, chosen by their ids, is held out of the fit that chooses the ridge, and belongs to the
    final one. Its statistics are kept beside those of all examples, so the choice rests on all tasks so far and on no
    example of a later one. The published code chooses anew on a part of the latest task alone, among absolute values.
    """

    config_class = RanPACConfig
    name = "ranpac"
    head_class = RandomHead
    needs_moment = True
    head: RandomHead

    def width(self, in_features: int) -> int:
        """M."""
        width: int = self.config.width or 3 * in_features
        return width

    def setup(self, run: RunContext) -> None:
        """Draw the projection."""
        super().setup(run)
        drawn = torch.randn(self.head.projection.shape, generator=fresh_generator(run.config.seed, "projection"))
        self.head.projection.copy_(drawn)
        self.held = self.new_statistics()

    def record(self, batch: Batch, vectors: Tensor) -> None:
        """Into the statistics of all examples and, for some, of the part that is held out."""
        super().record(batch, vectors)
        held = torch.tensor([self._is_held_out(i) for i in batch.ids], device=vectors.device)
        self.held.add(vectors[held], batch.labels[held])

    def _is_held_out(self, record: str) -> bool:
        return derive_seed(self.run.config.seed, "held out", record) < float(self.config.held_out) * 2**63

    def solve(self) -> tuple[Tensor, Tensor]:
        """Choose the ridge, then fit on all."""
        factor = self.config.ridge or choose_ridge(self.statistics.without(self.held), self.held)
        weights = ridge_weights(self.statistics, factor)
        return weights.T, torch.zeros_like(self.statistics.counts)

    def state_dict(self) -> dict[str, Any]:
        """The statistics of all examples and of those held out."""
        return {**super().state_dict(), "held": self.held.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.held.load_state_dict(state["held"])
