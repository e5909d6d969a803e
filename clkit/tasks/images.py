"""Images as tensors: decoding, ids by pixels, and files that are decoded only when a batch needs them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from clkit.errors import DataError
from clkit.tasks.base import content_id

CHANNELS = {"RGB": 3, "L": 1}
# What Pillow raises for a file that is no image, is cut off, or is too large to be honest.
DECODE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def to_array(image: Image.Image, mode: str, size: int = 0) -> NDArray[np.uint8]:
    """A (C, H, W) array: upright, in ``mode`` (RGB or L), and with a ``size`` centre-cropped and resized to it."""
    image = _eight_bit(ImageOps.exif_transpose(image)).convert(mode)
    if size and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    array = np.array(image)  # a copy, because torch wants to own what it writes to
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey images of 16 bits with 0..65535 as 0..255; Pillow's own conversion makes all above 255 white."""
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    deep = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((deep + 128) // 257).astype(np.uint8))


def thumbnail(pixels: Tensor, size: int = 48) -> str:
    """A small PNG of an image as a ``data:`` address, for a page.

    Args:
        pixels: (C, H, W) with one or three channels; uint8, or numbers from 0 to 1; another range is stretched to it.
        size: the longer side is at most this many pixels.
    """
    values = pixels.detach().to("cpu")
    if values.dtype != torch.uint8:
        values = values.float()
        low, high = values.min(), values.max()
        if low < 0 or high > 1:
            values = (values - low) / (high - low).clamp(min=1e-12)
        values = (values * 255).round().to(torch.uint8)
    array = values.permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array))
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def unique_ids(ids: Iterable[str], count: dict[str, int] | None = None) -> list[str]:
    """The ids with ``-2``, ``-3``, ... behind the second, third, ... of the same.

    Args:
        ids: in order.
        count: how often each was seen before; updated. Share one between sets that must not share an id.
    """
    count = {} if count is None else count
    result = []
    for found in ids:
        count[found] = count.get(found, 0) + 1
        result.append(found if count[found] == 1 else f"{found}-{count[found]}")
    return result


def pixel_ids(images: Iterable[NDArray[np.generic]], count: dict[str, int] | None = None) -> list[str]:
    """Unique ids made from the bytes of each image; ``count`` as in :func:`unique_ids`."""
    return unique_ids((content_id(np.ascontiguousarray(image).tobytes()) for image in images), count)


def contents_of(ids: Iterable[str]) -> list[str]:
    """Ids of :func:`unique_ids` without their numbers: equal for copies of one image."""
    return [found.partition("-")[0] for found in ids]


class ImageFiles:
    """Image files as the inputs of a classifier: a LongTensor of positions gives uint8 images (B, C, size, size)."""

    def __init__(self, paths: Sequence[Path], size: int, mode: str = "RGB") -> None:
        self.paths = tuple(paths)
        self.size = size
        self.mode = mode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Decode the images at ``indices``.

        Raises:
            DataError: a file was changed or removed since the task was built.
        """
        batch = torch.empty(len(indices), CHANNELS[self.mode], self.size, self.size, dtype=torch.uint8)
        for row, index in enumerate(indices.tolist()):
            path = self.paths[index]
            try:
                with Image.open(path) as image:
                    batch[row] = torch.from_numpy(to_array(image, self.mode, self.size))
            except DECODE_ERRORS as error:
                raise DataError(f"{path}: can't be decoded any more: {error}") from error
        return batch

    def subset(self, indices: Tensor) -> ImageFiles:
        """The files at ``indices``."""
        return ImageFiles([self.paths[i] for i in indices.tolist()], self.size, self.mode)
