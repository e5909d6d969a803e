"""No network: the inputs are feature vectors already (computed by any encoder, anywhere)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clkit.config import ModelConfig
from clkit.errors import ModelError
from clkit.models.backbones.base import Backbone


class Identity(Backbone):
    """Inputs as they are, flattened to vectors.

    Args:
        in_features: numbers per example.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.out_features = in_features

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to (B, in_features)."""
        return x.flatten(1)


def build(config: ModelConfig, input_shape: tuple[int, ...] | None, generator: torch.Generator) -> Identity:
    """Build for inputs of ``input_shape`` (without the batch).

    Raises:
        ModelError: the input's shape is unknown.
    """
    if input_shape is None:
        raise ModelError("Model 'identity' takes vectors; these tasks have texts. Take 'all-minilm-l6-v2'.")
    return Identity(math.prod(input_shape))
