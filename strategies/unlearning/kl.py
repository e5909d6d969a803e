"""Gradient ascent, held by the divergence from the model as it was before on what is retained."""

from __future__ import annotations

from torch import Tensor

from clkit.strategies.lwf import distillation
from clkit.tasks.batch import Batch

from .gradient_difference import GradientDifference
from .request import Approximate


class KL(GradientDifference):
    """Gradient ascent plus KL(before || now) on retained rows (Maini et al. 2024).

    "Before" is a frozen copy of the trained tensors. The published code of DP2Unlearning compares the current model
    with itself, which is 0 and makes it gradient ascent.
    """

    frozen_reference = True

    def retain_loss(self, batch: Batch) -> Tensor:
        """Mean over the targets of the divergence of the distributions that predict them."""
        model = self.run.model
        before, now, targets = self.reference_logits(batch), model.logits(batch), model.targets(batch)
        if now.dim() == 3:
            before, now = before[targets != -100], now[targets != -100]
        divergence: Tensor = distillation(now, before, 1.0)
        return divergence / max(1, len(now))


class KLMethod(Approximate):
    """Serves requests so."""

    name = "kl"
    what = "the deployed model, trained to a higher loss on the forgotten records while held to itself on retained ones"
    strategy = KL
