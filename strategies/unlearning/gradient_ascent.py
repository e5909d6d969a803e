"""Gradient ascent on what is forgotten: the simplest baseline, and the one that breaks models."""

from __future__ import annotations

from torch import Tensor

from clkit.tasks.batch import Batch

from .base import Unlearner
from .request import Approximate


class GradientAscent(Unlearner):
    """Minimises minus the cross entropy of the forgotten rows (Jang et al. 2023); nothing holds the rest."""

    retains = False

    def forget_loss(self, batch: Batch) -> Tensor:
        """Minus the mean token loss."""
        return -self.run.model.loss(batch)

    def forget_units(self, batch: Batch) -> float:
        """Tokens."""
        return float(batch.num_targets)


class GradientAscentMethod(Approximate):
    """Serves requests so."""

    name = "gradient_ascent"
    what = "the deployed model, trained to a higher loss on the forgotten records"
    strategy = GradientAscent
