"""The contract of a model: how tasks become batches, and batches logits and a loss."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.cache import RowCache
from clkit.errors import CapabilityError
from clkit.models.precision import at_least_float32
from clkit.tasks.base import Examples, Kind
from clkit.tasks.batch import Batch, Encoded


class Model(ABC):
    """A module and what is needed to feed and save it.

    Attributes:
        name: as the user gave it.
        module: the network; a strategy may wrap or replace parts of it.
        provenance: JSON for the run directory: where the weights come from and their SHA-256.
        kinds: the kinds of task it can learn.
        has_features: whether ``features`` gives something.
    """

    kinds: ClassVar[frozenset[Kind]]
    has_features: ClassVar[bool] = False

    def __init__(self, name: str, module: nn.Module, provenance: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.module = module
        self.provenance: dict[str, Any] = dict(provenance or {})

    @property
    def device(self) -> torch.device:
        """Where the module's parameters are; its buffers, where nothing in it is trained."""
        return next(itertools.chain(self.module.parameters(), self.module.buffers())).device

    @abstractmethod
    def encode(self, examples: Examples) -> Encoded:
        """Turn examples into the model's own form, once.

        Raises:
            DataError: the examples are of a kind that this model can't read, or a record does not fit.
        """

    def precompute(self, encoded: Encoded, cache: RowCache) -> Encoded:
        """The examples with what is constant for them computed already; by default they are as they were."""
        return encoded

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """Run the module: (B, num_classes), or (B, P, vocabulary) at the P positions that predict a target."""

    @abstractmethod
    def loss(self, batch: Batch, logits: Tensor | None = None) -> Tensor:
        """Mean cross entropy over the batch's targets, computed in float32."""

    def example_losses(self, batch: Batch) -> Tensor:
        """(B,) the mean cross entropy over each example's own targets, at least in float32; 0 for one without any."""
        scores, targets = at_least_float32(self.logits(batch)), self.targets(batch)
        each = F.cross_entropy(scores.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="none")
        each = each.view(len(targets), -1)
        return each.sum(dim=1) / (targets != -100).view(len(targets), -1).sum(dim=1).clamp(min=1)

    def features(self, batch: Batch) -> Tensor:
        """One vector per example, what the classification head reads: (B, D).

        Raises:
            CapabilityError: this kind of model has no such vector.
        """
        raise CapabilityError(f"Model '{self.name}' has no features to choose examples by.")

    def targets(self, batch: Batch) -> Tensor:
        """What :meth:`logits` predicts: classes (B,), or tokens (B, P) with -100 where a row predicts nothing."""
        return batch.labels

    def exported(self) -> list[nn.Parameter]:
        """The parameters that :meth:`export` writes."""
        return list(self.module.parameters())

    @abstractmethod
    def export(self, directory: Path) -> str:
        """Write what a user takes away; return the Python snippet that loads it."""
