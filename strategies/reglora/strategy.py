"""RegLoRA: a fresh LoRA per task, kept small where earlier tasks' updates were largest (Chen et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clkit.fresh_lora import FreshLora
from clkit.models.lora_sum import AdaptedLayer
from clkit.strategies.reglora.config import RegLoRAConfig
from clkit.strategies.reglora.masks import extend, from_state, to_state
from clkit.strategies.reglora.sparse import Mask, dense_penalty, penalty
from clkit.strategies.reglora.top import random_entries, top_entries
from clkit.strategy import RunContext
from clkit.tasks.base import Task


class RegLoRA(FreshLora):
    """Cross entropy, and from the second task on ``lam / n_div`` times the sum over layers of ``|B A|`` on their masks.

    The regulariser depends on no data, so its gradient is added once per optimiser step, whatever the micro-batches
    and the checkpointing of activations, and without a change to the model's own code.
    """

    config_class = RegLoRAConfig

    @classmethod
    def kept_bytes(cls, config: Any, sizes: Mapping[str, int], tasks: int) -> int:
        """Also masks: 12 bytes for a chosen entry, if no two tasks choose the same."""
        updates: int = super().kept_bytes(config, sizes, tasks)
        masks = round(12 * float(config.fraction) * sizes["parameters"])
        return updates + masks * (tasks - 1)

    def setup(self, run: RunContext) -> None:
        """See the base class; nothing is protected yet."""
        super().setup(run)
        self.masks: dict[str, Mask] = {}

    # --- the regulariser --------------------------------------------------------------------------------------------
    def after_backward(self) -> None:
        """Add the gradient of the regulariser."""
        config, position = self.config, self.run.position
        if not len(self.past) or not config.lam or position.step % config.every:
            return
        strength = config.lam * config.every / (config.n_div or len(self.layers))
        losses = []
        with self.factors():
            for name, layer in self.layers.items():
                loss, d_b, d_a = self._penalty(name, layer)
                scale = layer.scaling ** (1 if config.norm == "l1" else 2) if config.scaled else 1.0
                self.run.engine.add_gradient(layer.B, d_b, strength * scale)
                self.run.engine.add_gradient(layer.A, d_a, strength * scale)
                losses.append(loss * scale)
        done = position.step + 1
        # The first regularised step at or after a logged one: with `every` the two may never be the same.
        if done == 1 or done % self.run.config.tracking.log_every < config.every:
            self.run.log("regulariser", strength * float(torch.stack(losses).sum()))

    def _penalty(self, name: str, layer: AdaptedLayer) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        result: tuple[Tensor, Tensor, Tensor]
        if config.mask == "all":
            result = dense_penalty(layer.B, layer.A, config.norm, config.reduction)
        else:
            result = penalty(layer.B, layer.A, self.masks[name], config.norm, config.reduction)
        return result

    # --- between tasks ----------------------------------------------------------------------------------------------
    def end_task(self, task: Task) -> None:
        """Extend the masks, add the update to the sum, and start a fresh adapter."""
        if self.config.mask != "all":
            with self.factors():
                for name, layer in self.layers.items():
                    rows, cols = self._chosen(layer)
                    self.masks[name] = extend(self.masks.get(name), rows, cols, layer.shape, self.config.accumulate)
        super().end_task(task)

    def _chosen(self, layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
        rows: Tensor
        cols: Tensor
        if self.config.mask == "top":
            rows, cols = top_entries(layer.B, layer.A, self.config.fraction)
        else:
            generator = self.run.streams["reglora random mask"]
            rows, cols = random_entries(layer.shape, self.config.fraction, generator)
        return rows.to(layer.A.device), cols.to(layer.A.device)

    # --- what stays -------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The buffer, the masks and the past updates."""
        masks = {name: to_state(mask) for name, mask in self.masks.items()}
        return {**super().state_dict(), "masks": masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.masks = {name: from_state(mask, self.layers[name].A.device) for name, mask in state["masks"].items()}
