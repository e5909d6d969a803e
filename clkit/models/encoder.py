"""A transformers model as a backbone: its token vectors pooled into one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from clkit.errors import ModelError
from clkit.models.backbones.base import Backbone
from clkit.models.lora import base_model

# Embeddings, and layers that take nothing but states and mask, nothing after the last: what ``parts`` cuts such a model
# into. Others that look alike give layers positions too (MPNet, DeBERTa, ESM), or have a norm behind the last one.
_PLAIN = frozenset({"bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "markuplm"})
_PLAIN |= {"mobilebert", "mra", "nystromformer", "roberta", "splinter", "xlm-roberta"}


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
        self.default_cut = next(reversed(list(self.parts())[:-1]), "")

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return base_model(self.encoder).config

    def tokens(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Token ids and mask (B, T), right padded, to last hidden states (B, T, D) and a bool mask (B, T).

        Raises:
            ModelError: the model also wants the tokens of an answer (T5).
        """
        try:
            states: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        except ValueError as error:
            if not getattr(self.config, "is_encoder_decoder", False):
                raise
            name = type(base_model(self.encoder)).__name__
            raise ModelError(
                f"{name} is no text encoder: it also wants the tokens of an answer. Take a model without a decoder."
            ) from error
        return states, attention_mask.bool()

    def parts(self) -> dict[str, nn.Module]:
        """``embeddings``, ``layer1`` to ``layerN`` and pooling, for encoders built like BERT; empty for others."""
        base: Any = base_model(self.encoder)
        # A decoder's layers see no later token, and ELECTRA may widen what its embeddings give.
        differs = getattr(self.config, "is_decoder", False) or hasattr(base, "embeddings_project")
        if self.config.model_type not in _PLAIN or differs:
            return {}
        chain = {f"layer{i}": _Layer(layer) for i, layer in enumerate(base.encoder.layer, start=1)}
        return {"embeddings": _Embeddings(base.embeddings, self.config), **chain, "pool": _Pool(self.pooling)}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        """Token ids and mask (B, T), right padded, to features (B, D)."""
        states, _ = self.tokens(input_ids, attention_mask)
        return pool(states, attention_mask, self.pooling)


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Token vectors (B, T, D) to one (B, D)."""
    if pooling == "cls":
        return states[:, 0]
    weights = mask.unsqueeze(-1).to(states.dtype)
    pooled: Tensor = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    return pooled


class _Embeddings(nn.Module):
    """Token ids and mask to what the layers pass on: states, mask, and the mask in the form that attention wants."""

    def __init__(self, embeddings: nn.Module, config: Any) -> None:
        super().__init__()
        self.embeddings = embeddings
        self._config = config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        from transformers.masking_utils import create_bidirectional_mask

        states = self.embeddings(input_ids=input_ids)
        return states, attention_mask, create_bidirectional_mask(self._config, states, attention_mask)


class _Layer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, passed: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor, Tensor | None]:
        states, mask, attention = passed
        out = self.layer(states, attention)
        return (out if isinstance(out, Tensor) else out[0]), mask, attention


class _Pool(nn.Module):
    def __init__(self, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, passed: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        return pool(passed[0], passed[1], self.pooling)
