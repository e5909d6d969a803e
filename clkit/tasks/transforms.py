"""Changes of the input that make a new domain out of the same examples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clkit.errors import DataError


def permute_pixels(inputs: Tensor, rng: np.random.Generator) -> Tensor:
    """Move every pixel of images (N, C, H, W), or every entry of vectors (N, D), to the same random place.

    The channels of a pixel stay together.
    """
    flat = inputs.flatten(2) if inputs.dim() == 4 else inputs.flatten(1)
    order = torch.from_numpy(rng.permutation(flat.shape[-1]))
    return flat[..., order].reshape(inputs.shape)


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Rotate images (N, C, H, W) counter-clockwise about their centre; bilinear, zeros outside, dtype kept.

    Raises:
        DataError: the inputs are not images.
    """
    if images.dim() != 4:
        raise DataError(f"tasks.domain: 'rotate' needs images (N, C, H, W), got inputs of shape {tuple(images.shape)}")
    height, width = images.shape[2:]
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    cos, sin = angle.cos().item(), angle.sin().item()
    # Output to input coordinates; both run from -1 to 1, so that the side ratio stands in the off-diagonal terms.
    theta = torch.tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]])
    grid = functional.affine_grid(theta.expand(1, 2, 3), [1, 1, height, width], align_corners=False)
    rotated = [
        functional.grid_sample(part.float(), grid.expand(len(part), -1, -1, -1), align_corners=False)
        for part in torch.split(images, 1024)  # bounds the memory of the float copy
    ]
    result = torch.cat(rotated) if rotated else images.float()
    return result.round().clamp(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else result.to(images.dtype)
