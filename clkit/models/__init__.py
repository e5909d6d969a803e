"""Models: what a name means, and how it is fetched, loaded, adapted and saved. Importing this package is cheap."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clkit.config import ModelConfig
from clkit.models.resolve import Resolved, architectures, check, describe, resolve

if TYPE_CHECKING:
    import torch
    from torch import nn

    from clkit.models.base import Model
    from clkit.models.classifier import Classifier

__all__ = [
    "Resolved",
    "architectures",
    "check",
    "describe",
    "estimate",
    "load_classifier",
    "load_model",
    "resolve",
    "wrap",
]

_say = logging.getLogger(__name__).info


def load_model(
    config: ModelConfig,
    *,
    num_classes: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    generator: torch.Generator,
    device: torch.device | None = None,
    say: Callable[[str], None] = _say,
) -> Model:
    """Load a language model, or (with ``num_classes``) a classifier; fetch and convert it on first use.

    Args:
        config: the model's section of a run configuration.
        num_classes: size of the label space; None for a language model.
        input_shape: of one example without the batch, for built-in architectures; None for text.
        generator: a CPU generator; draws every weight that is not loaded (heads, adapters, built-in architectures).
        device: where the model will be trained, for ``dtype: auto``; None = a GPU when there is one.
        say: gets one line for every step that takes time or touches the network.

    Returns:
        The model on the CPU, in training mode, adapters attached.

    Raises:
        ModelError: the name is unknown, or the model can't be fetched, converted, loaded or adapted.
    """
    from clkit.models.loading import load

    return load(config, num_classes, input_shape, generator, device, say)


def estimate(
    config: ModelConfig, num_classes: int | None = None, input_shape: tuple[int, ...] | None = None
) -> dict[str, int] | None:
    """Size of a model without its weights: ``parameters``, ``trainable`` and ``weight_bytes`` in memory.

    Returns:
        None when it can't be known before something is fetched.

    Raises:
        ModelError: the model exists, but the configuration does not fit it (as from ``load_model``).
    """
    from clkit.models.sizes import estimate as estimate_

    return estimate_(config, num_classes, input_shape)


def wrap(module: nn.Module, tokenizer: Any = None, name: str = "") -> Model:
    """Bring a module built in Python under the contract; see :func:`clkit.models.own_module.wrap`."""
    from clkit.models.own_module import wrap as wrap_  # a module called `wrap` would take this name

    return wrap_(module, tokenizer, name)


def load_classifier(directory: str | Path) -> Classifier:
    """Load what ``Classifier.export`` wrote, in evaluation mode.

    Raises:
        ModelError: the directory does not hold such a classifier.
    """
    from clkit.models.classifier import load_classifier as load_

    return load_(Path(directory))
