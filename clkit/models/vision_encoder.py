"""A transformers image model as a backbone: its patch or pixel vectors pooled into one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from clkit.errors import ModelError
from clkit.models.backbones.base import Backbone, Normalise
from clkit.models.lora import base_model

_FILE = "preprocessor_config.json"
_HALF = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class VisionEncoder(Backbone):
    """Last hidden states, pooled. Images of another size than the model's are resized.

    Args:
        encoder: a transformers model without a head; of a model of images and texts, its image part is used.
        pooling: ``mean`` over the tokens or pixels, or ``cls`` (the first token).
        normalise: mean and standard deviation of the images it was trained on.
    """

    def __init__(self, encoder: nn.Module, pooling: str, normalise: Normalise) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.normalise = normalise
        own: Any = getattr(self.config, "vision_config", self.config)
        width = getattr(own, "hidden_size", None) or (getattr(own, "hidden_sizes", None) or [None])[-1]
        if width is None or not (hasattr(own, "image_size") or hasattr(own, "num_channels")):
            name = type(base_model(encoder)).__name__
            raise ModelError(f"{name} is no image encoder, and these tasks have images.")
        self.out_features = width
        self.size: int | None = getattr(own, "image_size", None)

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return base_model(self.encoder).config

    def tokens(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Images (B, 1 or 3, H, W) to last hidden states (B, T, D)."""
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        inner: Any = base_model(self.encoder)
        part = inner.vision_model if hasattr(inner, "vision_model") else self.encoder
        states: Tensor = part(pixel_values=x).last_hidden_state
        return (states.flatten(2).transpose(1, 2) if states.dim() == 4 else states), None

    def forward(self, x: Tensor) -> Tensor:
        """Images to features (B, D)."""
        states, _ = self.tokens(x)
        return states[:, 0] if self.pooling == "cls" else states.mean(dim=1)

    def save_preprocessor(self, directory: Path) -> None:
        """Write how images are normalised, where :func:`read_preprocessor` finds it."""
        content = {"image_mean": list(self.normalise.mean), "image_std": list(self.normalise.std)}
        (directory / _FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_preprocessor(directory: Path) -> Normalise:
    """Mean and standard deviation that a model directory states; 0.5 when it states none.

    Raises:
        ModelError: its file can't be read.
    """
    path = directory / _FILE
    if not path.is_file():
        return _HALF
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        mean, std = content.get("image_mean", _HALF.mean), content.get("image_std", _HALF.std)
        return Normalise(tuple(float(v) for v in mean), tuple(float(v) for v in std))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} can't be read: {error}") from error
