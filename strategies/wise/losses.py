"""The loss of one edit: cross entropy of its target, and margins on how strongly the side memory answers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def mean_of_positive(values: Tensor) -> Tensor:
    """Mean over the strictly positive entries; 0 where there is none.

    >>> import torch
    >>> mean_of_positive(torch.tensor([3.0, -5.0, 1.0, 0.0])).item()
    2.0
    """
    violated = values > 0
    return (values * violated).sum() / violated.sum().clamp(min=1)


def margin_loss(inside: Tensor, outside: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """How far the routing scores are from their margins (WISE, eq. 5; each hinge a mean over what violates it).

    Args:
        inside: (E,) scores of prompts that the edit answers; at least ``beta`` is wanted.
        outside: (N,) scores of prompts that it must not touch; at most ``alpha`` is wanted, and ``gamma`` below every
            score in ``inside``.
        alpha: see ``outside``.
        beta: see ``inside``.
        gamma: see ``outside``.
    """
    gaps = outside[None, :] - inside[:, None] + gamma
    return mean_of_positive(gaps) + mean_of_positive(outside - alpha) + mean_of_positive(beta - inside)


def target_loss(logits: Tensor, targets: Tensor, compat: bool = False) -> Tensor:
    """Mean over rows of the mean negative log-likelihood of a row's target tokens, in float32.

    Args:
        logits: (E, P, vocabulary).
        targets: (E, P) the tokens that they predict; -100 where nothing is learned.
        compat: divide by the number of targets plus one, as the published code does.
    """
    nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none")
    count = (targets != -100).sum(dim=1) + int(compat)
    return (nll.view(targets.shape).sum(dim=1) / count.clamp(min=1)).mean()
