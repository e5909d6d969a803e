"""A frozen backbone with a bottleneck for a head, and its examples as the pairs that they select."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clkit.cache import RowCache, Rows, row_names, tensors_digest
from clkit.features import check_finite
from clkit.loader import Encodings
from clkit.models.backbones.base import Backbone
from clkit.models.classifier import Classifier, ClassifierNet
from clkit.models.encoded_examples import EncodedLabelled
from clkit.models.frozen import EncodedFeatures, over_batches
from clkit.strategies.dkvb.bottleneck import Bottleneck
from clkit.tasks.base import Examples, TaskSequence
from clkit.tasks.batch import Batch, Encoded


class BottleneckNet(ClassifierNet):
    """Backbone and bottleneck. A batch brings inputs, features or pairs, whichever is known.

    Args:
        backbone: is frozen.
        head: the bottleneck.
    """

    head: Bottleneck

    def __init__(self, backbone: Backbone, head: Bottleneck) -> None:
        super().__init__(backbone, 1, torch.Generator(), frozen=True)
        self.head = head

    @property
    def constant(self) -> bool:
        """One feature vector per example is worth keeping; many are not (their pairs are)."""
        return not self.head.config.tokens

    def description(self) -> dict[str, Any]:
        """See :meth:`ClassifierNet.description`."""
        return {"strategy": "dkvb", **self.head.description()}

    def vectors(
        self, x: Tensor | None = None, features: Tensor | None = None, **tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is looked up: (M, D) vectors of all examples, and how many each of them has, (B,)."""
        if not self.head.config.tokens:
            found = self.features(x, **tokens) if features is None else features
            return found, torch.ones(len(found), dtype=torch.long, device=found.device)
        with torch.no_grad():
            states, mask = self.backbone.tokens(**tokens) if x is None else self.backbone.tokens(self.scaled(x))
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return states[mask], mask.sum(dim=1)

    def lookup(self, masked: bool, **inputs: Tensor) -> Tensor:
        """Pairs (B, C * top_k), or (B, T, C * top_k) token by token; see :meth:`Bottleneck.lookup`."""
        vectors, counts = self.vectors(**inputs)
        found = self.head.lookup(vectors, masked)
        return pad(found, counts) if self.head.config.tokens else found

    def forward(  # type: ignore[override]
        self, x: Tensor | None = None, pairs: Tensor | None = None, masked: bool | None = None, **inputs: Tensor
    ) -> Tensor:
        """Logits (B, num_classes).

        Args:
            x: images or vectors.
            pairs: selected among all pairs, when that is known; where ``masked`` makes a difference and the inputs are
                there too, these examples are looked up again.
            masked: select only pairs that training has read; None = in evaluation mode, if ``unused`` is ``exclude``.
            **inputs: ``features``, or what a text encoder reads.
        """
        head = self.head
        if x is not None:
            inputs = {**inputs, "x": x}
        if masked is None:
            masked = not self.training and head.config.unused == "exclude"
        if pairs is None:
            pairs = self.lookup(masked, **inputs)
        elif masked and inputs:
            slots = head.slots(pairs)
            unused = ((head.usage.view(-1)[slots.clamp(min=0)] == 0) & (slots >= 0)).flatten(1).any(dim=1)
            if unused.any():
                again = self.lookup(True, **{name: value[unused] for name, value in inputs.items()})
                pairs = pairs.clone()
                pairs[unused] = again if pairs.dim() == 2 else _fit(again, pairs.shape[1])
        logits: Tensor = head(pairs)
        return logits


def owners(ids: Sequence[str], counts: Tensor) -> list[str]:
    """The record of each vector, where record ``i`` has ``counts[i]`` of them."""
    return [i for i, count in zip(ids, counts.tolist(), strict=True) for _ in range(count)]


def pad(rows: Tensor, counts: Tensor) -> Tensor:
    """Rows (M, S) dealt out by ``counts`` (B,): (B, max, S), filled with -1."""
    return _stack(list(torch.split(rows, counts.tolist())))


def _stack(parts: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-1)


def _fit(pairs: Tensor, width: int) -> Tensor:
    return nn.functional.pad(pairs, (0, 0, 0, width - pairs.shape[1]), value=-1)


class EncodedPairs(EncodedLabelled):
    """Examples as the pairs that they select, looked up once and kept in the cache.

    Until the keys are placed the examples are what they were.

    Args:
        source: features, or what the backbone reads.
        model: its module is a :class:`BottleneckNet`.
        cache: keeps the pairs, under hashes of backbone, projection, keys and inputs.
        carry: give the source's inputs too, for lookups with the usage mask.
    """

    def __init__(self, source: Any, model: Classifier, cache: RowCache, carry: bool) -> None:
        self.source: EncodedLabelled = source
        self.ids, self.labels, self.lengths = source.ids, source.labels, source.lengths
        self._model, self._cache, self._carry = model, cache, carry
        self._net: Any = model.module
        self._head: Bottleneck = self._net.head
        self._rows: Rows | None = None
        self._parts: Sequence[Tensor] = ()

    def batch(self, indices: Tensor) -> Batch:
        """Inputs ``pairs`` (B, C * top_k) int16, or (B, T, C * top_k), -1 where a row has no token."""
        if not self._head.placed:
            return replace(self.source.batch(indices), source=self)
        if self._rows is None:
            self._rows = self._look_up()
            if self._head.config.tokens:
                self._parts = torch.split(self._rows.flat, self._rows.lengths.tolist())
        if self._parts:
            pairs = _stack([self._parts[i] for i in indices.tolist()])
        else:
            pairs = self._rows.flat.index_select(0, indices)
        inputs = self.source.batch(indices).inputs if self._carry else {}
        return Batch({**inputs, "pairs": pairs}, self.labels.index_select(0, indices), len(indices), indices, self)

    def check_finite(self, task: str) -> None:
        """Refuse features that are not finite; those of tokens are looked at when their pairs are looked up."""
        if isinstance(self.source, EncodedFeatures):
            check_finite(self.source.features, self.ids, self._model.name, f"task '{task}'")

    def _look_up(self) -> Rows:
        head, model, source = self._head, self._model, self.source

        def compute(rows: Tensor) -> Rows:
            if isinstance(source, EncodedFeatures):
                flat: Tensor = head.lookup(source.features[rows].to(model.device)).cpu()
                return Rows(flat, torch.ones(len(flat), dtype=torch.long))
            return _by_token(model, source, rows)

        tensors = {"keys": head.keys}
        if head.projection is not None:
            tensors["projection"] = head.projection
        options = {"top_k": head.config.top_k, "tokens": head.config.tokens}
        recipe = {"what": "pairs", **model.feature_recipe, **options, "bottleneck": tensors_digest(tensors)}
        names = source.names if isinstance(source, EncodedFeatures) else row_names(source)
        found: Rows = self._cache.rows(recipe, names, compute)
        return found


def _by_token(model: Classifier, source: Encoded, rows: Tensor) -> Rows:
    """Pairs of every token, examples of similar length together."""
    net: Any = model.module
    parts: dict[int, Tensor] = {}

    def run(batch: Batch) -> Tensor:
        counts: Tensor
        vectors, counts = net.vectors(**batch.inputs)
        check_finite(vectors, owners(batch.ids, counts), model.name, "the vectors of tokens")
        found = torch.split(net.head.lookup(vectors).cpu(), counts.tolist())
        parts.update(zip(batch.indices.tolist(), found, strict=True))
        return counts

    counts = over_batches(model, source, rows, run)
    return Rows(torch.cat([parts[i] for i in rows.tolist()]), counts)


class PairEncodings(Encodings):
    """Encodings that give pairs.

    Args:
        model: see :class:`EncodedPairs`.
        tasks: the sequence.
        cache: see :class:`EncodedPairs`.
        carry: whether training batches carry the inputs too, as all others do.
    """

    def __init__(self, model: Classifier, tasks: TaskSequence, cache: RowCache, carry: bool) -> None:
        super().__init__(model, tasks, cache)
        self._pairs = functools.partial(EncodedPairs, model=model, cache=cache)
        self._carry = carry

    def encode(self, examples: Examples) -> Encoded:
        """Examples that carry their inputs."""
        return self._pairs(super().encode(examples), carry=True)

    def train(self, index: int) -> Encoded:
        """Training examples of task ``index``."""
        if index not in self._train:
            self._train[index] = self._pairs(super().encode(self._tasks[index].train), carry=self._carry)
        return self._train[index]
