"""Which matrix is edited: the down-projection of one block, found by architecture or by name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clkit.errors import CapabilityError, ConfigError, did_you_mean
from clkit.models.lora import base_model
from clkit.models.routing import uncompiled

# How the blocks of an architecture call the matrix that closes their feed-forward part. One that fits is enough:
# Llama, Mistral, Qwen, Gemma, SmolLM2, Phi-3 | GPT-J | GPT-2 | Phi, Phi-2 | GPT-NeoX, Falcon | MPT
_DOWN = ("mlp.down_proj", "mlp.fc_out", "mlp.c_proj", "mlp.fc2", "mlp.dense_4h_to_h", "ffn.down_proj")


@dataclass(frozen=True)
class Location:
    """One projection and its place in the model.

    Attributes:
        lm: the transformers model, without peft's wrapper.
        decoder: its part below the output layer.
        blocks: the decoder's blocks.
        block: index of the block that is edited.
        name: the projection's name below ``decoder``, the same with and without an adapter.
        projection: the module; with an adapter peft's layer, so that the adapter counts as a part of the base.
        shape: (out, in) of its matrix.
    """

    lm: Any
    decoder: nn.Module
    blocks: nn.ModuleList
    block: int
    name: str
    projection: nn.Module
    shape: tuple[int, int]

    @property
    def device(self) -> torch.device:
        """Where the projection's weights are; those of a quantised one may be no parameters."""
        own = self.projection
        first: Tensor = next(itertools.chain(own.parameters(), own.buffers(), self.lm.parameters()))
        return first.device


def locate(module: nn.Module, where: str, depth: float) -> Location:
    """Find the projection to edit.

    Args:
        module: a causal language model, with or without a peft adapter.
        where: ``auto`` (by ``depth``), the index of a block (from 0; -1 is the last), or the name of a module, of which
            a unique end is enough (``layers.25.mlp.down_proj``).
        depth: for ``auto``: block ``int(depth * number of blocks)``.

    Raises:
        CapabilityError: the model has no list of blocks, or its blocks no projection that is known.
        ConfigError: there is no such block or module.
    """
    lm: Any = base_model(module)
    found_blocks = decoder_blocks(module)
    if found_blocks is None:
        raise CapabilityError(
            f"{type(lm).__name__} has no list of decoder blocks, so no layer to edit; "
            "take a decoder-only language model"
        )
    decoder, prefix, blocks = found_blocks
    count = len(blocks)
    names = {n: m for n, m in decoder.named_modules() if n.startswith(f"{prefix}.")}
    if where == "auto" or where.lstrip("-").isdecimal():
        index = int(depth * count) if where == "auto" else int(where)
        if not -count <= index < count:
            raise ConfigError(
                f"strategy.layer: got {where}, expected a block from 0 to {count - 1}, or -1 for the last"
            )
        index %= count
        found = [f"{prefix}.{index}.{end}" for end in _DOWN if f"{prefix}.{index}.{end}" in names]
        if not found:
            raise CapabilityError(
                f"the blocks of {type(lm).__name__} have no down-projection that is known; "
                f"set strategy.layer to one of: {', '.join(sorted(_matrices(names, f'{prefix}.{index}.')))}"
            )
        name = found[0]
    else:
        name = _by_name(where, _matrices(names, f"{prefix}."))
    index = int(name.removeprefix(f"{prefix}.").partition(".")[0])
    return Location(lm, decoder, blocks, index, name, names[name], matrix_shape(names[name]))


def decoder_blocks(module: nn.Module) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """The decoder of a causal language model, and the name below it and the list of its blocks; None without one."""
    lm: Any = base_model(module)
    decoder: Any = lm.get_decoder() if callable(getattr(lm, "get_decoder", None)) else None
    count: int = getattr(getattr(decoder, "config", None), "num_hidden_layers", 0)
    for name, part in decoder.named_modules() if decoder is not None else ():
        if isinstance(part, nn.ModuleList) and len(part) == count > 0:
            return decoder, name, part
    return None


def block_layers(location: Location) -> dict[str, nn.Module]:
    """Every layer with one matrix in the model's blocks, by its name below the decoder."""
    names = dict(location.decoder.named_modules())
    prefix = next(n for n, m in names.items() if m is location.blocks)
    return {name: names[name] for name in _matrices(names, f"{prefix}.")}


def guard(decoder: nn.Module, hooks: Mapping[str, tuple[nn.Module, Any]]) -> Callable[[], None]:
    """Refuse passes of ``decoder`` once layers with an adapter lost their hooks: peft unloads one by putting the layer
    inside in its place.

    Args:
        decoder: holds the layers.
        hooks: by a layer's name below the decoder, the layer and the forward hook on it.

    Returns:
        What takes the guard off again.
    """
    adapted = {name: hook for name, (layer, hook) in hooks.items() if hasattr(layer, "get_base_layer")}
    if not adapted:
        return lambda: None

    def check(module: nn.Module, args: Any) -> None:
        for name, hook in adapted.items():
            parts = module.get_submodule(name).modules()
            if not any(own is hook for part in parts for own in part._forward_hooks.values()):
                raise CapabilityError(
                    "The edits are on an adapter that was merged or unloaded since, so none would be answered. Merge "
                    "first and attach the edits then (check=False, since merged weights are others)."
                )

    return decoder.register_forward_pre_hook(uncompiled(check)).remove


def _by_name(where: str, known: list[str]) -> str:
    wanted = re.sub(r"\[(\d+)\]", r".\1", where).removesuffix(".weight")
    found = [n for n in known if n == wanted or n.endswith(f".{wanted}") or wanted.endswith(f".{n}")]
    if len(found) == 1:
        return found[0]
    what = f"names {len(found)} modules ({', '.join(found[:3])}, ...)" if found else "is no linear layer of the model"
    raise ConfigError(f"strategy.layer: '{where}' {what}.{did_you_mean(wanted, known)}")


def _matrices(names: dict[str, nn.Module], prefix: str) -> list[str]:
    """Names of the modules with one matrix that start with ``prefix``; inside an adapter only the adapter itself."""
    inner = ("base_layer", "lora_A", "lora_B")
    return [
        name
        for name, module in names.items()
        if name.startswith(prefix) and _shape(module) and not any(part in inner for part in name.split("."))
    ]


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a layer with one matrix, whatever holds it: linear, Conv1D, quantised, adapted; else None."""
    layer: Any = module
    if callable(getattr(layer, "get_base_layer", None)):
        layer = layer.get_base_layer()
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):  # quantised weights have another shape
        return int(layer.out_features), int(layer.in_features)
    weight = getattr(layer, "weight", None)
    if hasattr(layer, "nf") and isinstance(weight, Tensor):  # transformers' Conv1D stores (in, out)
        return int(weight.shape[1]), int(weight.shape[0])
    return None


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer's matrix.

    Raises:
        CapabilityError: it has none.
    """
    found = _shape(module)
    if found is None:
        raise CapabilityError(f"{type(module).__name__} is no linear layer; set strategy.layer to one")
    return found
