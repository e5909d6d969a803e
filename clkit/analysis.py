"""Analysis in parameter space: the path between two LoRA adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clkit.errors import ConfigError, ModelError
from clkit.models.lora import base_model

Adapter = str | Path | Mapping[str, Tensor]
"""A PEFT adapter: its directory, or its tensors by PEFT's names (``...q_proj.lora_A.weight``)."""

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def interpolate(adapter_a: Adapter, adapter_b: Adapter, weight: float, space: str = "factor") -> dict[str, Tensor]:
    """The adapter at ``weight`` on the way from ``adapter_a`` (0) to ``adapter_b`` (1).

    ``factor``: A and B are interpolated one by one (the path of the I-LoRA paper). ``delta``: the updates B A are
    interpolated exactly; the result has the rank of both together. The two differ: with w = ``weight`` and one scale,
    ``delta - factor = w (1 - w) (B_b - B_a) (A_b - A_a)``.

    Args:
        adapter_a: a LoRA adapter.
        adapter_b: one of the same model and target modules; in ``factor`` of the same rank and scale too.
        weight: any number; outside 0 to 1 it extrapolates.
        space: ``factor`` or ``delta``.

    Returns:
        Tensors by PEFT's names, in the types of ``adapter_a``, at the scale alpha / r of ``adapter_a``.
        :func:`save_adapter` writes them as an adapter directory.

    Raises:
        ConfigError: ``space`` is something else.
        ModelError: an adapter can't be read, is no LoRA adapter, or the two are not of the same model.
    """
    if space not in ("factor", "delta"):
        raise ConfigError(f"`space`: got '{space}', expected factor or delta")
    (a, config_a), (b, config_b) = _read(adapter_a), _read(adapter_b)
    _check_pair(a, config_a, b, config_b, space)
    if space == "factor":
        return {name: _mix(a[name], b[name], weight) for name in a}
    result: dict[str, Tensor] = {}
    for name in a:
        if "lora_A" in name:
            result[name] = torch.cat([a[name], b[name].to(a[name])])
        elif "lora_B" in name:
            relative = _relative_scale(a, config_a, b, config_b, name)
            parts = [(1 - weight) * a[name], weight * relative * b[name].to(a[name])]
            result[name] = torch.cat(parts, dim=1)
        else:  # a whole weight beside the adapter (modules_to_save): linear in either space
            result[name] = _mix(a[name], b[name], weight)
    return result


def _mix(a: Tensor, b: Tensor, weight: float) -> Tensor:
    return torch.lerp(a, b.to(a), weight)


def deltas(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """(module, update of its weight (out, in)) of each adapted linear layer, one at a time.

    The update is alpha / r * B @ A; without a configuration (bare tensors) the scale is 1.

    Raises:
        ModelError: the adapter can't be read or is no LoRA adapter.
    """
    tensors, config = _read(adapter)
    for name in tensors:
        if "lora_A" in name:
            partner = name.replace("lora_A", "lora_B")
            yield name.partition(".lora_A")[0], _scale(tensors, config, partner) * tensors[partner] @ tensors[name]


def check_adapter(adapter: Adapter, module: nn.Module) -> None:
    """Refuse an adapter of another model before it is put on this one.

    Args:
        adapter: a LoRA adapter.
        module: the transformers model, wrapped by peft or not.

    Raises:
        ModelError: the adapter can't be read, or adapts a module that is not there or has another shape.
    """
    tensors, _ = _read(adapter)
    modules = dict(base_model(module).named_modules())
    where = "The tensors given" if isinstance(adapter, Mapping) else f"{adapter}"
    for name in (name for name in tensors if "lora_A" in name):
        path = name.partition(".lora_A")[0].removeprefix("base_model.model.")
        size = tensors[name.replace("lora_A", "lora_B")].shape[0], tensors[name].shape[1]
        there = _size(modules[path]) if path in modules else None
        if there is None:
            raise ModelError(f"{where}: an adapter of another model: this one has no linear layer '{path}'.")
        if sorted(there) != sorted(size):  # GPT-2 keeps its weights transposed
            raise ModelError(
                f"{where}: an adapter of another model: '{path}' is {tuple(there)} here, and the adapter's is {size}."
            )


def _size(layer: nn.Module) -> tuple[int, ...] | None:
    """(out, in) of a linear layer, also where its weight is packed; (in, out) of GPT-2's; None of anything else."""
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
    weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) and weight.dim() == 2 else None


def save_adapter(tensors: Mapping[str, Tensor], directory: str | Path, like: str | Path) -> None:
    """Write ``tensors`` as a PEFT adapter directory with the configuration of the adapter in ``like``.

    The rank is read from the tensors; alpha is set so that the scale of ``like`` stays.

    Raises:
        ModelError: ``like`` can't be read, or adapts other modules than ``tensors`` do.
    """
    like_tensors, config = _read(like)
    ranks = {tensors[name].shape[0] for name in tensors if "lora_A" in name}
    if len(ranks) != 1:
        raise ModelError(f"The tensors have ranks {sorted(ranks)}; an adapter of one rank can be written.")
    if only := sorted(tensors.keys() ^ like_tensors.keys()):
        raise ModelError(
            f"{like}: adapts other modules than the tensors given ({len(only)} names are in one of them only, for "
            f"example '{only[0]}'). Give an adapter of the same modules of the same model."
        )
    (rank,) = ranks
    root = rank**0.5 if config.get("use_rslora") else rank
    scale = _scale(like_tensors, config, next(name for name in like_tensors if "lora_B" in name))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / _WEIGHTS)
    content = json.dumps({**config, "r": rank, "rank_pattern": {}, "lora_alpha": scale * root}, indent=2)
    (directory / _CONFIG).write_text(content, encoding="utf-8")


def _scale(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> float:
    """alpha / r of the module whose B is called ``name``; 1 without a configuration."""
    if not config:
        return 1.0
    if config.get("alpha_pattern"):
        raise ModelError("Adapters with several scales in one model (alpha_pattern) can't be combined here.")
    rank: int = tensors[name].shape[1]
    return float(config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)


def _relative_scale(
    a: Mapping[str, Tensor],
    config_a: Mapping[str, Any],
    b: Mapping[str, Tensor],
    config_b: Mapping[str, Any],
    name: str,
) -> float:
    """Scale of b over that of a; bare tensors have the scale of the other."""
    return _scale(b, config_b, name) / _scale(a, config_a, name) if config_a and config_b else 1.0


def _read(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration (empty for bare tensors)."""
    if isinstance(adapter, Mapping):
        tensors, config = dict(adapter), {}
    else:
        path = Path(adapter)
        try:
            config = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(path / _WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(
                f"{path}: no readable PEFT adapter ({error}). Give a directory with {_CONFIG} and {_WEIGHTS}, such as "
                "the `export` of a run with model.lora.r above 0."
            ) from error
    where = "the tensors given" if isinstance(adapter, Mapping) else str(adapter)
    # DoRA magnitudes, embedding adapters and biases of B are no part of B A.
    foreign = [n for n in tensors if "lora_" in n and (n.endswith("bias") or not ("lora_A" in n or "lora_B" in n))]
    if foreign or config.get("peft_type", "LORA") != "LORA" or not any("lora_A" in n for n in tensors):
        found = f"it holds {foreign[0]}" if foreign else f"peft_type is {config.get('peft_type')}"
        raise ModelError(f"{where}: not a plain LoRA adapter ({found}); only pairs of lora_A and lora_B are supported.")
    alone = [n for n in tensors if "lora_A" in n and n.replace("lora_A", "lora_B") not in tensors]
    if alone:
        raise ModelError(f"{where}: {alone[0]} has no lora_B beside it; the adapter is incomplete.")
    return tensors, config


def _check_pair(
    a: Mapping[str, Tensor],
    config_a: Mapping[str, Any],
    b: Mapping[str, Tensor],
    config_b: Mapping[str, Any],
    space: str,
) -> None:
    bases = [config.get("base_model_name_or_path") for config in (config_a, config_b)]
    if all(bases) and bases[0] != bases[1]:
        raise ModelError(
            f"The adapters belong to different models: '{bases[0]}' and '{bases[1]}'. "
            "If that is one model under two names, give the tensors instead of the directories."
        )
    title = "The adapters do not fit each other"
    only = sorted(a.keys() ^ b.keys())
    if only:
        raise ModelError(
            f"{title}: {len(only)} tensors are in one of them only, for example '{only[0]}'. "
            "Both must adapt the same modules of the same model."
        )
    for name in a:
        ours, theirs = list(a[name].shape), list(b[name].shape)
        if space == "delta" and "lora_" in name:  # ranks may differ
            del ours["lora_B" in name], theirs["lora_B" in name]
        if ours != theirs:
            hint = " space='delta' joins different ranks." if "lora_" in name and space == "factor" else ""
            raise ModelError(f"{title}: '{name}' is {tuple(a[name].shape)} and {tuple(b[name].shape)}.{hint}")
        if space == "factor" and "lora_B" in name and _relative_scale(a, config_a, b, config_b, name) != 1:
            raise ModelError("The adapters have different scales (alpha / r); use space='delta', which allows for it.")
