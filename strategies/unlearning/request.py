"""Serving a deletion request with an approximate method: from the deployed weights, on the shared trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from clkit import api, build
from clkit.checkpoint import clone_state
from clkit.config import Plugin, RunConfig
from clkit.errors import CapabilityError, ClkitError, Problem
from clkit.progress import Progress
from clkit.trainer import SequentialTrainer
from clkit.unlearning.case import Case
from clkit.unlearning.methods import Cost, Method

from .base import Unlearner


class Approximate(Method):
    """A method that starts from the deployed model and bounds nothing.

    Attributes:
        strategy: what trains.
    """

    sees_forgotten = True
    strategy: ClassVar[type[Unlearner]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.config_class = cls.strategy.config_class

    def check(self, case: Case) -> list[Problem]:
        """The tasks' kinds, and options that belong to runs."""
        problems = list(self.strategy.check(self.config))
        wrong = sorted({task.kind for task in case.retained} - set(self.strategy.capabilities.kinds))
        if wrong:
            problems.append(Problem("", f"does not unlearn tasks of kind {', '.join(wrong)}"))
        if self.config.forget_tasks:
            problems.append(Problem("forget_tasks", "is for runs; the request says what is forgotten"))
        if not (case.source.path / "checkpoints").is_dir():
            problems.append(Problem("", f"{case.source.path} has no checkpoint to start from; it was purged"))
        if problems:
            return problems
        try:
            build.check(self._changed(case), case.retained, self.strategy.capabilities)
        except ClkitError as error:
            return [Problem("", str(error))]
        return []

    def admit(self, case: Case) -> None:
        """The run must serve the network that its configuration describes.

        Raises:
            CapabilityError: it serves another one.
        """
        config = case.config
        with api.open_run(case.source.path) as trainer, trainer.serving():
            device = trainer.engine.device
            fresh = build.make_model(config.model, case.source.tasks, config.seed, lambda text: None, device).module
            trained = {n for n, p in fresh.named_parameters() if p.requires_grad}
            buffers = {n for n, _ in fresh.named_buffers()}
            _same_network(trainer, fresh.state_dict(), trained | buffers)

    def plan(self, case: Case) -> Cost:
        """Passes over the forgotten rows, each with a retained one beside it where the method retains."""
        rows = len(case.training_places())
        steps = self.config.epochs * -(-rows // case.config.train.batch_size)
        seen = self.config.epochs * rows
        return Cost(steps, seen * (2 if self.strategy.retains else 1), seen if self.strategy.frozen_reference else 0)

    def guarantee(self, case: Case) -> str:
        """None."""
        return (
            "No guarantee: it begins with the weights that learned the records. The gates measure what can still be "
            "told and taken out of it, by the attacks that they know."
        )

    def run(self, case: Case, directory: Path) -> Path:
        """A run of the strategy on the retained data, which may read the forgotten records."""
        strategy = self.strategy(self.config)
        by_task: dict[str, list[int]] = {}
        for place in case.training_places():
            by_task.setdefault(place.task, []).append(place.position)
        trains = {task.name: task.train for task in case.source.tasks}
        forget = [trains[name].subset(rows) for name, rows in by_task.items()]
        strategy.give(forget, lambda: deployed(case.source.path, strategy))
        config = dataclasses.replace(self._changed(case), output_dir=str(directory))
        api.run(config, strategy=strategy, progress=Progress(enabled=False))
        return directory

    def _changed(self, case: Case) -> RunConfig:
        """The run's configuration with this strategy, and without scores of a start that is known."""
        initial = dataclasses.replace(case.config.eval, initial=False)
        return dataclasses.replace(case.config, strategy=Plugin(self.name, self.config), eval=initial)


def deployed(run_dir: Path, strategy: Unlearner) -> dict[str, Tensor]:
    """The weights that a run serves, as those of the strategy's module.

    Raises:
        CapabilityError: the run's network is another one: its strategy adds to it, or changes what is frozen here.
    """
    with api.open_run(run_dir) as trainer, trainer.serving():
        wanted = strategy.model_state()
        _same_network(trainer, strategy.run.model.module.state_dict(), wanted)
        serving = trainer.model.module.state_dict()
        found: dict[str, Tensor] = clone_state({k: serving[k] for k in wanted})
        return found


def _same_network(trainer: SequentialTrainer, ours: dict[str, Tensor], trained: Collection[str]) -> None:
    """Refuse a run whose network is not ours but for what is trained in it."""
    serving = trainer.model.module.state_dict()
    odd = sorted({*serving} ^ {*ours}) or sorted(
        k for k, v in ours.items() if k not in trained and not torch.equal(v.cpu(), serving[k].cpu())
    )
    if odd:
        raise CapabilityError(
            f"{trainer.config.output_dir}: strategy '{trainer.config.strategy.name}' serves another network than the "
            f"configuration's model ({len(odd)} tensors, such as '{odd[0]}'), so this method can't start from it. Use "
            "retrain."
        )
