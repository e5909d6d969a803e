"""The steps of one task, as the trainer takes them: what follows each of them is decided here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from clkit.progress import Bar
from clkit.strategy import TaskLoop
from clkit.tasks.base import Task
from clkit.tasks.batch import Batch

if TYPE_CHECKING:
    from clkit.trainer import SequentialTrainer


class StepLoop(TaskLoop):
    """The steps of one task."""

    def __init__(self, trainer: SequentialTrainer, task: Task, bar: Bar) -> None:
        self._trainer, self._task, self._bar = trainer, task, bar
        self._since = time.perf_counter()
        self._tokens = 0

    def run(self) -> None:
        """Take the steps of the strategy's loader."""
        for batch in self._trainer.strategy.train_loader(self._task):
            self._take(batch)

    def step(self, batch: Batch) -> dict[str, float]:
        """Take one step; its loss terms as numbers."""
        return self._trainer.engine.total({name: float(value) for name, value in self._take(batch).items()})

    def done(self, losses: dict[str, float]) -> None:
        """Count a step that the strategy took."""
        self._trainer.position.advance()
        self._after(losses, None)

    def _take(self, batch: Batch) -> dict[str, torch.Tensor]:
        rate = self._trainer.engine.learning_rate
        terms = self._trainer._step(batch, self._task)
        self._tokens += batch.labels.numel()
        self._after(terms, rate)
        return terms

    def _after(self, terms: Mapping[str, torch.Tensor | float], rate: float | None) -> None:
        """What follows a step: log, score and checkpoint when it is time, stop when asked to."""
        trainer, config = self._trainer, self._trainer.config
        step = trainer.position.step
        if step % config.tracking.log_every == 0 or step == 1:
            losses = {name: float(value) for name, value in terms.items()}
            extra = {} if rate is None else {"learning_rate": rate}
            if rate is not None:  # what a strategy did by itself it did whole, on every process
                losses = trainer.engine.total(losses)
            trainer.observer.event("step", task=self._task.name, step=step, losses=losses, **extra)
            now = time.perf_counter()
            self._bar.show(losses, self._tokens / max(now - self._since, 1e-9))
            self._since, self._tokens = now, 0
        self._bar.advance(1)
        if config.eval.every_steps and step % config.eval.every_steps == 0:
            trainer.score_midway(self._task)
        if trainer._stopping() or (config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0):
            trainer._checkpoint()
