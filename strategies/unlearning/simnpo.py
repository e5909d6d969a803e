"""SimNPO: negative preference optimisation without a reference, by the mean token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clkit.config import opt
from clkit.tasks.batch import Batch

from . import losses
from .base import RetainConfig, Unlearner
from .request import Approximate


@dataclass
class SimNPOConfig(RetainConfig):
    """Options of SimNPO; the defaults are those published for TOFU."""

    retain_weight: float = opt(0.125, "weight of the retained rows' loss", min=0)
    beta: float = opt(4.5, "inverse temperature", above=0)
    gamma: float = opt(0.0, "margin", min=0)


class SimNPO(Unlearner):
    """SimNPO on forgotten rows, cross entropy on retained ones (Fan et al. 2024)."""

    config_class = SimNPOConfig

    def forget_loss(self, batch: Batch) -> Tensor:
        """See :func:`losses.simnpo`."""
        return losses.simnpo(*self.log_probs(batch), self.config.beta, self.config.gamma)


class SimNPOMethod(Approximate):
    """Serves requests so."""

    name = "simnpo"
    what = "the deployed model, trained by SimNPO on the forgotten records"
    strategy = SimNPO
