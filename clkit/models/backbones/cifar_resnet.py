"""ResNet for small images: three stages of 16, 32 and 64 channels, parameter-free shortcuts.

The variant of the class-incremental literature (He et al. 2016, section 4.2, shortcut option A): where a stage halves
the image, its shortcut takes every second pixel and fills the new channels with zeros. A ReLU ends every stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.config import ModelConfig
from clkit.models.backbones.base import Backbone, MeanOverPixels, Normalise, image_channels

# CIFAR-100's training set, as the class-incremental literature normalises it.
CIFAR = Normalise((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
GREY = Normalise((0.5,), (0.25,))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.grow = c_out - c_in
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) to (B, c_out, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.grow:
            x = F.pad(x, (0, 0, 0, 0, 0, self.grow))
        return F.relu(x + y)


class CifarResNet(Backbone):
    """ResNet-(6n+2): ``stem``, ``stage1``, ``stage2``, ``stage3`` of n blocks each, then the mean over pixels.

    Args:
        blocks: n, blocks per stage.
        channels: of the input.
        generator: draws the weights: convolutions N(0, sqrt(2 / (k * k * c_out))), batch norm 1 and 0.
    """

    out_features = 64
    default_cut = "stage3"
    norm_follows_conv = True

    def __init__(self, blocks: int, channels: int, generator: torch.Generator) -> None:
        super().__init__()
        self.normalise = CIFAR if channels == 3 else GREY
        self.stem = nn.Sequential(nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.stage1 = _stage(16, 16, blocks, stride=1)
        self.stage2 = _stage(16, 32, blocks, stride=2)
        self.stage3 = _stage(32, 64, blocks, stride=2)
        self.pool = MeanOverPixels()
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0.0, math.sqrt(2.0 / (9 * m.out_channels)), generator=generator)

    def parts(self) -> dict[str, nn.Module]:
        """Stem, stages and pooling."""
        return dict(self.named_children())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 64)."""
        features: Tensor = self.pool(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return features


def _stage(c_in: int, c_out: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(c_out, c_out, 1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(c_in, c_out, stride), *rest)


Builder = Callable[[ModelConfig, "tuple[int, ...] | None", torch.Generator], CifarResNet]


def _builder(depth: int) -> Builder:
    def build(config: ModelConfig, input_shape: tuple[int, ...] | None, generator: torch.Generator) -> CifarResNet:
        """ResNet for images of ``input_shape`` (channels, height, width)."""
        channels = image_channels(f"cifar-resnet-{depth}", input_shape)
        return CifarResNet((depth - 2) // 6, channels, generator)

    return build


resnet8, resnet14, resnet20, resnet26, resnet32 = (_builder(depth) for depth in (8, 14, 20, 26, 32))
