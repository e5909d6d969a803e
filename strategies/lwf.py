"""Learning without Forgetting: stay close to the outputs of the model as it was before the task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clkit.checkpoint import clone_state
from clkit.config import StrategyConfig, opt
from clkit.errors import Problem
from clkit.modes import evaluating
from clkit.strategy import Capabilities, Losses, Strategy, on_deepspeed
from clkit.tasks.base import Task
from clkit.tasks.batch import Batch, count_targets


@dataclass
class LwFConfig(StrategyConfig):
    """Options of Learning without Forgetting."""

    weight: float = opt(1.0, "weight of the distillation term", min=0)
    temperature: float = opt(2.0, "softmax temperature of the distillation", above=0)
    rows: str = opt(
        "all",
        "which rows of a batch are distilled; `replayed` with a buffer is replay plus KL to the previous model",
        choices=("all", "new", "replayed"),
    )


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
    predict a target. With a buffer the replayed rows are learned too, and ``rows`` says which are distilled. The
    teacher is a copy of the trained tensors only, run through the same module on the distilled rows.
    """

    config_class = LwFConfig
    capabilities = Capabilities(causal=True, **on_deepspeed())

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._teacher: dict[str, Tensor] | None = None

    @classmethod
    def kept_bytes(cls, config: Any, sizes: Mapping[str, int], tasks: int) -> int:
        """The teacher."""
        return 4 * sizes["trainable"]

    @classmethod
    def check(cls, config: LwFConfig) -> list[Problem]:
        """Without a buffer no row is replayed."""
        if config.rows == "replayed" and config.replay.size == 0:
            return [Problem("strategy.rows", "`replayed` needs a buffer; set strategy.replay.size")]
        return []

    def begin_task(self, task: Task) -> None:
        """Keep the weights as they are now; the first task has no teacher."""
        self._teacher = clone_state(self.model_state()) if self.run.position.stage > 0 else None

    def loss(self, batch: Batch) -> Losses:
        """Cross entropy and, from the second task on, distillation."""
        model = self.run.model
        if self._teacher is None or not self.config.weight:
            return {"cross_entropy": model.loss(batch)}
        rows = self._distilled(batch)
        part = batch if bool(rows.all()) else batch.rows(rows)
        teacher = self._teacher_logits(part) if len(part) else None
        logits = model.logits(batch)
        losses = {"cross_entropy": model.loss(batch, logits)}
        if teacher is not None:
            losses["distillation"] = self.config.weight * self._distil(batch, part, rows, logits, teacher)
        return losses

    def _distilled(self, batch: Batch) -> Tensor:
        """(B,) bool."""
        replayed = batch.replayed
        if replayed is None:
            replayed = torch.zeros(len(batch), dtype=torch.bool, device=batch.labels.device)
        if self.config.rows == "all":
            return torch.ones_like(replayed)
        return replayed if self.config.rows == "replayed" else ~replayed

    def units(self, batch: Batch) -> dict[str, float]:
        """Distillation is a mean over the targets of the distilled rows."""
        return {"distillation": float(count_targets(batch.labels[self._distilled(batch)]))}

    def _teacher_logits(self, batch: Batch) -> Tensor:
        model = self.run.model
        teacher = self.run.engine.swapped(model.module, self._teacher or {})
        with torch.no_grad(), evaluating(model.module), teacher:
            return model.logits(batch)

    def _distil(self, batch: Batch, part: Batch, rows: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over the rows (classification) or over the tokens that are learned (language models) of ``part``."""
        student = student[rows]
        if student.dim() == 3:
            # The part may have logits at fewer positions than the batch, but its targets are the same, in one order.
            student = student[self.run.model.targets(batch)[rows] != -100]
            teacher = teacher[self.run.model.targets(part) != -100]
        else:
            known = self._known_classes()
            if known:
                student, teacher = student[:, known], teacher[:, known]
        return distillation(student, teacher, self.config.temperature) / max(1, len(student))

    def _known_classes(self) -> list[int]:
        """Empty when the tasks do not say which classes they have: then all are distilled."""
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
