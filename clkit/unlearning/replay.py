"""Exact replay: back to a checkpoint from before the records were first used, and on from there without them.

What it equals, bit for bit on the CPU: a run of the same configuration and seed on the retained records. So a
checkpoint may serve only if that run would have been in the same state there:

- the state of a task's beginning is the same when no earlier task was trained on a forgotten record;
- within a task the order of the records must be the same so far. A shuffle of positions is another one throughout as
  soon as the number of records is another; with ``train.order: record`` it is the same up to the first use of a
  forgotten record, or up to its window of 32 batches where batches are grouped by length. The learning rate must not
  depend on the number of steps, or that must not have changed, and there must be no buffer, which knows records by
  position.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from clkit import build, resolve
from clkit.checkpoint import CheckpointStore, clone_state, read_checkpoint
from clkit.config import RunConfig
from clkit.errors import CheckpointError, Problem
from clkit.loader import WINDOW
from clkit.progress import Progress
from clkit.provenance import collect
from clkit.registry import STRATEGIES
from clkit.rundir import RunDirectory
from clkit.tasks.base import TaskSequence
from clkit.unlearning.case import Case
from clkit.unlearning.methods import Cost, Method, training_cost
from clkit.unlearning.tombstones import in_force
from clkit.uses import FirstUse, recorded


@dataclass(frozen=True)
class Bound:
    """How far a run is one that never had the records: all of the stages before ``stage``, and ``step`` steps of it."""

    stage: int
    step: int = 0

    def allows(self, position: dict[str, int], learned: bool) -> bool:
        """Whether a checkpoint at a position is within it."""
        if position["stage"] != self.stage:
            return position["stage"] < self.stage
        return position["step"] <= self.step and not learned


class ExactReplay(Method):
    """Replays a run from a checkpoint that knows nothing of the records."""

    name = "exact_replay"
    what = "the run gone back to a checkpoint from before it first used a forgotten record, and on without them"

    def check(self, case: Case) -> list[Problem]:
        """Engine, strategy, schedule, classes, and a checkpoint that is old enough."""
        config = case.config
        problems = []
        if config.engine.name == "private":
            what = "private draws secret batches and noise, so no run can be repeated; use retrain"
            problems.append(Problem("engine", what))
        if not STRATEGIES.get(config.strategy.name).capabilities.causal:
            what = f"strategy '{config.strategy.name}' may look ahead, so an old checkpoint may know the records"
            problems.append(Problem("strategy", f"{what}; use retrain"))
        if build.num_classes(case.source.tasks) != build.num_classes(case.retained):
            problems.append(Problem("tasks", "the last class is gone, so the new run has another network; use retrain"))
        if config.train.schedule_scope == "run" and not _same_rate(config, _totals(case, whole=True)):
            what = "one schedule over the whole run has another length now, and so other learning rates from the start"
            problems.append(Problem("train.schedule_scope", f"{what}; use retrain"))
        if not problems and _newest(case) is None:
            bound = first_difference(case)
            where = f"step {bound.step + 1} of " if bound.step else "the beginning of "
            where += f"task {bound.stage + 1} of {len(case.source.tasks)}"
            what = (
                f"none is kept in {case.source.path} from {where} or before, where the run first differs from one "
                "without the records. Use retrain, and set checkpoint.keep higher (and train.order=record, to go back "
                "within a task) in the next run"
            )
            problems.append(Problem("checkpoints", what))
        return problems

    def plan(self, case: Case) -> Cost:
        """What is left from the checkpoint on."""
        whole = training_cost(case.config, case.retained)
        found = _newest(case)
        done = found[1]["total_steps"] if found else 0
        return Cost(whole.steps - done, round(whole.examples * (1 - done / max(whole.steps, 1))))

    def guarantee(self, case: Case) -> str:
        """That of retraining."""
        found = _newest(case)
        done = f" The first {found[1]['total_steps']} steps are those of the old run." if found else ""
        return (
            "The new model is, bit for bit on the CPU, that of a run with the same configuration and seed on the "
            f"retained records.{done}"
        )

    def run(self, case: Case, directory: Path) -> Path:
        """Put the checkpoint into a new run directory, and go on as after any interruption."""
        from clkit import api

        config = dataclasses.replace(build.located(case.config), output_dir=str(directory), name=directory.name)
        target = RunDirectory(directory, config.checkpoint.keep)
        with target.locked():
            if not target.finished and not target.checkpoints.list():
                found = _newest(case)
                if found is None:
                    raise CheckpointError(f"{case.source.path}: the checkpoint to go back to is gone")
                state = carried(read_checkpoint(found[0]), case)
                target.begin(resolve.to_dict(config), collect(case.retained) | in_force(directory).facts())
                target.checkpoints.save(state)
        api.run(config, progress=Progress(enabled=False))
        return directory


def first_difference(case: Case) -> Bound:
    """Up to where the run is in the state of one without the records."""
    config, source = case.config, case.source
    strategy = build.make_strategy(config.strategy)
    strategy.run = _bare(source.tasks, config)
    ids: dict[str, list[str]] = {}
    for place in case.training_places():
        task = next(t for t in source.tasks if t.name == place.task)
        ids.setdefault(place.task, []).append(task.train.ids[place.position])
    for stage in range(len(source.tasks)):
        gone = [i for t in strategy.training_set(stage) for i in ids.get(source.tasks[t].name, ())]
        if gone:
            return Bound(stage, _within(case, stage, gone))
    return Bound(len(source.tasks))


def _bare(tasks: TaskSequence, config: RunConfig) -> Any:
    return SimpleNamespace(tasks=tasks, config=config)


def _within(case: Case, stage: int, gone: Sequence[str]) -> int:
    """How many steps of the first stage that holds forgotten records are those of a run without them."""
    config, source = case.config, case.source
    newest = CheckpointStore(source.path / "checkpoints").list()
    buffered = config.strategy.config.replay.size > 0
    # A stage that is gone altogether moves those behind it: the next one has the position of this one.
    same = case.retained[stage].name == source.tasks[stage].name if stage < len(case.retained) else False
    if config.train.order != "record" or buffered or not same or not newest:
        return 0
    if not _same_rate(config, _totals(case, whole=False)[stage : stage + 1]):
        return 0
    uses = recorded(read_checkpoint(newest[-1]), source.tasks)
    if uses is None:
        return 0
    begins = sum(build.stage_steps(config, source.tasks)[:stage])
    length = build.stage_steps(config, source.tasks)[stage]
    step = min(found - begins if (found := uses.at(id)) is not None else length for id in gone)
    return step - step % WINDOW if config.train.group_by_length else max(step, 0)


def _totals(case: Case, *, whole: bool) -> list[tuple[int, int]]:
    """Optimiser steps with and without the records, of each stage or of the run."""
    before = build.stage_steps(case.config, case.source.tasks)
    names = [task.name for task in case.retained]
    after = dict(zip(names, build.stage_steps(case.config, case.retained), strict=True))
    if whole:
        return [(sum(before), sum(after.values()))]
    return [(n, after.get(task.name, 0)) for n, task in zip(before, case.source.tasks, strict=True)]


def _same_rate(config: RunConfig, totals: Sequence[tuple[int, int]]) -> bool:
    """Whether the learning rate of a step is the same with either number of steps."""
    constant = config.train.schedule == "constant" and config.train.warmup == 0
    return constant or all(before == after for before, after in totals)


def _newest(case: Case) -> tuple[Path, dict[str, int]] | None:
    """The newest whole checkpoint within the bound, and its position."""
    bound = first_difference(case)
    for path in reversed(CheckpointStore(case.source.path / "checkpoints").list()):
        try:
            tree = json.loads((path / "state.json").read_text(encoding="utf-8"))
            position, learned = tree["position"], tree["learned"]
        except (OSError, ValueError, KeyError):
            continue
        if bound.allows(position, learned) and _whole(path):
            return path, position
    return None


def _whole(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except CheckpointError:
        return False
    return True


def carried(state: dict[str, Any], case: Case) -> dict[str, Any]:
    """A checkpoint of the old run as one of the new: rows and columns of tasks that are left, events from here on.

    Scores that were measured on evaluation records which are forgotten too become "not measured".
    """
    old, new = case.source.tasks, case.retained
    state = clone_state(state)
    names = [task.name for task in (*old, *old.holdout)]
    kept = [task.name for task in (*new, *new.holdout)]
    columns = torch.tensor([names.index(name) for name in kept])
    rows = torch.tensor([names.index(task.name) for task in new])
    changed = torch.tensor([_rescored(case, name) for name in kept])
    for table in (state, *state["further"].values()):
        table["matrix"] = torch.where(changed, torch.nan, table["matrix"][rows][:, columns])
        table["initial"] = torch.where(changed, torch.nan, table["initial"][columns])
    uses = recorded(state, old)
    done = state["position"]["total_steps"]
    state["first_use"] = FirstUse(new).carried(uses, done).state_dict() if uses is not None else None
    state["events"] = 0
    if state["engine"] is not None and state["position"]["step"]:
        state["engine"]["total"] = _totals(case, whole=False)[state["position"]["stage"]][1]
    return state


def _rescored(case: Case, task: str) -> bool:
    """Whether a task is scored with fewer records now."""
    return any(place.task == task and place.part == "eval" for place in case.gone)
