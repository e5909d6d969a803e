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
# Embeddings, layers that take nothing but what the one before gave, a last norm: what ``parts`` cuts such a model into.
_PLAIN = frozenset({"vit", "deit", "vit_msn", "ijepa", "dinov2", "dinov2_with_registers"})


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
        self.default_cut = next(reversed(list(self.parts())[:-1]), "")

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return base_model(self.encoder).config

    def tokens(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Images (B, 1 or 3, H, W) to last hidden states (B, T, D)."""
        inner: Any = base_model(self.encoder)
        part = inner.vision_model if hasattr(inner, "vision_model") else self.encoder
        states: Tensor = part(pixel_values=_fitted(x, self.size)).last_hidden_state
        return (states.flatten(2).transpose(1, 2) if states.dim() == 4 else states), None

    def forward(self, x: Tensor) -> Tensor:
        """Images to features (B, D)."""
        states, _ = self.tokens(x)
        return _pooled(states, self.pooling)

    def parts(self) -> dict[str, nn.Module]:
        """``embeddings``, ``layer1`` to ``layerN``, and ``pool`` with the last norm, for ViTs; empty for others."""
        base: Any = base_model(self.encoder)
        if self.config.model_type not in _PLAIN:
            return {}
        layers = base.layers if hasattr(base, "layers") else base.encoder.layer
        chain = {f"layer{i}": _Layer(layer) for i, layer in enumerate(layers, start=1)}
        return {
            "embeddings": _Embeddings(base.embeddings, self.size),
            **chain,
            "pool": _Pool(base.layernorm, self.pooling),
        }


class _Embeddings(nn.Module):
    """Images to what the layers pass on."""

    def __init__(self, embeddings: nn.Module, size: int | None) -> None:
        super().__init__()
        self.embeddings = embeddings
        self._size = size

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.embeddings(_fitted(x, self._size))
        return states


class _Layer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, states: Tensor) -> Tensor:
        out: Any = self.layer(states)
        return out if isinstance(out, Tensor) else out[0]


class _Pool(nn.Module):
    def __init__(self, norm: nn.Module, pooling: str) -> None:
        super().__init__()
        self.norm = norm
        self._pooling = pooling

    def forward(self, states: Tensor) -> Tensor:
        return _pooled(self.norm(states), self._pooling)


def _fitted(x: Tensor, size: int | None) -> Tensor:
    """Images (B, 1 or 3, H, W) as the model takes them: of three channels and its own size."""
    if x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1)
    if size is not None and x.shape[-2:] != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return x


def _pooled(states: Tensor, pooling: str) -> Tensor:
    """Hidden states (B, T, D) to (B, D)."""
    return states[:, 0] if pooling == "cls" else states.mean(dim=1)


def save_preprocessor(directory: Path, normalise: Normalise) -> None:
    """Write how images are normalised, where :func:`read_preprocessor` finds it."""
    content = {"image_mean": list(normalise.mean), "image_std": list(normalise.std)}
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
