"""Load models: find the weights, build the module, attach what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from clkit.config import ModelConfig
from clkit.errors import ModelError
from clkit.models.base import Model
from clkit.models.lora import attach_lora
from clkit.models.noise import routed
from clkit.models.precision import pick_dtype
from clkit.models.resolve import Resolved, architectures, check, resolve, settled
from clkit.models.seeding import seeded
from clkit.models.store import Say, manifest, weights


def load(
    config: ModelConfig,
    num_classes: int | None,
    input_shape: tuple[int, ...] | None,
    generator: torch.Generator,
    device: torch.device | None,
    say: Say,
) -> Model:
    """See ``clkit.models.load_model``."""
    config = settled(config, num_classes)
    if problems := check(config):
        raise ModelError.collect("The model can't be loaded:", problems)
    found = resolve(config.name)
    if why := misfit(found, config, num_classes):
        raise ModelError(why)
    if num_classes is None:
        return _load_causal_lm(found, config, generator, device, say)
    if is_image_backbone(found):
        return _load_vision(found, config, num_classes, input_shape, generator, say)
    if input_shape is not None and len(input_shape) == 3:
        return _load_vision_encoder(found, config, num_classes, input_shape, generator, say)
    return _load_encoder(found, config, num_classes, generator, say)


def is_image_backbone(found: Resolved) -> bool:
    """Whether the name stands for one of the registered architectures (with or without fetched weights)."""
    return found.form == "built-in" or (found.alias is not None and found.alias.task == "image backbone")


def misfit(found: Resolved, config: ModelConfig, num_classes: int | None) -> str:
    """Why the model can't do the task (a language model's when ``num_classes`` is None); empty when it can."""
    if num_classes is not None:
        return "" if num_classes > 0 else f"A classifier needs at least one class; got {num_classes}."
    if is_image_backbone(found) or (found.alias is not None and found.alias.task == "text encoder"):
        return f"Model '{found.name}' is no language model, and these tasks need one; take for example 'smollm2-135m'."
    if config.freeze_backbone:
        return (
            "`model.freeze_backbone` trains only a classification head, and a language model has none; set it to false."
        )
    return ""


def locate(found: Resolved, say: Say) -> tuple[Path, str, dict[str, Any]]:
    """Find, fetch or convert the weights of anything that is not built in.

    Returns:
        The directory; how another person names the model (hub id, else the directory); and its provenance.
    """
    origin, public = "", ""
    if found.alias is not None:
        from clkit.models.fetch import fetch

        directory = fetch(found.alias, say)
        public = found.alias.hub_id or ""
    elif found.form == "gguf" and found.path is not None:
        from clkit.models.convert import cached_gguf

        directory = cached_gguf(found.path, say)
    elif found.form == "hub":
        from clkit.models.hub import cached_or_downloaded

        directory, revision = cached_or_downloaded(found.name, say)
        origin, public = f"hub:{found.name}@{revision}", found.name
    elif found.path is not None:
        directory = found.path.resolve()
        origin = f"directory:{directory}"
    else:
        raise ModelError(f"Model '{found.name}' has no weights of its own.")
    origin = origin or str((manifest(directory) or {}).get("origin", ""))
    provenance = {"origin": origin, "directory": str(directory), "weights": weights(directory)}
    return directory, public or str(directory), provenance


def _load_causal_lm(
    found: Resolved, config: ModelConfig, generator: torch.Generator, device: torch.device | None, say: Say
) -> Model:
    from transformers import AutoModelForCausalLM

    from clkit.models.causal_lm import CausalLM

    directory, public, provenance = locate(found, say)
    dtype = pick_dtype(config.dtype, device)
    # Updates of a small learning rate vanish in bfloat16, so weights that are trained themselves stay float32.
    kept = dtype if config.lora.r else torch.float32
    module = pretrained(AutoModelForCausalLM, directory, config.name, kept, generator)
    return CausalLM(
        config.name,
        prepare(module, config, generator, "CAUSAL_LM", public),
        load_tokenizer(directory, config.name),
        {**provenance, "dtype": _name(kept), "computed_in": _name(dtype)},
        prompt=config.prompt,
        max_length=config.max_length,
        autocast_dtype=None if dtype == torch.float32 else dtype,
        base=public,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _load_encoder(
    found: Resolved, config: ModelConfig, num_classes: int, generator: torch.Generator, say: Say
) -> Model:
    from transformers import AutoModel

    from clkit.models.classifier import Classifier, ClassifierNet
    from clkit.models.encoder import TextEncoder

    directory, public, provenance = locate(found, say)
    module = pretrained(AutoModel, directory, config.name, torch.float32, generator, unused=("pooler.",))
    module = prepare(module, config, generator, None, public)
    backbone = TextEncoder(module, config.pooling)
    net = ClassifierNet(backbone, num_classes, generator, frozen=config.freeze_backbone)
    return Classifier(config, net, provenance, tokenizer=load_tokenizer(directory, config.name))


def _load_vision_encoder(
    found: Resolved,
    config: ModelConfig,
    num_classes: int,
    input_shape: tuple[int, ...],
    generator: torch.Generator,
    say: Say,
) -> Model:
    from transformers import AutoModel

    from clkit.models.classifier import Classifier, ClassifierNet
    from clkit.models.vision_encoder import VisionEncoder, read_preprocessor

    directory, public, provenance = locate(found, say)
    module = pretrained(AutoModel, directory, config.name, torch.float32, generator, unused=("pooler.",))
    backbone = VisionEncoder(
        prepare(module, config, generator, None, public), config.pooling, read_preprocessor(directory)
    )
    net = ClassifierNet(backbone, num_classes, generator, frozen=config.freeze_backbone)
    return Classifier(config, net, provenance, input_shape=input_shape)


def _load_vision(
    found: Resolved,
    config: ModelConfig,
    num_classes: int,
    input_shape: tuple[int, ...] | None,
    generator: torch.Generator,
    say: Say,
) -> Model:
    from clkit.models.classifier import Classifier, ClassifierNet

    if input_shape is None:
        raise ModelError(
            f"Model '{config.name}' reads images or vectors; these tasks have text. Take 'all-minilm-l6-v2'."
        )
    with seeded(generator):  # modules of other packages may draw from the global generator
        backbone = architectures.get(config.name)(config, input_shape, generator)
    provenance: dict[str, Any] = {"origin": "built-in"}
    if found.alias is not None:
        from safetensors.torch import load_file

        directory, _, provenance = locate(found, say)
        state = load_file(directory / "model.safetensors")
        backbone.load_state_dict({k: v for k, v in state.items() if not k.startswith("_fc.")})
    net = ClassifierNet(backbone, num_classes, generator, frozen=config.freeze_backbone)
    return Classifier(config, net, provenance, input_shape=input_shape)


def prepare(
    module: nn.Module, config: ModelConfig, generator: torch.Generator, task_type: str | None, public: str
) -> nn.Module:
    """Set a loaded transformers model up for training: checkpointing, adapter, training mode."""
    if config.gradient_checkpointing:
        recompute_activations(module)
    if config.lora.r:
        adapted = attach_lora(module, config.lora, generator, task_type)
        for adapter in adapted.peft_config.values():
            adapter.base_model_name_or_path = public  # the cache directory would mean nothing to another person
        module = adapted
    return module.train()


def recompute_activations(module: Any) -> None:
    """Let a transformers model keep the inputs of its layers only, and compute the rest again backwards.

    Raises:
        ModelError: this architecture can't.
    """
    # Newer transformers warn about the old name. The reentrant kind needs inputs with gradients; a frozen base has
    # none.
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    # Partitioned weights are empty again when torch compares what it has recomputed with what there was.
    unchecked = {"determinism_check": "none"} if _zero3() else {}
    try:
        enable({"use_reentrant": False, **unchecked})
    except ValueError as error:
        raise ModelError(f"`model.gradient_checkpointing`: {_first_line(error)}") from error


def pretrained(
    auto: Any,
    directory: Path,
    name: str,
    dtype: torch.dtype,
    generator: torch.Generator,
    unused: tuple[str, ...] = (),
) -> nn.Module:
    """Load a transformers model from a directory, safetensors only.

    Args:
        auto: the transformers Auto class.
        name: for messages.
        unused: prefixes of parts that we do not run; their weights may be missing, and they are not trained.

    Raises:
        ModelError: the directory can't be read, or lacks weights that the architecture needs.
    """
    from safetensors import SafetensorError

    module: nn.Module
    try:
        with routed(), seeded(generator):
            if told := _zero3():  # it goes by these, not by `dtype`, and would make all weights float32
                told |= {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
            module, info = auto.from_pretrained(
                directory, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"Model '{name}' can't be loaded from {directory}: {_first_line(error)}") from error
    missing = sorted(k for k in (*info["missing_keys"], *info["mismatched_keys"]) if not str(k).startswith(unused))
    if missing:
        raise ModelError(
            f"Model '{name}' ({directory}) lacks {len(missing)} of the weights of {type(module).__name__}, for example "
            f"{missing[0]}; it was trained for something else, or the file is incomplete."
        )
    for key, parameter in module.named_parameters():
        if key.startswith(unused):
            parameter.requires_grad_(False)
    return module


def _zero3() -> dict[str, Any] | None:
    """DeepSpeed's settings where the engine has announced to transformers that weights are loaded in partitions."""
    from transformers.integrations.deepspeed import deepspeed_config

    announced: Any = deepspeed_config
    found: dict[str, Any] | None = announced()
    return found


def load_tokenizer(directory: Path, name: str) -> Any:
    """Load the tokenizer of a model directory.

    Raises:
        ModelError: there is none, or it can't tell where in the text its tokens are (a "slow" one).
    """
    from transformers import AutoTokenizer

    try:
        with routed():
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"The tokenizer of '{name}' can't be loaded from {directory}: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"The tokenizer of '{name}' gives no offsets; a fast one (tokenizer.json) is needed.")
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
