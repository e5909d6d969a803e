"""What a backbone is: a module from inputs to feature vectors, and how its images are scaled."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from clkit.errors import ModelError


class Normalise(NamedTuple):
    """Per-channel mean and standard deviation of images scaled to 0..1; one number serves all channels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


UNIT = Normalise((0.0,), (1.0,))


class Backbone(nn.Module):
    """A network without its last layer.

    Attributes:
        out_features: D, the length of a feature vector.
        normalise: applied to uint8 images only; floating-point inputs are taken as they are.
    """

    out_features: int
    normalise: Normalise = UNIT

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) floating point to features (B, D)."""
        raise NotImplementedError

    def tokens(self, *args: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The vectors that are pooled into features: (B, T, D), and a mask (B, T) of the real ones (None: all are).

        Raises:
            ModelError: this backbone has no tokens.
        """
        raise ModelError(f"{type(self).__name__} gives one vector per example and no tokens; take another encoder.")


def image_channels(name: str, input_shape: tuple[int, ...] | None) -> int:
    """The number of channels of an image backbone's input.

    Raises:
        ModelError: the inputs are not images (C, H, W).
    """
    if input_shape is None or len(input_shape) != 3:
        got = "inputs of unknown shape" if input_shape is None else f"inputs of shape {tuple(input_shape)}"
        raise ModelError(f"Model '{name}' reads images (channels, height, width); got {got}. For vectors take 'mlp'.")
    return input_shape[0]
