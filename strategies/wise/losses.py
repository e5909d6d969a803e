"""Margins on how strongly the side memory answers: the part of an edit's loss that is WISE's own."""

from __future__ import annotations

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
