"""Gradient steps on the few tensors of one edit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clkit.errors import NumericalError


def descend(
    loss: Callable[[], Tensor],
    tensors: Sequence[Tensor],
    *,
    steps: int,
    learning_rate: float,
    stop_loss: float,
    after: Callable[[], None] | None = None,
) -> list[float]:
    """Adam on ``tensors``, in place, until the loss is not above ``stop_loss``.

    Args:
        loss: the loss as the tensors are now.
        tensors: leaves that require gradients.
        steps: at most.
        learning_rate: of Adam; its moments begin at zero.
        stop_loss: an edit whose loss is not above it is learned.
        after: called after each step, without gradients; may change the tensors (a constraint).

    Returns:
        The loss of every forward pass; the last one is before the last step where the loss did not get there.

    Raises:
        NumericalError: the loss is not finite.
    """
    optimizer = torch.optim.Adam(tensors, lr=learning_rate)
    losses: list[float] = []
    for _ in range(steps):
        value = loss()
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            raise NumericalError(
                f"The loss of the edit is {losses[-1]} at step {len(losses)}; lower strategy.learning_rate."
            )
        if losses[-1] <= stop_loss:
            break
        for tensor, gradient in zip(tensors, torch.autograd.grad(value, tensors), strict=True):
            tensor.grad = gradient
        optimizer.step()
        if after is not None:
            with torch.no_grad():
                after()
    return losses
