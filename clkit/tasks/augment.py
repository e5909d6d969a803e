"""Random changes of training images, whole batches at a time."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from clkit.errors import CapabilityError
from clkit.rng import Streams
from clkit.tasks.batch import Batch

#: Largest change of brightness, as the class-incremental literature has it on CIFAR.
BRIGHTNESS = 63 / 255


def augment(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Crop, flip and change the brightness of images (B, C, H, W), each by its own draw.

    Args:
        images: uint8 or floating point.
        kind: ``crop-flip``: a crop of the same size from the image with an eighth of its side in zeros around it,
            mirrored half of the time; ``crop-flip-brightness``: also scaled by a factor in 1 +- 63/255 (uint8 only).
        generator: a CPU generator; four numbers per image, in order, so that a batch cut in pieces is changed alike.

    Returns:
        The same shape and dtype; the channels of a pixel lie side by side in memory.

    Raises:
        CapabilityError: the inputs are not images, or brightness is asked for on images that are not uint8.
    """
    if images.dim() != 4:
        raise CapabilityError(f"train.augment: '{kind}' needs images (B, C, H, W), got shape {tuple(images.shape)}")
    count, _, height, width = images.shape
    draws = torch.rand(count, 4, generator=generator, dtype=torch.float64).to(images.device)
    tall, wide = height // 8, width // 8
    rows = (draws[:, 0] * (2 * tall + 1)).long()[:, None] + torch.arange(height, device=images.device)
    columns = (draws[:, 1] * (2 * wide + 1)).long()[:, None] + torch.arange(width, device=images.device)
    columns = torch.where(draws[:, 2, None] < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (wide, wide, tall, tall)).permute(0, 2, 3, 1)
    which = torch.arange(count, device=images.device)[:, None, None]
    pixels = padded[which, rows[:, :, None], columns[:, None, :]]
    if kind == "crop-flip-brightness":
        if images.dtype != torch.uint8:
            raise CapabilityError(f"train.augment: '{kind}' needs uint8 images, got {images.dtype}; take crop-flip")
        factors = (1 + BRIGHTNESS * (2 * draws[:, 3] - 1)).float()[:, None, None, None]
        pixels = (pixels * factors).clamp_(max=255).to(torch.uint8)
    return pixels.permute(0, 3, 1, 2)


def augmented(batch: Batch, kind: str, streams: Streams) -> Batch:
    """The batch with its images changed as ``train.augment`` says; ``none`` leaves it as it is.

    Raises:
        CapabilityError: the batch has no images, but texts or features of a frozen backbone.
    """
    if kind == "none":
        return batch
    if "x" not in batch.inputs:
        raise CapabilityError(f"train.augment: '{kind}' needs images, and these batches have {', '.join(batch.inputs)}")
    return dataclasses.replace(
        batch, inputs={**batch.inputs, "x": augment(batch.inputs["x"], kind, streams["augment"])}
    )
