"""The bottleneck: features in, the values of the nearest keys out, decoded to logits."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor, nn

from clkit.rng import fresh_generator
from clkit.strategies.dkvb.config import DKVBConfig
from clkit.strategies.dkvb.index import nearest, project
from clkit.strategies.dkvb.values import bag_sum, make_decoder, widen


class Bottleneck(nn.Module):
    """C codebooks of K key-value pairs, in front of a decoder.

    Projection and keys are buffers: no gradient and no optimiser ever reaches them, and they are saved with the rest.

    Args:
        config: the method's options.
        in_features: D, length of a feature vector.
        num_classes: width of the logits.
        seed: of the projection and the decoder.

    Attributes:
        keys: (C, K, k); all zero until :meth:`place`.
        values: (C, K, v), zeros at first; with ``decoder="votes"`` counts of classes.
        usage: int64 (C, K), how often training has read each pair.
        placed: bool (), whether the keys are where they stay.
    """

    projection: Tensor | None
    keys: Tensor
    usage: Tensor
    placed: Tensor

    def __init__(self, config: DKVBConfig, in_features: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self._seed = seed
        shape = (config.heads, config.pairs)
        drawn = None
        if config.split == "random":
            generator = fresh_generator(seed, "projection")
            drawn = torch.randn(config.heads, in_features, config.key_dim, generator=generator)
            drawn /= drawn.norm(dim=1, keepdim=True)
        self.register_buffer("projection", drawn)
        self.register_buffer("keys", torch.zeros(*shape, config.key_dim))
        self.register_buffer("usage", torch.zeros(shape, dtype=torch.long))
        self.register_buffer("placed", torch.tensor(False))
        self._trained_by_gradient = config.decoder != "votes"
        width = config.value_dim if config.decoder in ("linear", "mlp") else num_classes
        self.values = nn.Parameter(torch.zeros(*shape, width), requires_grad=self._trained_by_gradient)
        self.decoder: nn.Sequential | None = None
        if config.decoder in ("linear", "mlp"):
            self.decoder = self._new_decoder(num_classes).requires_grad_(config.train_decoder)

    def _new_decoder(self, num_classes: int) -> nn.Sequential:
        config, generator = self.config, fresh_generator(self._seed, "decoder")
        inputs = config.heads * config.value_dim
        decoder: nn.Sequential = make_decoder(config.decoder, inputs, config.hidden, num_classes, generator)
        return decoder

    # --- from features to pairs -------------------------------------------------------------------------------------
    def queries(self, features: Tensor) -> Tensor:
        """(N, D) to (N, C, k)."""
        with _exact(features):
            found: Tensor = project(features.float(), self.projection, self.config.heads)
        return found

    def lookup(self, features: Tensor, masked: bool = False) -> Tensor:
        """The pairs that each vector selects.

        Args:
            features: (N, D).
            masked: only among pairs that training has read.

        Returns:
            int16 (N, C * top_k).
        """
        allowed = self.usage > 0 if masked else None
        with _exact(features):
            found: Tensor = nearest(self.queries(features), self.keys, top_k=self.config.top_k, allowed=allowed)
        return found.flatten(1)

    def place(self, keys: Tensor) -> None:
        """Put the keys where they stay."""
        self.keys.copy_(keys)
        self.placed.fill_(True)

    # --- from pairs to logits ---------------------------------------------------------------------------------------
    def slots(self, pairs: Tensor) -> Tensor:
        """Pairs (..., C * top_k) as rows of the flattened tables; -1 (no token there) stays negative."""
        config = self.config
        base = torch.arange(config.heads, device=pairs.device).repeat_interleave(config.top_k) * config.pairs
        slots = pairs + base
        return slots if pairs.dim() == 2 else torch.where(pairs < 0, -1, slots)

    def forward(self, pairs: Tensor) -> Tensor:
        """Pairs (B, C * top_k), or (B, T, C * top_k) with -1 where a row has no token, to logits (B, num_classes).

        Values are summed over the nearest keys and averaged over tokens; voting averages over heads as well.
        """
        slots, config = self.slots(pairs), self.config
        if config.decoder == "votes":
            return self._tally(slots)
        if self.decoder is None:
            return self._read(slots)
        # One bag for each example and head.
        grouped = slots.view(len(slots), -1, config.heads, config.top_k).transpose(1, 2).flatten(2)
        read = self._read(grouped.reshape(len(slots) * config.heads, -1))
        logits: Tensor = self.decoder(read.view(len(slots), -1))
        return logits

    def _read(self, slots: Tensor) -> Tensor:
        """One bag per row of ``slots``: the mean over its heads and tokens of the sum over their nearest keys."""
        slots = slots.flatten(1)
        if self.config.tokens:
            valid = slots >= 0
            counts, flat = valid.sum(dim=1), slots[valid]
        else:
            counts, flat = torch.full((len(slots),), slots.shape[1], device=slots.device), slots.flatten()
        scale = self.config.top_k / counts.clamp(min=1).to(self.values.dtype)
        read: Tensor = bag_sum(self.values.flatten(0, 1), flat, counts.cumsum(0) - counts, scale)
        return read

    def _tally(self, slots: Tensor) -> Tensor:
        """Counts, or smoothed log shares ``log((n_y + a) / (n + a Y))``, averaged over all that an example selects."""
        if self.config.vote_scale == "count":
            return self._read(slots)
        slots = slots.flatten(1)
        valid = (slots >= 0).unsqueeze(2)
        counts = self.values.flatten(0, 1)[slots.clamp(min=0)] + self.config.smoothing  # (B, S, num_classes)
        shares = (counts / counts.sum(dim=2, keepdim=True)).log()
        weight: Tensor = self.config.top_k / valid.sum(dim=1).clamp(min=1)
        total: Tensor = (shares * valid).sum(dim=1)
        return total * weight

    # --- what training records --------------------------------------------------------------------------------------
    @torch.no_grad()
    def record(self, pairs: Tensor) -> None:
        """Count that training reads these pairs."""
        slots = self.slots(pairs).flatten()
        if self.config.tokens:
            slots = slots[slots >= 0]
        self.usage.view(-1).add_(torch.bincount(slots, minlength=self.usage.numel()))

    @torch.no_grad()
    def vote(self, pairs: Tensor, labels: Tensor) -> None:
        """Add each example's class to the counts of the pairs that it selects."""
        slots = self.slots(pairs).flatten(1)
        valid = slots >= 0
        classes = labels.unsqueeze(1).expand_as(slots)[valid]
        width = self.values.shape[2]
        self.values.view(-1).index_add_(0, slots[valid] * width + classes, torch.ones(len(classes)).to(self.values))

    # --- growing ----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def adapt(self, num_classes: int) -> None:
        """Grow the label space; nothing that was learned changes.

        Voting and votes get columns of zeros, which is what a wider table would have there. A decoder's last layer gets
        the rows that it would have had from the start.

        Raises:
            ValueError: fewer classes than there are.
        """
        more = num_classes - self.num_classes
        if more < 0:
            raise ValueError(f"adapt can't drop classes: there are {self.num_classes}, asked for {num_classes}")
        if not more:
            return
        if self.decoder is None:
            wider = torch.cat([self.values.data, self.values.new_zeros(*self.values.shape[:2], more)], dim=2)
            self.values = nn.Parameter(wider, requires_grad=self._trained_by_gradient)
        else:
            widen(self.decoder, self._new_decoder(num_classes))
        self.num_classes = num_classes

    def description(self) -> dict[str, object]:
        """JSON from which an equal bottleneck is built."""
        options = {name: value for name, value in asdict(self.config).items() if name != "replay"}
        return {"options": options, "seed": self._seed, "num_classes": self.num_classes}


def _exact(features: Tensor) -> torch.autocast:
    """Within, nothing is computed in half precision, which would find other keys."""
    return torch.autocast(features.device.type, enabled=False)
