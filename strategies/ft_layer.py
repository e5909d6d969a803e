"""FT-L: fine-tune one projection on each edit, no weight further than a small step from where it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clkit.config import opt
from clkit.editing.descent import descend
from clkit.editing.layer_edits import LearnedEditConfig, TrainedChange
from clkit.editing.losses import target_loss
from clkit.models.additions import Additions, Change, DenseChange
from clkit.models.causal_lm import CausalLM
from clkit.modes import evaluating
from clkit.tasks.base import EditRecord


@dataclass
class FTLayerConfig(LearnedEditConfig):
    """Options of FT-L."""

    steps: int = opt(25, "most steps per edit", min=1)
    learning_rate: float = opt(5e-4, "step size of Adam", above=0)
    limit: float = opt(5e-4, "largest change of one weight by one edit", above=0)


class FTLayer(TrainedChange):
    """Constrained fine-tuning of one layer (Zhu et al. 2020, arXiv 2012.00363).

    Each edit minimises the cross entropy of its target over the change of one down-projection, under
    ``max |dW - dW before the edit| <= limit``. docs/strategies/editing.md has equations, defaults and deviations.
    """

    config_class = FTLayerConfig
    memory = "layer"

    def attach(self, model: CausalLM, seed: int) -> None:
        """Nothing is added before the first edit."""
        super().attach(model, seed)
        self.additions = Additions({self.location.name: self.location.projection}, self.location.decoder)

    def start(self) -> dict[str, Change]:
        """No change."""
        zeros = torch.zeros(self.location.shape, dtype=torch.float32, device=self.location.device)
        return {self.location.name: DenseChange(zeros)}

    def train(self, record: EditRecord, changes: Mapping[str, Change]) -> tuple[dict[str, Change], list[float]]:
        """Adam on the change, clamped after each step."""
        config, before = self.config, _matrix(changes[self.location.name])
        found, prefix = self.prefix(record)
        x, step = prefix.activations[: found.edits], torch.zeros_like(before).requires_grad_()

        def loss() -> Tensor:
            return target_loss(prefix.logits(F.linear(x, before + step)), prefix.targets)

        def constrain() -> None:
            step.clamp_(-config.limit, config.limit)

        with self.unedited(), evaluating(self.model.module):
            losses = descend(
                loss,
                [step],
                steps=config.steps,
                learning_rate=config.learning_rate,
                stop_loss=config.stop_loss,
                after=constrain,
            )
        return {self.location.name: DenseChange(before + step.detach())}, losses

    def memory_state(self) -> dict[str, Any]:
        """The change, float32."""
        matrices = {name: _matrix(change) for name, change in self.additions.changes.items()}
        return {**super().memory_state(), "matrices": matrices}

    def load_memory_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`memory_state`."""
        super().load_memory_state(state)
        device = self.location.device
        self.additions.put({name: DenseChange(matrix.to(device)) for name, matrix in state["matrices"].items()})


def _matrix(change: Change) -> Tensor:
    """(out, in) of the one change that this method makes."""
    matrix: Tensor = change.get_buffer("matrix")
    return matrix
