"""ResNet-18 for ImageNet-sized images: a 7x7 stem, four stages of 64 to 512 channels (He et al. 2016)."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.config import ModelConfig
from clkit.models.backbones.base import Backbone, MeanOverPixels, Normalise, image_channels

IMAGENET = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = Normalise((0.45,), (0.225,))


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that one value per channel can pass in training: what has no statistics takes the running ones.

    A batch of one image of at most 32 pixels is 1x1 in the last stage, and torch refuses it there.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), normalised."""
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm(c_out)
        self.proj = nn.Sequential()
        if stride > 1 or c_in != c_out:
            self.proj = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), BatchNorm(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) to (B, c_out, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.proj(x))


class ResNet18(Backbone):
    """``stem``, ``stage1`` to ``stage4`` of two blocks each, then the mean over pixels.

    Args:
        channels: of the input.
        generator: draws the convolutions (He, fan out); batch norm starts as 1 and 0.
    """

    out_features = 512
    default_cut = "stage4"
    norm_follows_conv = True

    def __init__(self, channels: int, generator: torch.Generator) -> None:
        super().__init__()
        self.normalise = IMAGENET if channels == 3 else GREY
        stem = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.stem = nn.Sequential(stem, BatchNorm(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        for i, (c_in, c_out) in enumerate(pairwise((64, 64, 128, 256, 512)), start=1):
            stage = nn.Sequential(BasicBlock(c_in, c_out, 1 if i == 1 else 2), BasicBlock(c_out, c_out, 1))
            self.add_module(f"stage{i}", stage)
        self.pool = MeanOverPixels()
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu", generator=generator)

    def parts(self) -> dict[str, nn.Module]:
        """Stem, stages and pooling."""
        return dict(self.named_children())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 512)."""
        for part in self.children():
            x = part(x)
        return x


def build(config: ModelConfig, input_shape: tuple[int, ...] | None, generator: torch.Generator) -> ResNet18:
    """ResNet-18 for images of ``input_shape`` (channels, height, width)."""
    return ResNet18(image_channels("resnet-18", input_shape), generator)
