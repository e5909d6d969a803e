"""Negative preference optimisation: gradient ascent that fades where the model has forgotten."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clkit.config import opt
from clkit.tasks.batch import Batch

from . import losses
from .base import RetainConfig, Unlearner
from .request import Approximate


@dataclass
class NPOConfig(RetainConfig):
    """Options of NPO."""

    beta: float = opt(0.1, "inverse temperature; towards 0 it becomes gradient ascent", above=0)


class NPO(Unlearner):
    """NPO on forgotten rows with a frozen reference, cross entropy on retained ones (Zhang et al. 2024)."""

    config_class = NPOConfig
    frozen_reference = True

    def forget_loss(self, batch: Batch) -> Tensor:
        """See :func:`losses.npo`."""
        before = self.reference_log_probs(batch)
        return losses.npo(self.log_probs(batch)[0], before, self.config.beta)


class NPOMethod(Approximate):
    """Serves requests so."""

    name = "npo"
    what = "the deployed model, trained by negative preference optimisation on the forgotten records"
    strategy = NPO
