"""A transformers model as a backbone: its token vectors pooled into one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from clkit.errors import ModelError
from clkit.models.backbones.base import Backbone
from clkit.models.lora import base_model


class TextEncoder(Backbone):
    """Last hidden states, pooled.

    Args:
        encoder: a transformers model without a head (with or without a peft adapter).
        pooling: ``mean`` over the real tokens, or ``cls`` (the first token).
    """

    def __init__(self, encoder: nn.Module, pooling: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        size = getattr(self.config, "hidden_size", None)
        if size is None:
            name = type(base_model(encoder)).__name__
            raise ModelError(f"{name} is no text encoder: its configuration has no hidden_size.")
        self.out_features = size

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return base_model(self.encoder).config

    def tokens(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Token ids and mask (B, T), right padded, to last hidden states (B, T, D) and a bool mask (B, T)."""
        states: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states, attention_mask.bool()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        """Token ids and mask (B, T), right padded, to features (B, D)."""
        states, _ = self.tokens(input_ids, attention_mask)
        if self.pooling == "cls":
            return states[:, 0]
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        pooled: Tensor = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return pooled
