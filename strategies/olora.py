"""Orthogonal LoRA: a new adapter reads other directions than the adapters of earlier tasks (Wang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clkit.config import StrategyConfig, opt
from clkit.fresh_lora import FreshLora
from clkit.strategy import RunContext
from clkit.tasks.base import Task


@dataclass
class OLoRAConfig(StrategyConfig):
    """Options of orthogonal LoRA; the defaults are the published code's."""

    lambda1: float = opt(0.5, "strength of the orthogonality; 0 = a fresh LoRA per task and nothing else", min=0)
    lambda2: float = opt(0.0, "strength of the norm of the new adapter's matrices", min=0)


@torch.no_grad()
def overlap(past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of ``|past @ new.T|`` and its gradient with respect to ``new``.

    The paper writes squares; this is the absolute value of the published code.

    Args:
        past: (R, in) the A matrices of all finished tasks, one below the other.
        new: (r, in) A of the task in training.

    Returns:
        The loss () and the gradient (r, in); zero where rows are orthogonal.
    """
    product = past @ new.T
    return product.abs().sum(), product.sign().T @ past


class OLoRA(FreshLora):
    """Cross entropy, plus ``lambda1`` times the overlap of A with every earlier A, summed over layers.

    Plus ``lambda2`` times the sum of the Euclidean norms of the new A and B. Neither depends on data: the gradient is
    added once per optimiser step. (The published trainer adds it in each micro-batch, K times too much of it.)
    """

    config_class = OLoRAConfig

    @classmethod
    def kept_bytes(cls, config: Any, sizes: Mapping[str, int], tasks: int) -> int:
        """Also A of each finished task, about half of an adapter."""
        updates: int = super().kept_bytes(config, sizes, tasks)
        return updates + 2 * sizes["trainable"] * (tasks - 1)

    def setup(self, run: RunContext) -> None:
        """See the base class; there is nothing to be orthogonal to yet."""
        super().setup(run)
        self._past_a: dict[str, Tensor] = {}

    def after_backward(self) -> None:
        """Add the gradient of the penalty, and log its value as ``penalty``."""
        if not (self.config.lambda2 or (self.config.lambda1 and self._past_a)):
            return
        with self.factors():
            values = self._pull()
        done = self.run.position.step + 1
        if done == 1 or done % self.run.config.tracking.log_every == 0:
            self.run.log("penalty", float(torch.stack(values).sum()))

    def _pull(self) -> list[Tensor]:
        """Add the gradients; returns the terms of the penalty."""
        add, values = self.run.engine.add_gradient, []
        for name, layer in self.layers.items():
            if self.config.lambda1 and self._past_a:
                value, gradient = overlap(self._past_a[name], layer.A.detach())
                add(layer.A, gradient, self.config.lambda1)
                values.append(self.config.lambda1 * value)
            if self.config.lambda2:
                for parameter in (layer.A, layer.B):
                    norm = parameter.detach().norm()
                    if norm > 0:
                        add(parameter, parameter.detach() / norm, self.config.lambda2)
                    values.append(self.config.lambda2 * norm)
        return values

    def end_task(self, task: Task) -> None:
        """Freeze the adapter among the past ones and start a fresh one."""
        super().end_task(task)
        self._collect()

    def _collect(self) -> None:
        for name, layer in self.layers.items():
            self._past_a[name] = self.past.rows(name).to(layer.A)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        if len(self.past):
            self._collect()
