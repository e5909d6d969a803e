"""SequentialTrainer: learn tasks one after another, score all of them after each, resume exactly.

The whole loop, top to bottom::

    fit:   for each stage: learn it, score every seen task (a row of R), checkpoint
    learn: begin_task -> one optimiser step per batch of strategy.train_loader -> end_task
    step:  loss terms -> backward (per micro-batch) -> after_backward -> clip and update -> after_step
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clkit.build import coerce
from clkit.cache import RowCache, computed_root
from clkit.card import card
from clkit.checkpoint import CheckpointStore, clone_state
from clkit.config import EngineConfig, RunConfig
from clkit.dealing import dealt
from clkit.engine.base import Engine
from clkit.engine.local import LocalEngine
from clkit.errors import NumericalError
from clkit.evaluation.base import Score, evaluate_all
from clkit.files import replace_directory
from clkit.loader import Encodings
from clkit.loop import StepLoop
from clkit.models.base import Model
from clkit.observe import Observer
from clkit.progress import Progress
from clkit.provenance import answer_styles, collect
from clkit.resolve import to_dict
from clkit.result import RunResult
from clkit.rng import Streams
from clkit.rundir import RunDirectory, run_directory
from clkit.scores import Scores
from clkit.signals import Interrupted, stop_on_signal
from clkit.strategy import Position, RunContext, Strategy, total_loss
from clkit.tasks.base import Task, TaskSequence
from clkit.tasks.batch import Batch
from clkit.unlearning.tombstones import in_force
from clkit.uses import FirstUse


class SequentialTrainer:
    """The loop over tasks and steps.

    Args:
        model: what learns: a Model, or any module from tensors to logits (``clkit.models.wrap`` for language models).
        strategy: how it learns: an object, or a name for that strategy with its defaults.
        config: a RunConfig, or sections of one (``{"train": {"epochs": 3}}``). Its model, tasks and engine sections
            are only recorded here.
        engine: how a step is executed; one local process by default.
        directory: the run directory; None keeps nothing on disk.
        progress: shows what is going on.
    """

    def __init__(
        self,
        model: Model | nn.Module,
        strategy: Strategy | str = "naive",
        config: RunConfig | Mapping[str, Any] | None = None,
        *,
        engine: Engine | None = None,
        directory: RunDirectory | str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.strategy, self.config = coerce(model, strategy, config)
        named = ("tasks", "model") if isinstance(config, RunConfig) else config or ()
        self._made = {f"{part}_from": "python" for part in ("tasks", "model") if part not in named}
        self.engine = engine or LocalEngine(EngineConfig())
        if isinstance(directory, (str, Path)):
            directory = run_directory(directory, self.config.checkpoint.keep, self.engine.is_main)
        self.directory = directory
        self.progress = progress or Progress(enabled=False)
        self._stop = self._asked = False
        self._initial_done = self._learned = self._midway = False

    # --- the run ----------------------------------------------------------------------------------------------------
    def fit(self, tasks: Sequence[Task]) -> RunResult:
        """Learn all tasks (a TaskSequence, or the tasks of one), from the newest checkpoint on if there is one.

        Raises:
            NumericalError: a loss or a gradient is NaN or infinite; names task, step and record ids.
            CheckpointError: the state can't be written or read, or another process runs in the directory.
            Interrupted: Ctrl-C; the state was saved. A KeyboardInterrupt whose text says where, and how to go on.
        """
        try:
            return self._begin(tasks if isinstance(tasks, TaskSequence) else TaskSequence(tasks))
        except Interrupted as stop:
            raise stop.with_traceback(None) from None  # it stopped between two steps: nobody needs to see the frames

    def _begin(self, tasks: TaskSequence) -> RunResult:
        forgotten = in_force(None if self.directory is None else self.directory.path)
        tasks = forgotten.apply(tasks)
        if self.directory is None:
            return self._fit(tasks)
        with self.directory.locked():
            self.directory.begin(to_dict(self.config), collect(tasks) | self._made | forgotten.facts())
            if self.directory.finished:
                return RunResult.load(self.directory.path)
            with self.directory.recording_failure():
                self.directory.write_rows("answer_styles.jsonl", answer_styles(tasks))
                self.directory.bind_model(self.model.provenance)
                return self._fit(tasks)

    def _fit(self, tasks: TaskSequence) -> RunResult:
        self._stop = self._asked = False
        self.prepare(tasks)
        self.run.encodings.check()
        state = self.position
        with self.observer, stop_on_signal(self._request_stop):
            if self.config.eval.initial and not self._initial_done:
                self._score(lambda scores: scores.initial, "before training", range(len(self.scored)))
                self._initial_done = True
                self._checkpoint()
            while state.stage < len(tasks):
                if self.strategy.training_set(state.stage):
                    if not self._learned:
                        self._learn(tasks[state.stage])
                        self._learned = True
                        self._checkpoint()
                    self._score(lambda scores: scores.matrix[state.stage], f"after {tasks[state.stage].name}")
                    self.observer.cost(tasks, state.stage, self.strategy)
                state.stage, state.step, self._learned = state.stage + 1, 0, False
                self._checkpoint()
            totals = {k: v for k, v in self.scores.metrics().items() if k != "per_task"}
            self.observer.event("metrics", values=totals)
        return self._finish()

    def prepare(self, tasks: TaskSequence, *, read_only: bool = False) -> bool:
        """Set everything up and load the newest checkpoint; True when there was one. ``read_only`` writes nothing."""
        self.tasks = tasks
        self.scored = [*tasks, *tasks.holdout]
        self.position, self.uses = Position(), FirstUse(tasks)
        kept = self.directory if self.engine.is_main and not read_only else None
        self.observer = Observer(kept, self.config, self.position)
        own = [task.metric for task in self.scored]
        self.scores = Scores.empty(len(tasks), own)
        self.further = {m: Scores.empty(len(tasks), [m] * len(own)) for m in self.config.eval.also}
        self._initial_done = self._learned = self._midway = False
        self._previous: Batch | None = None
        streams = Streams(self.config.seed)
        streams.seed_global()
        self.engine.prepare(self.model)
        cache = RowCache(computed_root() if self.directory is not None else None)
        self.run = RunContext(
            self.model,
            tasks,
            self.engine,
            self.config,
            streams,
            Encodings(self.model, tasks, cache),
            self.position,
            lambda name, value: self.observer.event("value", name=name, value=value),
            cache,
            self.observer.event,
        )
        self.strategy.setup(self.run)
        self.further |= {name: Scores.empty(len(tasks), own) for name in self.strategy.alternatives()}
        saved = self.store.load() if self.store is not None else None
        if kept is not None:
            kept.open_events(saved["events"] if saved else 0)
            self.engine.record_in(kept)
        if saved:
            self._restore(saved)
        self.observer.begin(tasks, self.scores, resumed=bool(saved))
        return saved is not None

    # --- one task ---------------------------------------------------------------------------------------------------
    def _learn(self, task: Task) -> None:
        position = self.position
        count = sum(len(self.tasks[i].train) for i in self.strategy.training_set(position.stage))
        total = self.strategy.stage_steps(position.stage)
        if position.step == 0:
            self.strategy.begin_task(task)
            self._start_optimizer(total)
            self.observer.event("task", name=task.name, examples=count, steps=total)
        self.model.module.train()
        with self.progress.task(f"[{position.stage + 1}/{len(self.tasks)}] {task.name}", total, position.step) as bar:
            if self._midway:
                self.score_midway(task)
            self.strategy.train_task(task, StepLoop(self, task, bar))
        self.strategy.end_task(task)
        self.strategy.select_exemplars()

    def _start_optimizer(self, steps: int) -> None:
        train = self.strategy.train_config(self.position.stage)
        whole_run = train.schedule_scope == "run"
        if whole_run:
            steps = sum(self.strategy.stage_steps(s) for s in range(len(self.tasks)))
        started = self.position.total_steps > 0
        self.engine.start(
            self.strategy.parameters(),
            train,
            steps,
            keep_moments=started and not train.reset_optimizer,
            keep_schedule=started and whole_run,
        )

    def _step(self, batch: Batch, task: Task) -> dict[str, torch.Tensor]:
        """One optimiser step; returns the detached loss terms."""
        strategy, engine = self.strategy, self.engine
        sums: dict[str, torch.Tensor] = {}
        parts = dealt(batch, self.config.train, strategy, engine, self.run.streams)
        for number, (part, share) in enumerate(parts, 1):
            with engine.autocast():
                terms = engine.losses(strategy, part)
                if share:
                    terms = {k: v * share.get(k, share["*"]) for k, v in terms.items()}
                total = total_loss(terms)
            for name, value in terms.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
            finite = math.isfinite(total.detach())
            if engine.any(not finite):
                ids = [] if finite else part.ids
                raise self._not_finite("loss", {k: float(v) for k, v in sums.items()}, task, ids)
            engine.backward(total, last=number == len(parts))
        engine.unscale()
        strategy.after_backward()
        norm = engine.step()
        if norm is not None and not math.isfinite(norm):
            raise self._not_finite("gradient norm", {"norm": norm}, task, batch.ids if engine.is_main else [])
        self._previous = batch
        self.uses.note(batch, self.position.total_steps)
        self.position.advance()
        strategy.after_step()
        return sums

    def _not_finite(self, what: str, values: dict[str, float], task: Task, ids: list[str]) -> NumericalError:
        ids = [i for part in self.engine.group.all_gather(ids) for i in part]
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        self.observer.event("not_finite", what=what, task=task.name, step=self.position.step, ids=ids)
        culprit = "look at these records"
        if self._weights_are_broken():
            culprit = "the update before had broken the weights, so it is not these records"
            if self.store is not None:
                self.store.drop_after(self.position.total_steps - 1)
        return NumericalError(
            f"The {what} is not finite in task '{task.name}' at step {self.position.step + 1}: {values}. "
            f"Records: {shown}; {culprit}. Lower train.learning_rate or set train.clip, in a new output_dir or with "
            "--fresh. The last good checkpoint stays."
        )

    def _weights_are_broken(self) -> bool:
        """Whether the batch of the step before, whose loss was finite, has one no longer."""
        if self._previous is None:
            return False
        with torch.no_grad(), self.engine.autocast():
            terms = self.engine.losses(self.strategy, self._previous.to(self.engine.device))
        return not all(math.isfinite(value) for value in terms.values())

    # --- scoring ----------------------------------------------------------------------------------------------------
    def _score(
        self, row: Callable[[Scores], np.ndarray], when: str, due: Sequence[int] = (), *, further: bool = True
    ) -> None:
        """Score into a row of R: all seen tasks, the next one (forward transfer needs it), and holdout tasks.

        ``further``: the further matrices get their rows too, of more metrics and of weights that do not serve.
        """
        stage, count, shown = self.position.stage, len(self.tasks), []
        before = self._events_offset()
        last = stage + 1 if self.config.eval.initial else stage
        due = due or [j for j in range(len(self.scored)) if j <= last or j >= count]
        also = self.config.eval.also if further else []
        views = [("", self.strategy.inference, [self.scores, *(self.further[metric] for metric in also)])]
        if further:
            others = self.strategy.alternatives()
            views += [(name, weights, [self.further[name]]) for name, weights in others.items()]
        with self.progress.task(f"scoring {when}", len(due) * len(views)) as bar:
            for name, weights, tables in views:
                of = {"weights": name} if name else {}
                with self._computing(weights()):
                    for j in due:
                        if self._stopping():
                            break
                        found = self._evaluate(self.scored[j], [table.task_metrics[j] for table in tables])
                        for table in tables:
                            row(table)[j] = found[table.task_metrics[j]].value
                        for score in found.values():
                            about = {"task": self.scored[j].name, "metric": score.metric, "n": score.n, **of}
                            self.observer.event("score", after=when, stage=stage, value=score.value, **about)
                        if further and not name:
                            self.observer.sample(self.scored[j], j, found[self.scores.task_metrics[j]], when)
                        shown += [] if name else [f"{self.scored[j].name} {found[tables[0].task_metrics[j]].value:.3f}"]
                        bar.advance(1)
        if self._stop:  # whoever goes on from here scores all of them again
            self._checkpoint(before)
        self.progress.say(f"{when}: " + "  ".join(shown))

    def score_midway(self, task: Task) -> None:
        """Score in the middle of a task: into events only."""
        self._midway = True
        nowhere = np.full(len(self.scored), math.nan)
        self._score(lambda scores: nowhere, f"step {self.position.step} of {task.name}", further=False)
        self._midway = False
        self.model.module.train()

    @contextlib.contextmanager
    def _computing(self, weights: AbstractContextManager[nn.Module]) -> Iterator[None]:
        with weights as module:
            trained, self.model.module = self.model.module, module
            try:
                yield
            finally:
                self.model.module = trained

    def serving(self) -> AbstractContextManager[None]:
        """Within the context the model computes with the weights that the strategy serves."""
        return self._computing(self.strategy.inference())

    def score_task(self, task: Task) -> Score:
        """Score one task with the module as it is."""
        return self._evaluate(task, [task.metric])[task.metric]

    def _evaluate(self, task: Task, metrics: Sequence[str]) -> dict[str, Score]:
        return evaluate_all(
            self.model,
            task,
            self.run.encodings.eval(task),
            metrics=metrics,
            options=self.config.eval,
            group=self.engine.scoring_group,
            restrict_to=task.classes if self.tasks.scenario == "task" else None,
        )

    # --- state ------------------------------------------------------------------------------------------------------
    @property
    def store(self) -> CheckpointStore | None:
        """Where checkpoints go."""
        return self.directory.checkpoints if self.directory is not None else None

    def _events_offset(self) -> int:
        return self.directory.events_offset() if self.directory is not None else 0

    def _state(self, events: int | None = None) -> dict[str, Any]:
        return {
            "position": dict(vars(self.position)),
            "learned": self._learned,
            "initial_done": self._initial_done,
            "midway": self._midway,
            **self.scores.state_dict(),
            "further": {name: scores.state_dict() for name, scores in self.further.items()},
            "events": self._events_offset() if events is None else events,
            "streams": self.run.streams.state_dict(),
            "strategy": self.strategy.state_dict(),
            "model": self.strategy.model_state(),
            "engine": self.engine.state_dict() if self._training else None,
            "first_use": self.uses.state_dict(),
        }

    @property
    def _training(self) -> bool:
        return self.position.total_steps > 0

    def _checkpoint(self, events: int | None = None) -> None:
        """Save the state, with the events up to byte ``events`` (None = all so far)."""
        if self.store is not None and self.directory is not None:
            self.store.save(self._state(events))
            self.directory.status("running", **self._where())
        if self._stop:
            where = f"interrupted at {self.place()}"
            if self.directory is None:
                raise Interrupted(f"{where}; nothing is kept, because this run has no directory")
            again = "the same call or command again goes on from there"
            raise Interrupted(f"{self.directory.path}: {where}, and saved; {again}")

    def place(self) -> str:
        """Where the run is, in words."""
        stage, count = self.position.stage, len(self.tasks)
        return f"task {stage + 1} of {count}, step {self.position.step}" if stage < count else "the end of all tasks"

    def _where(self) -> dict[str, Any]:
        stage = self.position.stage
        name = self.tasks[stage].name if stage < len(self.tasks) else None
        return {"task": name, "stage": stage, "step": self.position.step}

    def _restore(self, saved: dict[str, Any]) -> None:
        for key, value in saved["position"].items():
            setattr(self.position, key, value)
        self._learned, self._initial_done = saved["learned"], saved["initial_done"]
        self._midway = saved.get("midway", False)
        self.uses.load_state_dict(saved.get("first_use"))
        self.scores.load_state_dict(saved)
        for name, numbers in saved.get("further", {}).items():
            self.further[name].load_state_dict(numbers)
        # Copied, because what was read lies anywhere in memory, and where a tensor begins decides how sums are rounded.
        self.strategy.load_state_dict(clone_state(saved["strategy"]))
        self.strategy.load_model_state(saved["model"])
        if saved["engine"] is not None:
            # Right after a stage the optimiser is still that stage's; its state is only kept for its moments.
            stage = min(self.position.stage, len(self.tasks) - 1)
            self.engine.start(self.strategy.parameters(), self.strategy.train_config(stage), 1)
            self.engine.load_state_dict(saved["engine"])
        self.run.streams.load_state_dict(saved["streams"])
        self.progress.say(f"resuming at {self.place()}")

    def _request_stop(self) -> None:
        self._asked = True

    def _stopping(self) -> bool:
        """Whether a process was asked to stop: then all do, at the same place."""
        self._stop = self._stop or self.engine.any(self._asked)
        return self._stop

    def _result(self) -> RunResult:
        scores = self.scores
        return RunResult(
            name=self.config.name,
            tasks=[t.name for t in self.tasks],
            holdout=[t.name for t in self.tasks.holdout],
            task_metrics=scores.task_metrics,
            matrix=scores.matrix,
            initial=scores.initial,
            metrics=scores.metrics(),
            higher_is_better=scores.higher_is_better,
            further=self.further,
            run_dir=self.directory.path if self.directory is not None else None,
        )

    def _finish(self) -> RunResult:
        self.engine.finish()
        result = self._result()
        if self.directory is not None:
            result.snippet = self.export(self.directory.path / "export")
            result.save(self.directory)
            self.directory.status("finished", holds=self.strategy.holds())
        return result

    def export(self, directory: Path) -> str:
        """Write what a user takes away into ``directory``, whole or not at all; returns the snippet that loads it."""

        def write(folder: Path) -> str:
            snippet = self.strategy.export(folder)
            shown = snippet.replace(str(folder), ".")
            text = card(self._result(), self.config, shown, self.model.name, getattr(self.model, "base", None))
            (folder / "README.md").write_text(text, encoding="utf-8")
            return snippet

        with self.engine.gathered(self.model.exported()):
            return replace_directory(directory, write) if self.engine.is_main else ""
