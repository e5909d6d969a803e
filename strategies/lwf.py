"""Learning without Forgetting: stay close to the outputs of the model as it was before the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clkit.checkpoint import clone_state
from clkit.config import StrategyConfig, opt
from clkit.modes import evaluating, swapped
from clkit.strategy import Losses, Strategy
from clkit.tasks.base import Task
from clkit.tasks.batch import Batch


@dataclass
class LwFConfig(StrategyConfig):
    """Options of Learning without Forgetting."""

    weight: float = opt(1.0, "weight of the distillation term", min=0)
    temperature: float = opt(2.0, "softmax temperature of the distillation", above=0)


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) at ``temperature``, summed over rows, times its square (Hinton et al. 2015).

    Args:
        student: logits (N, C).
        teacher: logits (N, C), no gradient.
        temperature: > 0.
    """
    target = torch.log_softmax(teacher.float() / temperature, dim=-1)
    ours = torch.log_softmax(student.float() / temperature, dim=-1)
    return nn.functional.kl_div(ours, target, reduction="sum", log_target=True) * temperature**2


class LwF(Strategy):
    """Cross entropy on the new task plus distillation from the model before it (Li and Hoiem 2017).

    Class-incremental tasks distil the classes seen before, language models the whole vocabulary at the positions that
    predict a target. The teacher is a copy of the trained tensors only, run through the same module.
    """

    config_class = LwFConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._teacher: dict[str, Tensor] | None = None

    def begin_task(self, task: Task) -> None:
        """Keep the weights as they are now; the first task has no teacher."""
        self._teacher = clone_state(self.model_state()) if self.run.position.stage > 0 else None

    def loss(self, batch: Batch) -> Losses:
        """Cross entropy and, from the second task on, distillation."""
        model = self.run.model
        teacher = self._teacher_logits(batch) if self._teacher is not None and self.config.weight else None
        logits = model.logits(batch)
        losses = {"cross_entropy": model.loss(batch, logits)}
        if teacher is not None:
            losses["distillation"] = self.config.weight * self._distil(batch, logits, teacher)
        return losses

    def _teacher_logits(self, batch: Batch) -> Tensor:
        model = self.run.model
        with torch.no_grad(), evaluating(model.module), swapped(model.module, self._teacher or {}):
            return model.logits(batch)

    def _distil(self, batch: Batch, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over the rows (classification) or over the tokens that are learned (language models)."""
        if student.dim() == 3:
            keep = self.run.model.targets(batch) != -100
            student, teacher = student[keep], teacher[keep]
        else:
            known = self._known_classes()
            student, teacher = student[:, known], teacher[:, known]
        return distillation(student, teacher, self.config.temperature) / max(1, len(student))

    def _known_classes(self) -> list[int]:
        tasks = self.run.tasks[: self.run.position.stage]
        return sorted({c for t in tasks for c in t.classes or ()})

    def state_dict(self) -> dict[str, Any]:
        """The buffer and the teacher."""
        return {**super().state_dict(), "teacher": self._teacher}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        teacher = state["teacher"]
        device = self.run.engine.device
        self._teacher = None if teacher is None else {name: value.to(device) for name, value in teacher.items()}
