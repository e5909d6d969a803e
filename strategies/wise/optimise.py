"""Learn one edit: masked gradient steps on the side memory's matrix, with everything below it computed once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from clkit.editing.losses import target_loss
from clkit.editing.prefix import Prefix
from clkit.editing.rows import Rows
from clkit.errors import NumericalError
from clkit.models.routing import last_token
from clkit.strategies.wise.losses import margin_loss
from clkit.strategies.wise.protect import Protection
from clkit.strategies.wise.router import Router, change_sizes

# The published code's weight decay, which reaches the frozen entries too.
_PUBLISHED_DECAY = 1e-5


@dataclass(frozen=True)
class Settings:
    """The numbers of one edit.

    Attributes:
        unit: the scores that ``alpha``, ``beta`` and ``gamma`` are compared with are divided by it.
        learning_rate: of gradient descent on the matrix.
    """

    steps: int
    learning_rate: float
    alpha: float
    beta: float
    gamma: float
    clamp: float
    stop_loss: float
    unit: float = 1.0


@dataclass(frozen=True)
class Others:
    """Prompts beside the edit's own rows, as the projection reads them at their last token.

    Attributes:
        inside: (K, in) float32, prompts that the memory answers already.
        outside: (N, in) float32, prompts that it must not answer.
    """

    inside: Tensor
    outside: Tensor


@dataclass
class Outcome:
    """What came of one edit.

    Attributes:
        losses: (target loss, margin loss) of every forward pass.
        score: mean score of the edit rows in the last forward pass, which is before the last step.
    """

    losses: list[tuple[float, float]] = field(default_factory=list)
    score: float = math.nan


class Objective:
    """The loss of one edit as a function of the side memory's matrix.

    Args:
        prefix: what is constant.
        rows: the edit.
        router: how scores are taken.
        settings: the numbers.
        weight: the base's matrix; when given, the function's argument is base and change together (compat).
        others: further prompts for the margins.
    """

    def __init__(
        self,
        prefix: Prefix,
        rows: Rows,
        router: Router,
        settings: Settings,
        weight: Tensor | None = None,
        others: Others | None = None,
    ) -> None:
        self.prefix, self.rows, self.router, self.settings, self.weight = prefix, rows, router, settings, weight
        self.others = others
        prompt = rows.prompt[:, prefix.start :]
        places = torch.arange(prompt.shape[1], device=prompt.device)
        first = last_token(prompt, prompt.shape[1], len(prompt))[: rows.edits, None]
        self._silent = (places < first)[..., None] if router.answer_only else None
        self._read = router.read(prefix.activations, prompt), router.read(prefix.base, prompt)

    def __call__(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Target loss, margin loss and the scores (R,) of all rows, for a matrix (out, in) float32."""
        prefix, rows, s = self.prefix, self.rows, self.settings
        change = self._change(matrix, prefix.activations[: rows.edits], prefix.base[: rows.edits])
        if self._silent is not None:
            change = change.masked_fill(self._silent, 0.0)
        answer = target_loss(prefix.logits(change), prefix.targets, int(self.router.compat))
        read, base = self._read
        # The published statistic switches to the maximum at inference only.
        scores = change_sizes(self._change(matrix, read, base), base, self.router.activation).mean(dim=1)
        inside, outside = scores[: rows.edits], scores[rows.edits :]
        if self.others is not None:
            inside = torch.cat([inside, F.linear(self.others.inside, matrix).norm(dim=-1)])
            outside = torch.cat([outside, F.linear(self.others.outside, matrix).norm(dim=-1)])
        return answer, margin_loss(inside / s.unit, outside / s.unit, s.alpha, s.beta, s.gamma), scores

    def _change(self, matrix: Tensor, x: Tensor, base: Tensor) -> Tensor:
        change = F.linear(x, matrix)
        return change if self.weight is None else change - base


def optimise(objective: Objective, matrix: Tensor, mask: Tensor, protection: Protection) -> tuple[Tensor, Outcome]:
    """Learn one edit.

    Args:
        objective: the loss.
        matrix: (out, in) float32, the side memory so far; not changed.
        mask: (out, in) bool, the entries that may move.
        protection: what steps leave alone.

    Returns:
        The new matrix, and what happened.

    Raises:
        NumericalError: the loss is not finite; the edit is not learned.
    """
    s, rows = objective.settings, objective.rows
    outcome, before = Outcome(), math.inf
    # The published code trains base and change in one tensor, which rounds differently.
    centre = torch.zeros_like(matrix) if objective.weight is None else objective.weight
    decay = 0.0 if objective.weight is None else _PUBLISHED_DECAY
    matrix = matrix + centre
    for _ in range(s.steps):
        matrix = matrix.detach().requires_grad_()
        answer, margin, scores = objective(matrix)
        total = answer + margin
        value = float(total.detach())
        if not math.isfinite(value):
            raise NumericalError(
                f"The loss of the edit is {value} at step {len(outcome.losses) + 1}; lower strategy.learning_rate."
            )
        outcome.losses.append((float(answer.detach()), float(margin.detach())))
        outcome.score = float(scores[: rows.edits].detach().mean())
        flat = abs(value - before) <= 1e-4 if objective.weight is not None else True
        if value <= s.stop_loss and flat:
            break
        before = value
        (gradient,) = torch.autograd.grad(total, matrix)
        with torch.no_grad():
            update = protection.step(gradient, mask) + decay * matrix
            matrix = torch.clamp(matrix - s.learning_rate * update, centre - s.clamp, centre + s.clamp)
    return matrix.detach() - centre, outcome
