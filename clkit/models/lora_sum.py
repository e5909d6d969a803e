"""The sum of the finished tasks' updates: kept as float32 factors, added to what the module computes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clkit.models.lora import true_shape
from clkit.modes import swapped

Factors = tuple[Tensor, Tensor]


class AdaptedLayer:
    """One layer that peft adapted: its base layer and the factors in training, seen without peft's dictionaries.

    Attributes:
        base: the layer that was wrapped; plain, quantised, tied, as it is.
        A: the parameter (r, in).
        B: the parameter (out, r).
        scaling: alpha / r.
        shape: (out, in).
    """

    def __init__(self, layer: Any, adapter: str) -> None:
        self.base: nn.Module = layer.get_base_layer()
        self.A: nn.Parameter = layer.lora_A[adapter].weight
        self.B: nn.Parameter = layer.lora_B[adapter].weight
        self.scaling = float(layer.scaling[adapter])
        self.shape = (true_shape(self.B)[0], true_shape(self.A)[1])

    def update(self) -> Factors:
        """Copies (r, in) and (out, r) whose product ``b @ a`` is the change of the weight, on the CPU."""
        return self.A.detach().float().cpu().clone(), self.B.detach().float().cpu() * self.scaling

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """A fresh adapter: A uniform as peft and the LoRA paper's code draw it (bound 1 / sqrt(in)), B zero."""
        bound = self.shape[1] ** -0.5
        self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
        self.B.zero_()


def adapted_layers(module: nn.Module) -> dict[str, AdaptedLayer]:
    """All layers with the active LoRA adapter, by name; empty without one."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
            if active:
                found[name] = AdaptedLayer(layer, active[0])
    return found


def other_updates(module: nn.Module) -> dict[str, str]:
    """Layers with the active LoRA adapter whose update is not scaling * B A of a linear layer, and what it is."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    found = {}
    for name, layer in module.named_modules():
        for adapter in layer.active_adapters if isinstance(layer, LoraLayer) else ():
            base = layer.get_base_layer()
            if adapter in layer.lora_embedding_A:
                found[name] = "an embedding"
            elif isinstance(layer, ParamWrapper) and not isinstance(base, nn.Linear):
                found[name] = f"a parameter of {type(base).__name__}"
            elif adapter in layer.lora_variant:
                found[name] = "more than B A, by an option such as use_dora"
            elif layer.lora_bias.get(adapter):
                found[name] = "a bias beside B"
            elif adapter in layer.lora_A and len(true_shape(layer.lora_A[adapter].weight)) != 2:
                found[name] = "a convolution"
    return found


class PastUpdates:
    """What earlier tasks changed. Weights of the base model are never written to.

    A plain float32 layer gets a new weight tensor, base + sum, so that later tasks cost nothing more. Any other layer
    (half precision, quantised, tied) keeps its weight and gets the sum as a low-rank branch: small updates would be
    lost in the rounding of its weight.

    A module on which another object like this one acted keeps that one's sums; ``inherited`` are the tasks in them.

    Attributes:
        inherited: those that :meth:`add` has not been given; the sums are right once there are none.
    """

    def __init__(self, module: nn.Module, layers: Mapping[str, AdaptedLayer]) -> None:
        self._layers = layers
        self._tasks: list[dict[str, Factors]] = []
        self._branches: dict[str, Factors] = {}
        self._hooks: list[RemovableHandle] = []
        before = _ACTING.get(module)
        self.inherited: list[dict[str, Factors]] = [] if before is None else [*before._tasks, *before.inherited]
        for hook in [] if before is None else before._hooks:
            hook.remove()
        _ACTING[module] = self
        owners = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
        self._folded = {name for name, layer in layers.items() if _is_plain(layer.base, owners)}
        for name, layer in layers.items():
            if name not in self._folded:
                self._hooks.append(layer.base.register_forward_hook(self._branch(name)))

    @property
    def folded(self) -> list[nn.Parameter]:
        """The weights that :meth:`add` writes to."""
        bases: list[Any] = [self._layers[name].base for name in self._layers if name in self._folded]
        return [base.weight for base in bases]

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, updates: dict[str, Factors]) -> None:
        """Add one task's update of every layer, as :meth:`AdaptedLayer.update` gives it."""
        self._tasks.append(updates)
        there = bool(self.inherited) and _equal(updates, self.inherited[0])
        if there:
            del self.inherited[0]
        for name, (a, b) in updates.items():
            layer = self._layers[name]
            if name in self._folded:
                if there:
                    continue
                weight: Any = layer.base.weight
                # Always task after task, also when a run resumes: another order would round differently.
                weight.data = weight.data + (b @ a).to(weight)
            else:
                a, b = _side_by_side([task[name] for task in self._tasks])
                self._branches[name] = (a.to(layer.A.device), b.to(layer.A.device))

    def rows(self, name: str) -> Tensor:
        """(R, in) the A matrices of all finished tasks in one layer, one below the other, on the CPU."""
        return torch.cat([task[name][0] for task in self._tasks])

    def _branch(self, name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if name not in self._branches:
                return output
            a, b = self._branches[name]
            x = inputs[0]
            x = x if torch.is_autocast_enabled(x.device.type) else x.to(a.dtype)
            return output + F.linear(F.linear(x, a), b).to(output.dtype)

        return add

    @contextmanager
    def one_adapter(self, module: nn.Module) -> Iterator[None]:
        """Within, the module's parameters and peft's configuration are one adapter: all past tasks and the current.

        Exact: the factors side by side, rank R = the sum of a layer's ranks, alpha = R. Only for saving.
        """
        names = {id(p): name for name, p in module.named_parameters()}
        # An adapter that was not trained since the last task adds nothing but size.
        used = not self._tasks or any(bool(layer.B.any()) for layer in self._layers.values())
        tensors, ranks = {}, {}
        for name, layer in self._layers.items():
            parts = [updates[name] for updates in self._tasks] + ([layer.update()] if used else [])
            a, b = _side_by_side(parts)
            tensors[names[id(layer.A)]], tensors[names[id(layer.B)]] = a, b
            ranks[f"^{re.escape(name.removeprefix('base_model.model.'))}$"] = len(a)
        config = module.peft_config[module.active_adapter]  # type: ignore[index]
        rank = max(ranks.values())
        others = {layer: own for layer, own in ranks.items() if own != rank}
        # The scales are in the factors: whatever made them (patterns, rank stabilisation) must not act again.
        plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": others, "alpha_pattern": others}
        declared = {option: getattr(config, option) for option in plain}
        try:
            vars(config).update(plain)
            with swapped(module, tensors):
                yield
        finally:
            vars(config).update(declared)

    def state_dict(self) -> list[dict[str, dict[str, Tensor]]]:
        """Per task and layer, the factors of its update."""
        return updates_to_state(self._tasks)

    def load_state_dict(self, state: list[dict[str, dict[str, Tensor]]]) -> None:
        """Inverse of :meth:`state_dict`, on a model without past updates or with those that it begins with."""
        for updates in updates_from_state(state):
            self.add(updates)


_ACTING: WeakKeyDictionary[nn.Module, PastUpdates] = WeakKeyDictionary()


def carries_updates(module: nn.Module) -> bool:
    """Whether the module computes with updates of finished tasks that are in no adapter of it."""
    past = _ACTING.get(module)
    return past is not None and len(past) > 0


def _equal(ours: Mapping[str, Factors], theirs: Mapping[str, Factors]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(x, y) for name in ours for x, y in zip(ours[name], theirs[name], strict=True)
    )


def updates_to_state(tasks: Sequence[Mapping[str, Factors]]) -> list[dict[str, dict[str, Tensor]]]:
    """Per task and layer, the factors of its update, for a checkpoint."""
    return [{name: {"A": a, "B": b} for name, (a, b) in updates.items()} for updates in tasks]


def updates_from_state(state: list[dict[str, dict[str, Tensor]]]) -> list[dict[str, Factors]]:
    """Inverse of :func:`updates_to_state`."""
    return [{name: (pair["A"], pair["B"]) for name, pair in updates.items()} for updates in state]


def _side_by_side(parts: list[Factors]) -> Factors:
    """(R, in) and (out, R) factors whose product is the sum of the parts' products, R = their ranks together."""
    return torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)


def _is_plain(base: nn.Module, owners: Counter[int]) -> bool:
    """A linear layer of its own, in a precision in which the sum loses nothing that matters."""
    return (
        type(base) is nn.Linear and base.weight.dtype in (torch.float32, torch.float64) and owners[id(base.weight)] == 1
    )
