"""LoRA adapters (Hu et al. 2022) through peft: checked before, and drawn from our own generator."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clkit.config import LoraConfig
from clkit.errors import ModelError, Problem, did_you_mean
from clkit.models.noise import routed
from clkit.models.resolve import DEFAULT_RANK
from clkit.models.seeding import seeded

if TYPE_CHECKING:
    from peft import PeftModel

_INNER = ("base_layer", "original_module", "token_adapter")  # under these names peft keeps what it wraps
_WRAPPED = re.compile(rf"\.({'|'.join(_INNER)})(?=\.)")


def attach_lora(
    module: nn.Module, config: LoraConfig, generator: torch.Generator, task_type: str | None = "CAUSAL_LM"
) -> PeftModel:
    """Freeze ``module`` and add a LoRA adapter to it.

    Args:
        module: a transformers model; changed in place.
        config: with ``r`` above 0.
        generator: draws the adapter's A matrices (B is zero, so the function does not change).
        task_type: peft's, None for an encoder.

    Returns:
        The wrapped model. Adapter weights are float32 whatever the base model's type.

    Raises:
        ModelError: a target module does not exist, or the rank exceeds the smallest adapted matrix.
    """
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    rank = DEFAULT_RANK if config.r is None else config.r
    check_fits(module, config, rank)
    alpha: Any = config.alpha  # annotated as an integer there; any number works
    targets: Any = "all-linear" if "all-linear" in config.target_modules else list(config.target_modules)
    adapter = PeftConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type=task_type,
    )
    # The module of an encoder is on "meta" in estimates: parameters made for it must be there too.
    with seeded(generator), routed(), torch.device(next(module.parameters()).device):
        return get_peft_model(module, adapter)


def check_fits(module: nn.Module, config: LoraConfig, rank: int) -> None:
    """Refuse an adapter that does not fit.

    Raises:
        ModelError: a target module does not exist, or the rank exceeds the smallest adapted matrix.
    """
    from transformers.pytorch_utils import Conv1D  # the linear layer of GPT-2

    linear: dict[str, Any] = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    problems: list[Problem] = []
    head = getattr(module, "get_output_embeddings", lambda: None)()
    if "all-linear" in config.target_modules:
        # peft leaves out the output layer.
        adapted = {name: m for name, m in linear.items() if m is not head}
    else:
        known = sorted({name.rpartition(".")[2] for name in linear})
        adapted = {}
        for target in config.target_modules:
            found = {n: m for n, m in linear.items() if n == target or n.endswith(f".{target}")}
            if not found:
                near = did_you_mean(target, known)
                text = f"no linear layer is called '{target}'.{near} There are: {', '.join(known)}"
                problems.append(Problem("model.lora.target_modules", text))
            adapted |= found
    if adapted:
        sides = {n: min(true_shape(m.weight)) for n, m in adapted.items()}
        name, smallest = min(sides.items(), key=lambda x: x[1])
        if rank > smallest:
            text = f"got {rank}, expected at most {smallest} (the smaller side of '{name}')"
            problems.append(Problem("model.lora.r", text))
    if problems:
        raise ModelError.collect("The LoRA adapter does not fit the model:", problems)


def true_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, also while DeepSpeed has split it over processes and left nothing in its place."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def base_model(module: nn.Module) -> nn.Module:
    """The transformers model inside a peft wrapper, or the module itself."""
    inner = getattr(module, "get_base_model", None)
    return inner() if callable(inner) else module


def base_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model without those of adapters in it, by the names that they have without them."""
    named = list(base_model(module).named_parameters(remove_duplicate=False))  # peft holds some twice
    wrapped = {name[: found.start()] for name, _ in named for found in _WRAPPED.finditer(name)}
    result: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, parameter in named:
        path, own = "", ""
        for part in name.split("."):
            if path not in wrapped:
                own = f"{own}.{part}" if own else part
            elif part not in _INNER:  # the adapter's
                break
            path = f"{path}.{part}" if path else part
        else:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                result[own.removeprefix("base_model.model.")] = parameter
    return result


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a model into which peft put adapters, as if it had put none: its own tensors by their own names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = base_model(module)
    adapted = [name for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)]
    state: dict[str, Tensor] = {}
    for key, value in base.state_dict().items():
        layer = next((name for name in adapted if key.startswith(f"{name}.")), None)
        if layer is None:
            state[key] = value
        elif key.startswith(own := f"{layer}.base_layer."):
            state[f"{layer}.{key.removeprefix(own)}"] = value
    return state
