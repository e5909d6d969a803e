"""How large a model is, without its weights: built on torch's meta device from its configuration."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clkit.config import ModelConfig
from clkit.errors import ModelError
from clkit.models.lora import attach_lora
from clkit.models.noise import routed
from clkit.models.precision import pick_dtype
from clkit.models.resolve import Resolved, architectures, check, resolve, settled
from clkit.models.seeding import seeded
from clkit.models.store import cache_root, manifest

#: A multi-layer perceptron beyond this is a slip of the keyboard, and building it would take the machine down.
MAX_BUILT = 10**9


def too_large(config: ModelConfig, num_classes: int | None, input_shape: tuple[int, ...] | None) -> str:
    """Why a model of these widths is refused before anything is allocated; empty when it is not."""
    if config.name != "mlp" or input_shape is None:
        return ""
    widths = [math.prod(input_shape), *config.hidden, num_classes or 0]
    count = sum((a + 1) * b for a, b in pairwise(widths))
    if count <= MAX_BUILT:
        return ""
    return f"model.hidden: {list(config.hidden)} makes {count:,} parameters (expected at most {MAX_BUILT:,})"


def estimate(
    config: ModelConfig,
    num_classes: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    device: torch.device | None = None,
) -> dict[str, int] | None:
    """See ``clkit.models.estimate``; ``device`` decides ``dtype: auto``, as in loading."""
    from clkit.models.loading import is_image_backbone, misfit

    config = settled(config, num_classes)
    if problems := check(config):
        raise ModelError.collect("The model can't be loaded:", problems)
    found = resolve(config.name)
    if why := misfit(found, config, num_classes) or too_large(config, num_classes, input_shape):
        raise ModelError(why)
    generator = torch.Generator().manual_seed(0)
    if is_image_backbone(found):
        if input_shape is None:
            return None
        # Built for real: these are small, and their initialisation needs real tensors.
        with seeded(generator):
            backbone = architectures.get(config.name)(config, input_shape, generator)
        module: nn.Module = backbone
        out, kept = int(backbone.out_features), torch.float32
    else:
        architecture = configuration(found)
        if architecture is None:
            return None
        module = empty(architecture, num_classes is None, found.name)
        out = int(getattr(architecture, "hidden_size", 0))
        if config.lora.r:
            module = attach_lora(module, config.lora, generator, "CAUSAL_LM" if num_classes is None else None)
        # As in loading: only the frozen base model of a language model's adapter is kept in less than float32.
        lean = num_classes is None and config.lora.r
        kept = pick_dtype(config.dtype, device) if lean else torch.float32
    if config.freeze_backbone:
        module.requires_grad_(False)
    head = 0 if num_classes is None else (out + 1) * num_classes
    total = sum(p.numel() for p in module.parameters())
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    size = (total - trainable) * kept.itemsize + (trainable + head) * torch.float32.itemsize
    return {"parameters": total + head, "trainable": trainable + head, "weight_bytes": size}


def configuration(found: Resolved) -> Any:
    """The transformers configuration of a model, from what is on this machine; None when there is none."""
    from transformers import AutoConfig

    directory: Path | None = None
    if found.alias is not None:
        directory = cache_root() / "models" / found.alias.name
        if manifest(directory) is None:
            options = dict(found.alias.config)
            return AutoConfig.for_model(options.pop("model_type"), **options)
    elif found.form == "hub":
        from clkit.models.hub import cached_config

        directory = cached_config(found.name)
    elif found.form == "directory":
        directory = found.path
    if directory is None:  # a GGUF file would have to be read in full
        return None
    try:
        with routed():
            return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"The configuration in {directory} can't be read: {error}") from error


def empty(architecture: Any, language_model: bool, name: str) -> nn.Module:
    """A transformers model without content; ``architecture`` is its configuration."""
    from transformers import AutoModel, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM if language_model else AutoModel
    try:
        with routed(), torch.device("meta"):
            module: nn.Module = auto.from_config(architecture)
    except (ValueError, KeyError, ImportError) as error:
        raise ModelError(f"Model '{name}' can't be built: {str(error).partition(chr(10))[0]}") from error
    for key, parameter in module.named_parameters():
        if key.startswith("pooler."):
            parameter.requires_grad_(False)
    return module
