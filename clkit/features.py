"""Strategies that learn from a frozen backbone's features in one pass, without a gradient: what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.config import TrainConfig
from clkit.errors import CapabilityError, NumericalError
from clkit.models.backbones.base import Backbone
from clkit.models.classifier import Classifier, ClassifierNet
from clkit.strategy import Capabilities, Losses, RunContext, Strategy, one_pass
from clkit.tasks.base import Task
from clkit.tasks.batch import Batch


class FeatureStatistics:
    """Counts and sums of vectors by class and, if asked for, their second moment: all that these methods keep.

    Float64 sums, so the order of tasks, classes and batches changes nothing but the last bits.

    Args:
        num_classes: C.
        width: W, length of a vector.
        moment: keep the second moment.
        device: where they live.

    Attributes:
        counts: float64 (C,).
        sums: float64 (C, W).
        moment: float64 (W, W), the sum of all outer products; (0, 0) when it is not kept.

    Example:
        >>> statistics = FeatureStatistics(2, 1)
        >>> statistics.add(torch.tensor([[1.0], [3.0], [8.0]], dtype=torch.float64), torch.tensor([0, 0, 1]))
        >>> statistics.means.flatten().tolist()
        [2.0, 8.0]
    """

    def __init__(
        self, num_classes: int, width: int, *, moment: bool = False, device: torch.device | None = None
    ) -> None:
        self.counts = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self.sums = torch.zeros(num_classes, width, dtype=torch.float64, device=device)
        side = width if moment else 0
        self.moment = torch.zeros(side, side, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, vectors: Tensor, labels: Tensor) -> None:
        """Take in float64 vectors (N, W) of classes (N,)."""
        self.counts += torch.bincount(labels, minlength=len(self.counts))
        self.sums.index_add_(0, labels, vectors)
        if len(self.moment):
            self.moment.addmm_(vectors.T, vectors)

    @property
    def means(self) -> Tensor:
        """(C, W); zeros for a class without examples."""
        return self.sums / self.counts.clamp(min=1).unsqueeze(1)

    def without(self, part: FeatureStatistics) -> FeatureStatistics:
        """Of the examples that are not in ``part``, which is a part of these."""
        rest = FeatureStatistics(0, 0)
        rest.counts, rest.sums = self.counts - part.counts, self.sums - part.sums
        rest.moment = self.moment - part.moment
        return rest

    def state_dict(self) -> dict[str, Tensor]:
        """The three tensors."""
        return {"counts": self.counts, "sums": self.sums, "moment": self.moment}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`."""
        for name, value in state.items():
            getattr(self, name).copy_(value)


class FeatureHead(nn.Module):
    """Linear scores, in float64: the statistics are, and small differences of large numbers decide.

    Args:
        in_features: D, length of a feature vector.
        width: W, of what the scores are linear in.
        num_classes: C.

    Attributes:
        weight: (C, W).
        bias: (C,); -inf for a class that has not been seen.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, in_features: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_classes, width, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(num_classes, dtype=torch.float64))

    def transform(self, features: Tensor) -> Tensor:
        """Features (B, D) as the vectors (B, W) that statistics are kept of."""
        return features.double()

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) to logits (B, C)."""
        return F.linear(self.transform(features), self.weight, self.bias).float()


class FeatureNet(ClassifierNet):
    """A frozen backbone with such a head.

    Args:
        backbone: is frozen.
        head: the scores.
        strategy: whose head it is.
    """

    head: FeatureHead

    def __init__(self, backbone: Backbone, head: FeatureHead, strategy: str) -> None:
        super().__init__(backbone, 1, torch.Generator(), frozen=True)
        self.head = head
        self._strategy = strategy

    def description(self) -> dict[str, Any]:
        """See :meth:`ClassifierNet.description`."""
        return {"strategy": self._strategy, "width": self.head.weight.shape[1]}


class FeatureStrategy(Strategy, ABC):
    """One pass over features that are computed once; the head is solved from statistics whenever it has to serve.

    What it learns depends on the examples alone, not on their order, so nothing is forgotten. A class may return.
    Rehearsed examples are not counted twice. The term that is logged as a loss, ``spread``, is the mean squared
    distance of a batch's vectors to the means of their classes so far.
    """

    capabilities = Capabilities(kinds=frozenset({"classification"}))
    name: ClassVar[str]
    head_class: ClassVar[type[FeatureHead]] = FeatureHead
    needs_moment: ClassVar[bool] = False

    @abstractmethod
    def solve(self) -> tuple[Tensor, Tensor]:
        """Weight (C, W) and bias (C,) of the head, from the statistics; both float64."""

    @classmethod
    def trained(cls, sizes: Mapping[str, int]) -> int | None:
        """Nothing: the head is solved."""
        return 0

    def width(self, in_features: int) -> int:
        """W for features of length D."""
        return in_features

    def setup(self, run: RunContext) -> None:
        """Put the head in the place of the classifier's own.

        Raises:
            CapabilityError: the model is no classifier with a backbone, or is to be adapted.
        """
        super().setup(run)
        model, net = frozen_classifier(self.name, run)
        inputs = net.backbone.out_features
        self.head = self.head_class(inputs, self.width(inputs), model.num_classes)
        model.module = FeatureNet(net.backbone, self.head, self.name).to(run.engine.device)
        self._trained = set()
        self.statistics = self.new_statistics()
        self._solved = True

    def new_statistics(self) -> FeatureStatistics:
        """Statistics of nothing."""
        classes, width = self.head.weight.shape
        return FeatureStatistics(classes, width, moment=self.needs_moment, device=self.head.weight.device)

    def train_config(self, stage: int) -> TrainConfig:
        """The run's, for at most one pass: in a second there is nothing to count."""
        return one_pass(self, super().train_config(stage), stage)

    def train_loader(self, task: Task) -> Iterator[Batch]:
        """Batches of features, once each. They are counted as they leave, so the state is exact at every step."""
        for batch in super().train_loader(task):
            new = batch if batch.replayed is None else batch.rows(~batch.replayed)
            new = new.to(self.run.engine.device)
            vectors = self.head.transform(new.inputs["features"])
            check_finite(vectors, new.ids, self.run.model.name, f"task '{task.name}'")
            self.record(new, vectors)
            self._solved = False
            yield batch

    def record(self, batch: Batch, vectors: Tensor) -> None:
        """Take in new examples; ``vectors`` (B, W) are their transformed features."""
        self.statistics.add(vectors, batch.labels)

    def loss(self, batch: Batch) -> Losses:
        """The spread; it has no gradient."""
        centres = self.statistics.means[batch.labels]
        gaps = self.head.transform(batch.inputs["features"]) - centres
        return {"spread": gaps.square().sum(dim=1).mean()}

    def inference(self) -> Any:
        """The network, its head solved."""
        if not self._solved:
            weight, bias = self.solve()
            seen = self.statistics.counts > 0
            self.head.weight.copy_(weight)
            self.head.bias.copy_(bias.masked_fill(~seen, -torch.inf))
            self._solved = True
        return super().inference()

    @classmethod
    def rebuild(cls, net: ClassifierNet, description: Mapping[str, Any]) -> FeatureNet:
        """The network of an export."""
        head = cls.head_class(net.backbone.out_features, description["width"], net.head.out_features)
        return FeatureNet(net.backbone, head, cls.name)

    def state_dict(self) -> dict[str, Any]:
        """The buffer and the statistics."""
        return {**super().state_dict(), "statistics": self.statistics.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.statistics.load_state_dict(state["statistics"])
        self._solved = not bool(self.statistics.counts.any())


def frozen_classifier(strategy: str, run: RunContext) -> tuple[Classifier, ClassifierNet]:
    """The model and its network, for a strategy that never changes the backbone.

    Raises:
        CapabilityError: it is no classifier with a backbone, or is to be adapted, or to see changed images.
    """
    model, net = run.model, run.model.module
    if not isinstance(model, Classifier) or not isinstance(net, ClassifierNet):
        raise CapabilityError(
            f"Strategy '{strategy}' needs a backbone with a head, and '{model.name}' is a {type(net).__name__}; name a "
            "model in the configuration, or give features as vectors to model 'identity'."
        )
    if model.config.lora.r:
        raise CapabilityError(f"Strategy '{strategy}' freezes the backbone; set model.lora.r to 0.")
    if run.config.train.augment != "none":
        raise CapabilityError(
            f"Strategy '{strategy}' reads every image once, as it is; set train.augment to none (got "
            f"'{run.config.train.augment}')."
        )
    return model, net


def check_finite(vectors: Tensor, ids: Sequence[str], model: str, where: str) -> None:
    """Refuse vectors (N, W) that would silently spoil what is made of them.

    Args:
        vectors: of the records ``ids`` (N,).
        ids: see ``vectors``; a record may have several.
        model: what gave them.
        where: what they are of.

    Raises:
        NumericalError: some are not finite; names their records.
    """
    good = vectors.isfinite().all(dim=1)
    if not good.all():
        broken = list(dict.fromkeys(i for i, row in zip(ids, good.tolist(), strict=True) if not row))
        raise NumericalError(
            f"Model '{model}' gives features that are not finite in {where}. "
            f"Records: {', '.join(broken[:8])}; look at these records, or take model.dtype=float32."
        )


def solve_positive(matrix: Tensor, right: Tensor, advice: str) -> Tensor:
    """``matrix^-1 right`` of a symmetric positive definite matrix (W, W) and (W, C).

    Raises:
        NumericalError: rounding left it indefinite; says what to do.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise NumericalError(f"The features' second moment is too ill-conditioned to be inverted; {advice}.")
    return torch.cholesky_solve(right, factor)
