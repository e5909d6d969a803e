"""The losses of unlearning, as functions of log probabilities. Each is a mean over rows, to be minimised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_log_probs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log probability of each row's targets, summed over them, and how many there are.

    Args:
        logits: (B, P, V) and targets (B, P) with -100 where nothing is predicted; or (B, C) and classes (B,).
        targets: as above.

    Returns:
        (B,) float32 and (B,) integers.
    """
    if logits.dim() == 2:
        logits, targets = logits[:, None], targets[:, None]
    losses = F.cross_entropy(logits.transpose(1, 2).float(), targets, ignore_index=-100, reduction="none")
    return -losses.sum(1), (targets != -100).sum(1)


def npo(log_probs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Negative preference optimisation (Zhang et al. 2024, eq. 3): ``-(2/beta) log sigma(-beta log(pi / pi_ref))``.

    Its gradient is that of gradient ascent, times ``2 pi^beta / (pi^beta + pi_ref^beta)``: it fades where the model
    has forgotten already, and is gradient ascent's at the reference and for ``beta -> 0``.

    Args:
        log_probs: (B,) of whole answers.
        reference: (B,) by the frozen reference.
        beta: inverse temperature, > 0.
    """
    return -(2 / beta) * F.logsigmoid(-beta * (log_probs - reference)).mean()


def simnpo(log_probs: Tensor, counts: Tensor, beta: float, gamma: float) -> Tensor:
    """SimNPO (Fan et al. 2024): ``-(2/beta) log sigma(-(beta/|y|) log pi - gamma)``; no reference, but the length.

    Args:
        log_probs: (B,) of whole answers.
        counts: (B,) tokens in them.
        beta: > 0.
        gamma: margin, >= 0.
    """
    return -(2 / beta) * F.logsigmoid(-beta * log_probs / counts.clamp(min=1) - gamma).mean()


def preference(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7): ``-log sigma(beta (chosen - rejected))``.

    Args:
        chosen: (B,) log(pi / pi_ref) of the answers that shall be given.
        rejected: (B,) the same of those that shall not.
        beta: > 0.
    """
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def mean_nll(log_probs: Tensor, counts: Tensor) -> Tensor:
    """Negative log probability per token, as a mean over rows: long answers count as much as short ones."""
    return -torch.mean(log_probs / counts.clamp(min=1))
