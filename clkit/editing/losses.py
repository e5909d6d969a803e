"""The loss that every gradient-based edit has: cross entropy of its target."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def target_loss(logits: Tensor, targets: Tensor, extra: int = 0) -> Tensor:
    """Mean over rows of the mean negative log-likelihood of a row's target tokens, in float32.

    Args:
        logits: (E, P, vocabulary).
        targets: (E, P) the tokens that they predict; -100 where nothing is learned.
        extra: added to the number of targets that each row's sum is divided by (some published code counts one more).
    """
    nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none")
    count = (targets != -100).sum(dim=1) + extra
    return (nll.view(targets.shape).sum(dim=1) / count.clamp(min=1)).mean()
