"""Orthogonal subspace fine-tuning, by peft's OSF: leading singular directions are frozen, the others learn."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clkit.config import StrategyConfig, opt
from clkit.errors import CapabilityError
from clkit.models.lora import check_fits
from clkit.models.noise import routed
from clkit.modes import swapped
from clkit.strategy import Capabilities, RunContext, Strategy
from clkit.tasks.base import Task


@dataclass
class OSFConfig(StrategyConfig):
    """Options of orthogonal subspace fine-tuning; ``model.lora.target_modules`` names the layers."""

    preserve: float = opt(0.5, "part of a weight's singular directions that is frozen, the largest", above=0, max=0.99)
    progressive: bool = opt(False, "freeze (t-1)/n of them in task t of n instead (at least one)")
    exact: bool = opt(
        True,
        "also project the factors after each step: Adam scales the projected gradient and so leaves the subspace",
    )


class OSF(Strategy):
    """Trains U, S, V of the trailing part of ``W = U_high S_high V_high + U S V`` (Nayak et al. 2025), by peft.

    peft projects the gradients of U and V away from the frozen directions. At each new task what was learned is merged
    into W, and W is decomposed again. (peft's documentation unwraps with ``unload()``; where layers add a difference to
    the base layer, as in 0.21, that throws away what was learned.) Evaluation and export take the merged weights.
    """

    config_class = OSFConfig
    capabilities = Capabilities(kinds=frozenset({"text"}))

    @classmethod
    def trained(cls, sizes: Mapping[str, int]) -> int | None:
        """Its own: parts of decompositions, in the place of an adapter."""
        return None

    def setup(self, run: RunContext) -> None:
        """Put OSF in the place of the model's LoRA adapter, if it has one.

        Raises:
            ModelError: a target module does not exist.
            CapabilityError: the weights are quantised, in half precision, tied, or not of a linear layer.
        """
        self.run = run
        module: Any = run.model.module
        base: Any = module.unload() if hasattr(module, "peft_config") else module
        check_fits(base, run.config.model.lora, 1)
        other = {p.dtype for p in base.parameters()} - {torch.float32, torch.float64}
        if other:
            raise CapabilityError(
                f"OSF decomposes the weights and trains the parts, and those of model '{run.model.name}' are "
                f"{', '.join(sorted(map(str, other)))}; set model.dtype=float32."
            )
        self._wrap(base, stage=0)
        layers = self._layers()
        if not layers:
            raise CapabilityError(
                f"peft's OSF adapts nn.Linear only, and model '{run.model.name}' has none called "
                f"{', '.join(run.config.model.lora.target_modules)}."
            )
        owners = Counter(id(p) for _, p in run.model.module.named_parameters(remove_duplicate=False))
        tied = [name for name, layer in layers.items() if owners[id(layer.base_layer.weight)] > 1]
        if tied:
            raise CapabilityError(
                f"OSF decomposes each weight by itself, and that of '{tied[0]}' is shared with another layer; name "
                "other modules in model.lora.target_modules."
            )
        super().setup(run)

    def _wrap(self, base: nn.Module, stage: int) -> None:
        """Decompose the weights of ``base`` as they are now."""
        import peft

        lora = self.run.config.model.lora
        targets: Any = "all-linear" if "all-linear" in lora.target_modules else list(lora.target_modules)
        part = stage / len(self.run.tasks) if self.config.progressive else self.config.preserve
        sizes = {name: min(m.weight.shape) for name, m in base.named_modules() if isinstance(m, nn.Linear)}
        ranks: Any = {f"^{re.escape(name)}$": max(1, int(part * size)) for name, size in sizes.items()}
        config = peft.OSFConfig(rank_pattern=ranks, target_modules=targets, task_type="CAUSAL_LM")
        model: Any = base
        with routed():
            self.run.model.module = peft.get_peft_model(model, config)
        self._stage = stage

    def _layers(self) -> dict[str, Any]:
        from peft.tuners.osf.layer import OSFLayer

        return {name: layer for name, layer in self.run.model.module.named_modules() if isinstance(layer, OSFLayer)}

    def begin_task(self, task: Task) -> None:
        """Merge what was learned, and decompose again."""
        if self.run.position.stage > 0:
            module: Any = self.run.model.module
            with torch.no_grad():
                base = module.merge_and_unload()
            self._wrap(base, self.run.position.stage)

    @torch.no_grad()
    def after_step(self) -> None:
        """Apply peft's projection of the gradients to the factors: the updates are then inside the subspace too."""
        if self.config.exact:
            for parameter in self.parameters():
                hooks: Any = parameter._backward_hooks or {}
                for project in hooks.values():
                    parameter.copy_(project(parameter.detach()))

    # --- what serves and stays --------------------------------------------------------------------------------------
    @contextmanager
    def _serve(self) -> Iterator[nn.Module]:
        module: Any = self.run.model.module
        with torch.no_grad():
            merged = {
                f"{name}.base_layer.weight": layer.base_layer.weight + layer.get_delta_weight("default")
                for name, layer in self._layers().items()
            }
        with swapped(module, merged), module.disable_adapter():
            yield module

    def export(self, directory: Path) -> str:
        """Write the merged model as a plain Hugging Face directory."""
        with self.inference():
            model: Any = self.run.model
            snippet: str = model.export_full(directory)
            return snippet

    def state_dict(self) -> dict[str, Any]:
        """The buffer and, once something was merged, the weights that were decomposed."""
        weights = {name: layer.base_layer.weight for name, layer in self._layers().items()} if self._stage else {}
        return {**super().state_dict(), "stage": self._stage, "weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; the same weights have the same decomposition."""
        super().load_state_dict(state)
        if state["stage"]:
            for name, layer in self._layers().items():
                layer.base_layer.weight.data = state["weights"][name].to(layer.base_layer.weight.device)
            module: Any = self.run.model.module
            self._wrap(module.unload(), state["stage"])
