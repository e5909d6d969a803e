"""Dynamically expandable representation: a whole network for every task, all features side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clkit.errors import Problem
from clkit.models.classifier import ClassifierNet
from clkit.strategies.memo.config import GrowingConfig
from clkit.strategies.memo.strategy import Memo


# mypy reads strategies/ under its own name, so that what comes from clkit.strategies has no type for it.
@dataclass
class DerConfig(GrowingConfig):  # type: ignore[misc]
    """MEMO's options without those about a shared part, which there is not."""

    train_base: ClassVar[bool] = False
    stop_old_gradient: ClassVar[bool] = False


class Der(Memo):  # type: ignore[misc]
    """Yan, Xie, He, CVPR 2021: MEMO cut before the first layer.

    As in the code that the class-incremental literature compares with (PyCIL): a new network starts as a copy of the
    last one and the weights of new classes are aligned; no channel masks, and no second stage for the classifier.
    """

    config_class = DerConfig

    @classmethod
    def check(cls, config: DerConfig) -> list[Problem]:
        """Options that contradict each other."""
        problems: list[Problem] = cls.check_serving(config, config.replay.size or config.budget)
        problems += cls.check_budget(config)
        return problems

    def _cut(self, net: ClassifierNet) -> str:
        return next(iter(net.backbone.parts()), "")
