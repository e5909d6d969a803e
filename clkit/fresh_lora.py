"""What strategies share that train a fresh LoRA per task and serve the sum of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from clkit.errors import CapabilityError
from clkit.models.lora_sum import AdaptedLayer, PastUpdates, adapted_layers, other_updates
from clkit.strategy import Capabilities, RunContext, Strategy, carried, on_deepspeed
from clkit.tasks.base import Task

# Ways of peft to draw an adapter that take it out of the base model: the base is another one then.
_SPLITS_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def require_adapter(strategy: Strategy) -> dict[str, AdaptedLayer]:
    """The layers of the run's model that carry its adapter, by name.

    Raises:
        CapabilityError: there are none, or updates of some can't be summed as products of two matrices.
    """
    model, who = strategy.run.model, type(strategy).__name__
    layers, others = adapted_layers(model.module), other_updates(model.module)
    if others:
        first, what = next((n.removeprefix("base_model.model."), w) for n, w in others.items())
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise CapabilityError(
            f"{who} sums updates B A of linear layers, and the adapter of model '{model.name}' has others: "
            f"'{first}'{more}: {what}. Make a plain LoRA adapter; name linear layers in its target modules "
            "(model.lora.target_modules)."
        )
    if not layers:
        raise CapabilityError(f"{who} needs a LoRA adapter, and model '{model.name}' has none; set model.lora.r.")
    module: Any = model.module
    drawn = getattr(module.peft_config[module.active_adapter], "init_lora_weights", True)
    if isinstance(drawn, str) and drawn.startswith(_SPLITS_BASE):
        raise CapabilityError(
            f"{who} starts each task with a fresh adapter on the same base model, and the adapter of model "
            f"'{model.name}' was made with init_lora_weights='{drawn}': it changes the base model. Leave it out."
        )
    return layers


class FreshLora(Strategy):
    """A fresh adapter per task on the model with all earlier updates, which are summed in float32.

    What a subclass adds is what holds the new adapter back. The export is one plain LoRA adapter with all updates.

    Attributes:
        layers: the adapted layers by name.
        past: the finished tasks' updates.
    """

    capabilities = Capabilities(kinds=frozenset({"text"}), needs_lora=True, causal=True, **on_deepspeed())

    @classmethod
    def kept_bytes(cls, config: Any, sizes: Mapping[str, int], tasks: int) -> int:
        """The updates of finished tasks, which stay factors on a base in half precision."""
        return 4 * sizes["trainable"] * (tasks - 1)

    def setup(self, run: RunContext) -> None:
        """Find the adapted layers.

        Raises:
            CapabilityError: the model carries no LoRA adapter, or one of another kind.
        """
        self.run = run
        self.layers = require_adapter(self)
        self.past = PastUpdates(run.model.module, self.layers)
        super().setup(run)

    def begin_task(self, task: Task) -> None:
        """A model that an earlier run left its updates in would be exported without them.

        Raises:
            ModelError: it is such a model.
        """
        if self.past.inherited:
            raise carried(self.run.model)

    def factors(self, write: bool = False) -> AbstractContextManager[None]:
        """Within, the adapters' matrices are whole."""
        matrices = [parameter for layer in self.layers.values() for parameter in (layer.A, layer.B)]
        return self.run.engine.gathered(matrices, write)

    def end_task(self, task: Task) -> None:
        """Add the update to the sum, and start a fresh adapter."""
        engine = self.run.engine
        with self.factors(write=True), engine.gathered(self.past.folded, write=True):
            self.past.add({name: layer.update() for name, layer in self.layers.items()})
            for layer in self.layers.values():
                layer.reset(self.run.streams["fresh adapter"])

    def export(self, directory: Path) -> str:
        """Write one plain PEFT adapter: all tasks' factors side by side, exactly the sum of their updates."""
        with self.past.one_adapter(self.run.model.module):
            return super().export(directory)

    def state_dict(self) -> dict[str, Any]:
        """The buffer and the past updates."""
        return {**super().state_dict(), "past": self.past.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        with self.run.engine.gathered(self.past.folded, write=True):
            self.past.load_state_dict(state["past"])
        if self.past.inherited:
            raise carried(self.run.model)
