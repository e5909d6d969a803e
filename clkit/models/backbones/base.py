"""What a backbone is: a module from inputs to feature vectors, and how its images are scaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

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
        default_cut: the part from which on a method that grows copies the network, unless it is told another; empty
            where the network can't be cut.
        norm_follows_conv: every batch norm is applied to the output of the convolution that was registered right
            before it in the same module, and to nothing else; frozen, the two can be folded into one.
    """

    out_features: int
    normalise: Normalise = UNIT
    default_cut: str = ""
    norm_follows_conv: ClassVar[bool] = False

    def parts(self) -> dict[str, nn.Module]:
        """The network as named parts that run one after another; empty where it is no such chain.

        The first part takes what ``forward`` takes, the last gives what it gives.
        """
        return {}

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) floating point to features (B, D)."""
        raise NotImplementedError

    def tokens(self, *args: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The vectors that are pooled into features: (B, T, D), and a mask (B, T) of the real ones (None: all are).

        Raises:
            ModelError: this backbone has no tokens.
        """
        raise ModelError(f"{type(self).__name__} gives one vector per example and no tokens; take another encoder.")


class Chain(nn.Module):
    """Named parts, one after another; the first takes whatever is given.

    Without parts an input passes through: a tensor as it is, named ones as a dict, which another chain takes apart.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run all parts."""
        if inputs and isinstance(inputs[0], dict):
            return self(**inputs[0])
        passed = inputs[0] if inputs else named
        for number, part in enumerate(self.children()):
            passed = part(*inputs, **named) if number == 0 else part(passed)
        return passed


class MeanOverPixels(nn.Module):
    """(B, C, H, W) to (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean over both sides of the image."""
        return x.mean(dim=(2, 3))


def image_channels(name: str, input_shape: tuple[int, ...] | None) -> int:
    """The number of channels of an image backbone's input.

    Raises:
        ModelError: the inputs are not images (C, H, W).
    """
    if input_shape is None or len(input_shape) != 3:
        got = "inputs of unknown shape" if input_shape is None else f"inputs of shape {tuple(input_shape)}"
        raise ModelError(f"Model '{name}' reads images (channels, height, width); got {got}. For vectors take 'mlp'.")
    return input_shape[0]
