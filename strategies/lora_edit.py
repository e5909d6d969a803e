"""One LoRA for all edits, trained on one after another: the control that says what plain adapter training gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clkit.config import opt
from clkit.editing.descent import descend
from clkit.editing.layer_edits import LearnedEditConfig, TrainedChange
from clkit.editing.losses import target_loss
from clkit.models.additions import Additions, Change, LowRankChange
from clkit.models.causal_lm import CausalLM
from clkit.models.location import block_layers, matrix_shape
from clkit.modes import evaluating
from clkit.rng import fresh_generator
from clkit.tasks.base import EditRecord


@dataclass
class LoraEditConfig(LearnedEditConfig):
    """Options of the edited LoRA; ``layer`` and ``depth`` only say where prompts are compared (``explain``)."""

    rank: int = opt(8, "rank of the adapter in each layer", min=1)
    alpha: float = opt(32.0, "scale; the update is alpha / rank * B @ A", above=0)
    steps: int = opt(50, "most steps per edit", min=1)
    learning_rate: float = opt(3e-4, "step size of Adam", above=0)
    contexts: int = opt(0, "texts that the model writes itself, put before the prompt, one row each", min=0, max=10)


class LoraEdit(TrainedChange):
    """An adapter on every linear layer of the blocks (Hu et al. 2022, arXiv 2106.09685), never reset.

    docs/strategies/editing.md has defaults and when not to use it.
    """

    config_class = LoraEditConfig
    memory = "adapter"

    def attach(self, model: CausalLM, seed: int) -> None:
        """Nothing is added before the first edit."""
        super().attach(model, seed)
        self.additions = Additions(block_layers(self.location), self.location.decoder)

    def start(self) -> dict[str, Change]:
        """A drawn as peft draws it, B zero: the function does not change."""
        made: dict[str, Change] = {}
        for name, layer in self.additions.layers.items():
            rows, columns = matrix_shape(layer)
            generator = fresh_generator(self.seed, "lora edit", name)
            drawn = torch.rand(self.config.rank, columns, generator=generator, dtype=torch.float32)
            down = (2 * drawn - 1) / columns**0.5
            made[name] = self._change(down, torch.zeros(rows, self.config.rank, dtype=torch.float32))
        return made

    def _change(self, down: Tensor, up: Tensor) -> LowRankChange:
        device, config = self.location.device, self.config
        return LowRankChange(down.to(device), up.to(device), config.alpha / config.rank)

    def train(self, record: EditRecord, changes: Mapping[str, Change]) -> tuple[dict[str, Change], list[float]]:
        """Adam on A and B of every layer; full forward and backward passes."""
        config = self.config
        found, prefix = self.prefix(record)
        copies: dict[str, Change] = {}
        for name, change in changes.items():
            down, up = (t.clone().requires_grad_() for t in _factors(change))
            copies[name] = self._change(down, up)
        tensors = [t for change in copies.values() for t in _factors(change)]
        before = self.additions.changes

        def loss() -> Tensor:
            return target_loss(self.reader.logits(found, found.learned), prefix.targets)

        self.additions.put(copies)
        try:
            with evaluating(self.model.module):
                losses = descend(
                    loss,
                    tensors,
                    steps=config.steps,
                    learning_rate=config.learning_rate,
                    stop_loss=config.stop_loss,
                )
        finally:
            self.additions.put(before)
        return {name: self._change(*(t.detach() for t in _factors(c))) for name, c in copies.items()}, losses

    def memory_state(self) -> dict[str, Any]:
        """A and B of every layer."""
        factors = {name: list(_factors(change)) for name, change in self.additions.changes.items()}
        return {**super().memory_state(), "factors": factors}

    def load_memory_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`memory_state`."""
        super().load_memory_state(state)
        self.additions.put({name: self._change(down, up) for name, (down, up) in state["factors"].items()})


def _factors(change: Change) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of one layer's change."""
    return change.get_buffer("down"), change.get_buffer("up")
