"""EfficientNet-Lite0, pretrained on ImageNet (4.65 M parameters, 1280 features; images from 64 pixels up).

Tan & Le 2019 without squeeze-and-excitation and with ReLU6. The module's names are those of the published weights, so
that they load strictly; TensorFlow's "same" padding (more on the right and below) and epsilon 1e-3 belong to them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.config import ModelConfig
from clkit.errors import ModelError
from clkit.models.backbones.base import Backbone, MeanOverPixels, Normalise, image_channels

# (expansion, kernel, stride, channels out, blocks) of each stage; the stem gives 32 channels.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
MIN_PIXELS = 64  # smaller images are enlarged: five halvings leave nothing of them


class SameConv2d(nn.Conv2d):
    """A bias-free convolution with TensorFlow's "same" padding."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(c_in, c_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) to (B, c_out, ceil(H / stride), ceil(W / stride))."""
        k, s = self.kernel_size[0], self.stride[0]
        if k > 1:
            tall, wide = (max((-(-n // s) - 1) * s + k - n, 0) for n in x.shape[-2:])
            x = F.pad(x, (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2))
        return super().forward(x)


def fit(x: Tensor) -> Tensor:
    """Grey images tripled, small ones enlarged: (B, 1 or 3, H, W) to (B, 3, >= 64, >= 64)."""
    if x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1)
    if (short := min(x.shape[-2:])) < MIN_PIXELS:
        size = [round(n * MIN_PIXELS / short) for n in x.shape[-2:]]
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return x


class _Fit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return fit(x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; a shortcut where the shape stays."""

    def __init__(self, c_in: int, c_out: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = c_in * expansion
        self.expands = expansion != 1
        self.shortcut = stride == 1 and c_in == c_out
        if self.expands:
            self._expand_conv = SameConv2d(c_in, inner, 1)
            self._bn0 = _norm(inner)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv = SameConv2d(inner, c_out, 1)
        self._bn2 = _norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) to (B, c_out, H / stride, W / stride)."""
        y: Tensor = x
        if self.expands:
            y = F.relu6(self._bn0(self._expand_conv(y)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        if self.shortcut:
            return x + y
        return y


class EfficientNetLite0(Backbone):
    """The network; with ``classes`` also its ImageNet head (``classify``).

    Args:
        generator: draws the weights of a network that is not loaded (He, fan out).
        classes: None for features only, 1000 for the published head.
    """

    out_features = 1280
    default_cut = "stage7"
    norm_follows_conv = True
    normalise = Normalise((127 / 255,), (128 / 255,))

    def __init__(self, generator: torch.Generator, classes: int | None = None) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2)
        self._bn0 = _norm(32)
        blocks: list[nn.Module] = []
        width = 32
        for expansion, kernel, stride, out, count in STAGES:
            for i in range(count):
                blocks.append(InvertedResidual(width, out, expansion, kernel, stride if i == 0 else 1))
                width = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(width, 1280, 1)
        self._bn1 = _norm(1280)
        if classes is not None:
            self._fc = nn.Linear(1280, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", generator=generator)

    def parts(self) -> dict[str, nn.Module]:
        """``stem``, ``stage1`` to ``stage7``, ``head`` (1280 channels) and pooling."""
        found: dict[str, nn.Module] = {"stem": nn.Sequential(_Fit(), self._conv_stem, self._bn0, nn.ReLU6())}
        blocks = list(self._blocks)
        for i, (*_, count) in enumerate(STAGES, start=1):
            found[f"stage{i}"] = nn.Sequential(*blocks[:count])
            del blocks[:count]
        return {
            **found,
            "head": nn.Sequential(self._conv_head, self._bn1, nn.ReLU6()),
            "pool": MeanOverPixels(),
        }

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) to (B, 1280); grey images are tripled, small ones enlarged to 64 pixels."""
        x = fit(x)
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))

    def classify(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to ImageNet logits (B, classes)."""
        logits: Tensor = self._fc(self(x))
        return logits


def build(config: ModelConfig, input_shape: tuple[int, ...] | None, generator: torch.Generator) -> EfficientNetLite0:
    """Build without its head; ``load_model`` fills in the published weights.

    Raises:
        ModelError: the inputs are not images with one or three channels.
    """
    channels = image_channels("efficientnet-lite0", input_shape)
    if channels not in (1, 3):
        raise ModelError(f"Model 'efficientnet-lite0' reads images of 1 or 3 channels; got {channels}.")
    return EfficientNetLite0(generator)
