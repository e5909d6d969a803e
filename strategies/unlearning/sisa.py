"""SISA: the tasks of a run are shards, learned apart from each other; a request learns again only those it touches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clkit import api, build
from clkit.checkpoint import CheckpointStore
from clkit.errors import CheckpointError, Problem
from clkit.models.lora_sum import Factors, updates_from_state
from clkit.progress import Progress
from clkit.strategies.ties import Ties
from clkit.strategy import TaskLoop
from clkit.tasks.base import Task
from clkit.unlearning.case import Case
from clkit.unlearning.methods import Cost, Method


class Shards(Ties):  # type: ignore[misc]
    """Merged adapters of which some are known already: the tasks called so are not trained.

    Args:
        config: options of ``ties``.
        known: the updates of some tasks, by the task's name and the layer's.
    """

    def __init__(self, config: Any, known: Mapping[str, dict[str, Factors]]) -> None:
        super().__init__(config)
        self._known = known

    def stage_steps(self, stage: int) -> int:
        """None where the update is known."""
        return 0 if self.run.tasks[stage].name in self._known else super().stage_steps(stage)

    def train_task(self, task: Task, loop: TaskLoop) -> None:
        """Nothing where the update is known."""
        if task.name not in self._known:
            super().train_task(task, loop)

    def end_task(self, task: Task) -> None:
        """A known update takes the place of that of the adapter, which was not trained."""
        super().end_task(task)
        if task.name in self._known:
            self._updates[-1] = self._known[task.name]


class Sisa(Method):
    """Sharded, isolated and aggregated training (Bourtoule et al. 2021), with adapters for shards.

    A shard is a task of a run with ``strategy: ties`` and ``start: base``: each is learned from the base model with an
    adapter of its own, and base and merged updates serve. The paper averages the shards' predictions, and goes back to
    the slice of a shard that a record is in; here the updates are merged, and a shard is learned again whole.
    """

    name = "sisa"
    what = "the tasks that held forgotten records learned again without them, and merged with the others, as they were"

    def check(self, case: Case) -> list[Problem]:
        """Nothing may go from one task to another: weights, exemplars, moments, or the length of a schedule."""
        config, options = case.config, case.config.strategy.config
        if config.strategy.name != "ties" or options.start != "base":
            what = "only a run of `ties` with start=base has shards, its tasks; use retrain"
            return [Problem("strategy", what)]
        problems = []
        if options.replay.size:
            problems.append(Problem("strategy.replay.size", "exemplars of one task were learned with another"))
        if not config.train.reset_optimizer:
            problems.append(Problem("train.reset_optimizer", "the optimiser's moments went from task to task"))
        if config.train.schedule_scope == "run":
            problems.append(Problem("train.schedule_scope", "one schedule over all tasks has another length now"))
        if not problems:
            try:
                updates(case)
            except CheckpointError as error:
                problems.append(Problem("checkpoints", str(error)))
        return problems

    def plan(self, case: Case) -> Cost:
        """The shards that are learned again."""
        again = [n for n, task in enumerate(case.retained) if task.name in touched(case)]
        steps = sum(build.stage_steps(case.config, case.retained)[n] for n in again)
        return Cost(steps, steps * case.config.train.batch_size)

    def guarantee(self, case: Case) -> str:
        """That of retraining."""
        again = sum(task.name in touched(case) for task in case.retained)
        return (
            f"{again} of {len(case.retained)} shards are learned again without the forgotten records, and the others "
            "never saw them: nothing is left to bound."
        )

    def run(self, case: Case, directory: Path) -> Path:
        """The run again, with the updates of untouched tasks in the place of their training."""
        known = {name: update for name, update in updates(case).items() if name not in touched(case)}
        config = dataclasses.replace(case.config, output_dir=str(directory))
        strategy = Shards(config.strategy.config, known)
        api.run(config, strategy=strategy, progress=Progress(enabled=False))
        return directory


def touched(case: Case) -> set[str]:
    """The tasks that held a forgotten training record."""
    return {place.task for place in case.training_places()}


def updates(case: Case) -> dict[str, dict[str, Factors]]:
    """The run's updates by task and layer.

    Raises:
        CheckpointError: its last checkpoint is gone.
    """
    saved = CheckpointStore(case.source.path / "checkpoints").load()
    found = [] if saved is None else updates_from_state(saved["strategy"]["updates"])
    if len(found) != len(case.source.tasks):
        raise CheckpointError(f"{case.source.path} has no checkpoint of its end, where the shards' updates are")
    return dict(zip((task.name for task in case.source.tasks), found, strict=True))
