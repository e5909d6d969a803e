"""Multi-layer perceptron: the input flattened, hidden layers with ReLU (`model.hidden` gives their widths)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from clkit.config import ModelConfig
from clkit.errors import ModelError
from clkit.models.backbones.base import Backbone


class MLP(Backbone):
    """Linear layers with ReLU; He initialisation, zero biases.

    Args:
        in_features: numbers per example, after flattening.
        hidden: width of each hidden layer; at least one.
        generator: draws the weights.
    """

    def __init__(self, in_features: int, hidden: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
        self.layers = nn.ModuleList(layers)
        self.out_features = widths[-1]
        self.default_cut = f"layer{len(layers)}"
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)

    def parts(self) -> dict[str, nn.Module]:
        """``layer1``, ``layer2``, ...: the linear layers, each with its ReLU."""
        chain = [nn.Sequential(layer, nn.ReLU()) for layer in self.layers]
        chain[0].insert(0, nn.Flatten())
        return {f"layer{i}": part for i, part in enumerate(chain, start=1)}

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to (B, hidden[-1])."""
        if x.dim() > 2:
            x = x.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return x


def build(config: ModelConfig, input_shape: tuple[int, ...] | None, generator: torch.Generator) -> MLP:
    """Build for inputs of ``input_shape`` (without the batch).

    Raises:
        ModelError: the input's shape is unknown, or there is no hidden layer.
    """
    if input_shape is None:
        raise ModelError("Model 'mlp' must know the shape of its inputs; these tasks do not give it.")
    if not config.hidden or min(config.hidden) < 1:
        raise ModelError(f"`model.hidden` must list at least one width, all above 0; got {list(config.hidden)}.")
    return MLP(math.prod(input_shape), config.hidden, generator)
