"""Strategies that keep exemplars have a second classifier for nothing: the nearest mean of a class's exemplars."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from clkit.errors import Problem
from clkit.evaluation.base import evaluate
from clkit.evaluation.features import extract
from clkit.memory import Buffer, class_mean
from clkit.models.classifier import ClassifierNet
from clkit.models.heads import NearestMeanHead
from clkit.strategy import Strategy


class ExemplarMeans(Strategy):
    """Class means of exemplars (Rebuffi et al. 2017), made anew after every task.

    The options must have ``serve``: ``linear`` or ``nearest-mean``. That classifier is scored and exported; the scores
    of the other are events named ``nearest-mean/<task>`` or ``linear/<task>``.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.means: NearestMeanHead | None = None

    @staticmethod
    def check_serving(config: Any, kept: float) -> list[Problem]:
        """Means are those of exemplars; ``kept`` is 0 where there are none."""
        if config.serve == "linear" or kept:
            return []
        return [Problem("strategy.serve", "nearest-mean needs exemplars (got replay.size 0, expected >= 1)")]

    @property
    def net(self) -> ClassifierNet:
        """The classifier."""
        net: ClassifierNet = self.run.model.module  # type: ignore[assignment]
        return net

    def select_exemplars(self) -> None:
        """Choose exemplars; then the means, and the scores of the classifier that does not serve."""
        super().select_exemplars()
        if self.buffer is not None:
            self.means = self._class_means(self.buffer)
            self._score_other()

    def _class_means(self, buffer: Buffer) -> NearestMeanHead:
        run, size = self.run, self.run.config.eval.batch_size
        places: dict[int, dict[int, list[int]]] = {}
        for ref in buffer.refs:
            if ref.label is not None:
                places.setdefault(ref.label, {}).setdefault(ref.task, []).append(ref.index)
        head = NearestMeanHead(self.net.head.out_features, self.net.backbone.out_features)
        for label, rows in places.items():
            found = [extract(run.model, run.encodings.train(t), size, torch.tensor(i)) for t, i in rows.items()]
            head.set(label, class_mean(torch.cat(found)))
        return head.to(run.engine.device)

    def _score_other(self) -> None:
        run = self.run
        name = "nearest-mean" if self.config.serve == "linear" else "linear"
        with self._serving(name):
            for task in run.tasks[: run.position.stage + 1]:
                score = evaluate(
                    run.model,
                    task,
                    run.encodings.eval(task),
                    metric=task.metric,
                    options=run.config.eval,
                    group=run.engine.group,
                    restrict_to=task.classes if run.tasks.scenario == "task" else None,
                )
                run.log(f"{name}/{task.name}", score.value)

    # --- what serves ------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _serving(self, which: str) -> Iterator[nn.Module]:
        # Where the network grew since, the means are those of a narrower one, and the linear head serves.
        usable = self.means is not None and self.means.in_features == self.net.backbone.out_features
        if which == "linear" or not usable:
            yield self.net
            return
        linear, self.net.head = self.net.head, self.means
        try:
            yield self.net
        finally:
            self.net.head = linear

    def inference(self) -> AbstractContextManager[nn.Module]:
        """The classifier that ``serve`` names."""
        return self._serving(self.config.serve)

    # --- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The rest, and the class means."""
        return {**super().state_dict(), "means": None if self.means is None else dict(self.means.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.means = None
        if (means := state["means"]) is not None:
            self.means = NearestMeanHead(*means["means"].shape).to(self.run.engine.device)
            self.means.load_state_dict(means)
