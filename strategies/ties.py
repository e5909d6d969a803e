"""Merging of per-task LoRA updates: TIES, largest magnitude, or their sum (task arithmetic)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clkit.config import StrategyConfig, opt
from clkit.errors import CapabilityError, Problem
from clkit.fresh_lora import require_adapter
from clkit.models.lora_sum import AdaptedLayer, Factors, updates_from_state, updates_to_state
from clkit.modes import swapped
from clkit.strategy import Capabilities, RunContext, Strategy
from clkit.tasks.base import Task


@dataclass
class TiesConfig(StrategyConfig):
    """Options of merging."""

    method: str = opt(
        "ties",
        "ties: trim, elect a sign, mean of those that agree; magmax: the largest; task-arithmetic: the sum",
        choices=("ties", "magmax", "task-arithmetic"),
    )
    density: float = opt(0.2, "ties: part of each update's entries that is kept, the largest", above=0, max=1)
    scaling: float = opt(1.0, "the merged update is multiplied by this", above=0)
    start: str = opt(
        "base",
        "each task starts from the base model with a fresh adapter, or goes on with the adapter of the one before",
        choices=("base", "previous"),
    )


@torch.no_grad()
def merge(deltas: Tensor, method: str, density: float = 0.2) -> Tensor:
    """One update made of several.

    ``ties`` (Yadav et al. 2023): of each update the largest ``density`` of the entries stay, the others become 0; the
    sign of an entry is that of the sum over the updates; the mean is over the entries that have it and are not 0.
    Trimmed per matrix; the published code trims the whole model at once. ``magmax`` (Marczak et al. 2024): per entry
    the value of largest magnitude, of equal ones the first. ``task-arithmetic`` (Ilharco et al. 2023): the sum.

    Args:
        deltas: (T, out, in), changes of one weight against the same starting point; changed in place.
        method: see above.
        density: in (0, 1].

    Returns:
        (out, in).

    Example:
        >>> merge(torch.tensor([[[3.0, -1.0]], [[1.0, 5.0]], [[-1.0, 0.0]]]), "ties", density=1.0).tolist()
        [[2.0, 5.0]]
    """
    if method == "task-arithmetic":
        return deltas.sum(0)
    merged = torch.zeros_like(deltas[0])
    if method == "magmax":
        for delta in deltas:
            merged = torch.where(delta.abs() > merged.abs(), delta, merged)
        return merged
    kept = math.ceil(Fraction(str(density)) * merged.numel())  # of the decimal: .07 * 100 is more than 7 in floats
    for delta in deltas:
        magnitude = delta.abs()
        delta[magnitude < magnitude.flatten().topk(kept, sorted=False).values.min()] = 0
    elected = deltas.sum(0).sign()
    count = torch.zeros_like(merged)
    for delta in deltas:
        agrees = delta * elected > 0
        merged += delta * agrees
        count += agrees
    return merged / count.clamp(min=1)


class Ties(Strategy):
    """Trains an adapter per task, and serves the base model plus the merged updates of all tasks so far.

    Training itself protects nothing. Updates are kept as low-rank factors in float32 and multiplied out for one matrix
    at a time when a model is served. A merged update has no low rank: what is exported is the full model.
    """

    config_class = TiesConfig
    capabilities = Capabilities(kinds=frozenset({"text"}), needs_lora=True)

    @classmethod
    def check(cls, config: TiesConfig) -> list[Problem]:
        """Only `ties` trims."""
        if config.method != "ties" and config.density != TiesConfig.density:
            return [Problem("strategy.density", f"method={config.method} takes every entry; drop one of the two")]
        return []

    def setup(self, run: RunContext) -> None:
        """Find the adapted layers.

        Raises:
            CapabilityError: the model carries no LoRA adapter, more is trained than that, or a dense update can't be
                added to one of its weights.
        """
        super().setup(run)
        self.layers = require_adapter(self)
        self._updates: list[dict[str, Factors]] = []
        own = {id(parameter) for layer in self.layers.values() for parameter in (layer.A, layer.B)}
        beside = [n for n, p in run.model.module.named_parameters() if p.requires_grad and id(p) not in own]
        if beside:
            raise CapabilityError(
                f"'{beside[0]}' is trained beside the adapter, and what is not an update of a linear layer is neither "
                "reset between tasks nor merged; make an adapter without modules_to_save, biases and tokens of its own."
            )
        named = list(run.model.module.named_parameters(remove_duplicate=False))
        owners = Counter(id(p) for _, p in named)
        self._names = {id(p): name for name, p in named}
        for name, layer in self.layers.items():
            if not _is_dense(layer.base) or owners[id(layer.base.weight)] > 1:
                raise CapabilityError(
                    f"Merged updates are added to the weights, and '{name}' is quantised, tied or not linear; load the "
                    "model unquantised, or name other modules in model.lora.target_modules."
                )

    def end_task(self, task: Task) -> None:
        """Keep the update; a fresh adapter if the next task starts from the base model."""
        self._updates.append(self._current())
        if self.config.start == "base":
            for layer in self.layers.values():
                layer.reset(self.run.streams["fresh adapter"])

    def _current(self) -> dict[str, Factors]:
        return {name: layer.update() for name, layer in self.layers.items()}

    def merged(self) -> Iterator[tuple[AdaptedLayer, Tensor]]:
        """Each layer with its merged update (out, in); within a task the unfinished update is one of them."""
        position = self.run.position
        unfinished = len(self._updates) <= position.stage and position.step > 0
        updates = [*self._updates, *([self._current()] if unfinished else [])]
        for name, layer in self.layers.items() if updates else ():
            deltas = torch.stack([b.to(layer.B.device) @ a.to(layer.A.device) for a, b in (u[name] for u in updates)])
            yield layer, self.config.scaling * merge(deltas, self.config.method, self.config.density)

    @contextmanager
    def _serve(self) -> Iterator[nn.Module]:
        weights: dict[str, Tensor] = {}
        for layer, delta in self.merged():
            base: Any = layer.base
            own = base.weight.data
            delta = delta if isinstance(base, nn.Linear) else delta.T
            weights[self._names[id(base.weight)]] = (own + delta).to(own.dtype)
        module: Any = self.run.model.module
        with swapped(module, weights), module.disable_adapter():
            yield module

    def export(self, directory: Path) -> str:
        """Write the merged model as a plain Hugging Face directory."""
        with self.inference():
            model: Any = self.run.model
            snippet: str = model.export_full(directory)
            return snippet

    def state_dict(self) -> dict[str, Any]:
        """The buffer and the updates."""
        return {**super().state_dict(), "updates": updates_to_state(self._updates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self._updates = updates_from_state(state["updates"])


def _is_dense(base: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, its weight transposed

    return isinstance(base, nn.Linear | Conv1D) and base.weight.is_floating_point()
