"""What approximate unlearning methods share: where forget and retained rows come from, and which loss each gets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from clkit.checkpoint import clone_state
from clkit.config import StrategyConfig, TrainConfig, opt
from clkit.loader import Pool, epoch_order
from clkit.modes import evaluating, swapped
from clkit.rng import fresh_generator
from clkit.strategy import Losses, Strategy
from clkit.tasks.base import Examples, Task
from clkit.tasks.batch import Batch, Encoded

from .losses import sequence_log_probs


@dataclass
class UnlearnConfig(StrategyConfig):
    """Options of every approximate method."""

    forget_tasks: list[str] = opt([], "tasks that are unlearned when they come; all others are learned, as by naive")
    epochs: int = opt(5, "passes over what is forgotten", min=1)
    learning_rate: float = opt(0.0, "peak learning rate while unlearning; 0 = train.learning_rate", min=0)


@dataclass
class RetainConfig(UnlearnConfig):
    """Options of a method that holds on to the retained records."""

    retain_weight: float = opt(1.0, "weight of the retained rows' loss", min=0)


class PairLoader:
    """Forgotten rows in batches, each with as many retained ones; from a step on, a function of seed and stage.

    Args:
        forget: what is forgotten; an epoch is a pass over it.
        retain: what is kept, in parts.
        rows: positions in ``retain`` that may be drawn; empty for none.
        train: epochs and batch size (of forgotten rows).
        seed: the run's.
        stage: the stage.
        start: the first step.
    """

    def __init__(
        self,
        forget: Pool,
        retain: Sequence[Encoded],
        rows: Tensor,
        train: TrainConfig,
        *,
        seed: int,
        stage: int,
        start: int,
    ) -> None:
        self._pool = Pool([*forget.parts, *retain])
        self._count, self._rows = len(forget), rows + len(forget)
        self._train, self._seed, self._stage, self._start = train, seed, stage, start
        self._lengths = forget.lengths if train.group_by_length else None

    def __iter__(self) -> Iterator[Batch]:
        size = self._train.batch_size
        per_epoch = -(-self._count // size)
        epoch, order, beside = -1, [], self._rows
        for step in range(self._start, self._train.epochs * per_epoch):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                key = (self._seed, "order", self._stage, epoch)
                order = epoch_order(self._count, size, fresh_generator(*key), self._lengths)
                beside = self._beside(epoch)
            new = order[step % per_epoch]
            first = size * (step % per_epoch)
            old = beside[first : first + len(new)]
            batch = self._pool.batch(torch.cat([new, old]))
            batch.replayed = torch.arange(len(batch)) >= len(new)
            yield batch

    def _beside(self, epoch: int) -> Tensor:
        """The retained rows of an epoch, drawn without repetition as far as they go."""
        if not len(self._rows):
            return self._rows
        generator = fresh_generator(self._seed, "retain", self._stage, epoch)
        need = self._train.batch_size * -(-self._count // self._train.batch_size)
        rounds = -(-need // len(self._rows))
        return torch.cat([self._rows[torch.randperm(len(self._rows), generator=generator)] for _ in range(rounds)])


class Unlearner(Strategy):
    """Pushes records down in a model that has learned them.

    What it forgets is either a task of the sequence (``forget_tasks``: when it comes, its training examples are
    unlearned from the model as it is then, with the earlier tasks as retained data), or what :meth:`give` gave: then
    it trains once, at the last stage, from the given weights, with all tasks as retained data.

    Attributes:
        retains: whether batches hold retained rows too.
        frozen_reference: whether the model as it was before is kept to compare with.
    """

    config_class = UnlearnConfig
    retains: ClassVar[bool] = True
    frozen_reference: ClassVar[bool] = False

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._given: list[Examples] = []
        self._start: Callable[[], dict[str, Tensor]] | None = None
        self._reference: dict[str, Tensor] | None = None

    def give(self, forget: Sequence[Examples], start: Callable[[], dict[str, Tensor]]) -> None:
        """What a deletion request takes out, and the weights of the model that has learned it.

        Args:
            forget: the records, task by task.
            start: gives the module's trained tensors and buffers, by name; asked when training begins.
        """
        self._given, self._start = list(forget), start

    # --- what is trained when ---------------------------------------------------------------------------------------
    def _forgets(self, stage: int) -> bool:
        if self._given:
            return stage == len(self.run.tasks) - 1
        return self.run.tasks[stage].name in self.config.forget_tasks

    def training_set(self, stage: int) -> Sequence[int]:
        """A request is served at the last stage, on everything that is retained; the others are skipped."""
        if self._given:
            return range(len(self.run.tasks)) if self._forgets(stage) else ()
        return [stage]

    def _forgotten(self, stage: int) -> list[Examples]:
        return self._given or [self.run.tasks[stage].train]

    def train_config(self, stage: int) -> TrainConfig:
        """The method's own epochs and learning rate where it unlearns."""
        train = super().train_config(stage)
        if not self._forgets(stage):
            return train
        rate = self.config.learning_rate or train.learning_rate
        return replace(train, epochs=self.config.epochs, steps=0, learning_rate=rate)

    def stage_steps(self, stage: int) -> int:
        """A pass is one over what is forgotten."""
        if not self._forgets(stage):
            return super().stage_steps(stage)
        count = sum(map(len, self._forgotten(stage)))
        return int(self.config.epochs) * -(-count // self.run.config.train.batch_size)

    def begin_task(self, task: Task) -> None:
        """Take the given weights, and keep a reference."""
        if not self._forgets(self.run.position.stage):
            return
        if self._start is not None:
            self.load_model_state(self._start())
        if self.frozen_reference:
            self._reference = clone_state(self.model_state())

    def train_loader(self, task: Task) -> Iterable[Batch]:
        """Forgotten rows with retained ones beside them."""
        run, stage = self.run, self.run.position.stage
        if not self._forgets(stage):
            return super().train_loader(task)
        forget = Pool([run.encodings.encode(examples) for examples in self._forgotten(stage)])
        retain, rows = self._retained(stage, set(forget.ids))
        options = {"seed": run.config.seed, "stage": stage, "start": run.position.step}
        return PairLoader(forget, retain, rows, self.train_config(stage), **options)

    def _retained(self, stage: int, gone: set[str]) -> tuple[list[Encoded], Tensor]:
        """The retained data, and the rows of it that may be used: a record that is forgotten may stand in two tasks."""
        names = self.config.forget_tasks
        tasks = range(len(self.run.tasks)) if self._given else range(stage)
        kept = [t for t in tasks if self.retains and (self._given or self.run.tasks[t].name not in names)]
        parts = [self.run.encodings.train(t) for t in kept]
        ids = [id for part in parts for id in part.ids]
        return parts, torch.tensor([i for i, id in enumerate(ids) if id not in gone], dtype=torch.long)

    def select_exemplars(self) -> None:
        """Nothing that is forgotten becomes an exemplar."""
        if not self._forgets(self.run.position.stage):
            super().select_exemplars()

    # --- the loss ---------------------------------------------------------------------------------------------------
    def loss(self, batch: Batch) -> Losses:
        """``forget`` on the forgotten rows, ``retain`` on the others; plain cross entropy where tasks are learned."""
        if not self._forgets(self.run.position.stage) or batch.replayed is None:
            return super().loss(batch)
        terms = {}
        forget, retain = batch.rows(~batch.replayed), batch.rows(batch.replayed)
        if len(forget):
            terms["forget"] = self.forget_loss(forget)
        if len(retain):
            terms["retain"] = self.config.retain_weight * self.retain_loss(retain)
        return terms

    @abstractmethod
    def forget_loss(self, batch: Batch) -> Tensor:
        """What is minimised on forgotten rows: a mean over rows, unless ``units`` says otherwise."""

    def retain_loss(self, batch: Batch) -> Tensor:
        """What is minimised on retained rows, a mean over their targets."""
        return self.run.model.loss(batch)

    def units(self, batch: Batch) -> dict[str, float]:
        """Forgotten rows, and targets of retained ones."""
        if not self._forgets(self.run.position.stage) or batch.replayed is None:
            return super().units(batch)
        forget, retain = batch.rows(~batch.replayed), batch.rows(batch.replayed)
        return {"forget": self.forget_units(forget), "retain": float(retain.num_targets)}

    def forget_units(self, batch: Batch) -> float:
        """How many units :meth:`forget_loss` is a mean over."""
        return float(len(batch))

    def log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B,) log probability of each row's answer, and (B,) how many tokens it has."""
        model = self.run.model
        return sequence_log_probs(model.logits(batch), model.targets(batch))

    def reference_log_probs(self, batch: Batch) -> Tensor:
        """(B,) log probability of each row's answer under the frozen reference."""
        model = self.run.model
        return sequence_log_probs(self.reference_logits(batch), model.targets(batch))[0]

    def reference_logits(self, batch: Batch) -> Tensor:
        """The frozen reference's logits, without gradient."""
        model = self.run.model
        with torch.no_grad(), evaluating(model.module), swapped(model.module, self._reference or {}):
            return model.logits(batch)

    # --- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The buffer and the reference."""
        return {**super().state_dict(), "reference": self._reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        reference, device = state["reference"], self.run.engine.device
        self._reference = None if reference is None else {k: v.to(device) for k, v in reference.items()}
