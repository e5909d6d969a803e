"""Search through Optuna instead of a grid: the next setting follows from those before, poor ones stop early.

A trial is one setting with all seeds, one after another. Its intermediate values are the running average accuracy of
the first seed: after each task the mean over the tasks seen so far, read from ``events.jsonl`` as the run writes it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from filelock import FileLock, Timeout

from clkit import build
from clkit.errors import BusyError, CapabilityError, ConfigError
from clkit.evaluation import SCORERS
from clkit.metrics.continual import DEFINITIONS
from clkit.progress import Progress
from clkit.result import RunResult
from clkit.sweep import axes as axes_
from clkit.sweep.axes import Axis, Setting
from clkit.sweep.drive import Report, write_manifest
from clkit.sweep.launchers import Worker, spec
from clkit.sweep.plan import Run, Sweep, check, make_runs
from clkit.sweep.worker import Outcome

_POLL_SECONDS = 0.2
_JOURNAL = "search.jsonl"


def search(sweep: Sweep, progress: Progress) -> dict[Run, str]:
    """Try settings until ``sweep.search.trials`` of them are done, those of an earlier process counted.

    Returns:
        The runs that failed, with the reason.

    Raises:
        CapabilityError: Optuna is not installed.
        BusyError: another process searches in this directory.
        ConfigError: a setting that was chosen is not valid, or the search in this directory was about something else.
    """
    try:
        import optuna
    except ImportError as error:
        raise CapabilityError(
            "sweep.search: needs Optuna, which is not installed: pip install 'clkit[optuna]'"
        ) from error
    sweep.directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(sweep.directory / ".search.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"{sweep.directory}: another process searches here. Wait for it.") from None
    try:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return _Search(sweep, progress, optuna).run()
    finally:
        lock.release()


class _Search:
    """One search.

    Attributes:
        runs: those of every trial so far, with their content hashes.
        failed: runs and reasons.
    """

    def __init__(self, sweep: Sweep, progress: Progress, optuna: Any) -> None:
        self._sweep, self._progress, self._optuna = sweep, progress, optuna
        self._options = sweep.options.search
        self._lower = DEFINITIONS[sweep.options.best].direction == "lower"
        self._study = self._open("minimize" if self._lower else "maximize")
        self._guard = threading.Lock()
        self._workers: list[Worker] = []
        self.runs: dict[Run, str] = {}
        self.failed: dict[Run, str] = {}

    def _open(self, direction: str) -> Any:
        optuna, options = self._optuna, self._options
        storage = optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(self._sweep.directory / _JOURNAL))
        )
        known = {s.study_name for s in optuna.get_all_study_summaries(storage)}
        before = len(optuna.load_study(study_name="sweep", storage=storage).trials) if "sweep" in known else 0
        seed = options.seed + before  # a sampler that starts anew must not propose again what it did
        samplers = optuna.samplers
        sampler = samplers.TPESampler(seed=seed) if options.sampler == "tpe" else samplers.RandomSampler(seed=seed)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=options.warmup_trials)
        study = optuna.create_study(
            storage=storage,
            study_name="sweep",
            sampler=sampler,
            pruner=pruner if options.prune else optuna.pruners.NopPruner(),
            direction=direction,
            load_if_exists=True,
        )
        asked = question(self._sweep)
        kept = study.user_attrs.get("question", asked)  # journals of before it was written down have none
        if changed := [key for key in asked if kept.get(key) != asked[key]]:
            journal = self._sweep.directory / _JOURNAL
            raise ConfigError(
                f"{self._sweep.origin}:sweep: the search in {self._sweep.directory} had other {' and '.join(changed)}; "
                f"choose another output_dir, or delete {journal} to search anew (finished runs are not done again)"
            )
        if "question" not in study.user_attrs:
            study.set_user_attr("question", asked)
        return study

    def run(self) -> dict[Run, str]:
        """All trials that are left."""
        states = self._optuna.trial.TrialState
        for trial in self._study.get_trials(states=(states.RUNNING,)):  # a killed process left it: again, same values
            self._study.enqueue_trial(trial.params, skip_if_exists=False)
            self._study.tell(trial.number, state=states.FAIL)
        ended = self._study.get_trials(states=(states.COMPLETE, states.PRUNED))
        for trial in ended:
            self._take(self._setting(self._optuna.trial.FixedTrial(trial.params)))
        left = max(0, self._options.trials - len(ended))
        self._progress.say(f"{self._sweep.name}: {self._options.trials} trials, {len(ended)} done, {left} to do")
        with self._progress.task(self._sweep.name, self._options.trials, len(ended)) as bar:
            report = Report(self._progress, bar, self._options.trials, len(ended))
            count = min(self._sweep.options.launcher.jobs, left)
            pool = ThreadPoolExecutor(max(1, count))
            self._workers = [Worker(self._sweep.options.launcher, slot) for slot in range(count)]
            budget = list(range(left))
            try:
                for future in [pool.submit(self._serve, worker, budget, report) for worker in self._workers]:
                    future.result()
            finally:
                budget.clear()
                for worker in self._workers:
                    worker.stop()
                pool.shutdown()
                for worker in self._workers:
                    worker.join()
        return self.failed

    def _serve(self, worker: Worker, budget: list[int], report: Report) -> None:
        """Trials one after another, until the budget is used up."""
        while True:
            with self._guard:
                if not budget:
                    return
                budget.pop()
                trial = self._study.ask()
                runs = self._take(self._setting(trial))
            state, value = self._try(trial, runs, worker, report)
            with self._guard:
                self._study.tell(trial, value, state=state)

    def _setting(self, trial: Any) -> Setting:
        """What the trial proposes, axis by axis; one whose condition does not hold is not asked for."""
        values: dict[str, Any] = {}
        names = []
        for axis in self._sweep.axes:
            if axes_.holds(axis, self._sweep.content, values):
                row, name = _suggest(trial, axis)
                values |= dict(zip(axis.keys, row, strict=True))
                names.append(name)
        return Setting(",".join(names) or "base", values)

    def _take(self, setting: Setting) -> list[Run]:
        """The setting's runs, checked and written into the sweep's list."""
        same = [run for run in self.runs if run.setting.name == setting.name]
        if same:
            return same
        runs = make_runs(self._sweep, [setting])
        if not self.runs:
            _check_direction(runs[0])
        self.runs |= check(runs, self._sweep.origin)
        write_manifest(self._sweep, list(self.runs), self.runs)
        return runs

    def _try(self, trial: Any, runs: list[Run], worker: Worker, report: Report) -> tuple[Any, float | None]:
        """Do a trial's runs; returns its state and value."""
        states = self._optuna.trial.TrialState
        scores = []
        for number, run in enumerate(runs):
            outcome, pruned = self._watch(trial if number == 0 else None, run, worker)
            if outcome.state == "finished":
                score = RunResult.load(run.directory).metrics.get(self._sweep.options.best)
                scores.append(score)
            elif not pruned:
                if outcome.state == "interrupted":
                    raise KeyboardInterrupt
                self.failed[run] = outcome.reason
                report.ended(run, outcome)
                return states.FAIL, None
            else:
                report.ended(run, Outcome("interrupted", "pruned, below the median of the other settings"))
                return states.PRUNED, None
        defined = [score for score in scores if score is not None]
        report.ended(runs[-1], Outcome("finished"))
        if len(defined) < len(scores):
            return states.FAIL, None
        return states.COMPLETE, sum(defined) / len(defined)

    def _watch(self, trial: Any, run: Run, worker: Worker) -> tuple[Outcome, bool]:
        """Do one run; of the first seed the pruner may stop it. Returns whether it did."""
        watcher, pruned = _Watcher(run), False
        with ThreadPoolExecutor(1) as pool:
            while True:
                future = pool.submit(worker.perform, spec(run, self._sweep.options.launcher))
                while not future.done():
                    time.sleep(_POLL_SECONDS)
                    if trial is not None and not pruned and self._hopeless(trial, watcher):
                        pruned = True
                        worker.interrupt()
                if future.result().state != "busy":
                    return future.result(), pruned
                time.sleep(_POLL_SECONDS)  # another trial has come to the same setting

    def _hopeless(self, trial: Any, watcher: _Watcher) -> bool:
        """Hand on what the run measured since; whether the pruner gives it up."""
        fresh = watcher.read()
        with self._guard:
            for step, value in fresh:
                trial.report(-value if self._lower else value, step)  # the pruner looks in the study's direction
            return bool(fresh) and bool(trial.should_prune())


def question(sweep: Sweep) -> dict[str, Any]:
    """What the trials of a search answer, as JSON; the trials of one don't count in another.

    A list's values are tried by their positions, so another list would give them another meaning.
    """
    axes = [
        {
            "keys": axis.keys,
            "values": axis.values
            if axis.span is None
            else [axis.span, all(isinstance(v, int) for (v,) in axis.values)],
            "when": axis.when,
        }
        for axis in sweep.axes
    ]
    found = {"axes": axes, "seeds": sweep.seeds, "best": sweep.options.best}
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _check_direction(run: Run) -> None:
    """Refuse tasks of whose score less is better: average accuracies are compared as if more were.

    Raises:
        CapabilityError: there is such a task.
    """
    for task in build.make_tasks(run.config):
        if not SCORERS.get(task.metric).higher_is_better:
            raise CapabilityError(f"sweep.search: of '{task.metric}' less is better (task '{task.name}'); sweep a grid")


def _suggest(trial: Any, axis: Axis) -> tuple[tuple[Any, ...], str]:
    """A value of an axis: anything between the ends of a range of numbers, else one of its positions."""
    name = ",".join(axis.keys)
    if axis.span is None:
        at = trial.suggest_categorical(name, list(range(len(axis.values))))
        return axis.values[at], axis.names[at]
    low, high, logarithmic = axis.span
    if all(isinstance(value, int) for (value,) in axis.values):
        value: float = trial.suggest_int(name, int(low), int(high), log=logarithmic)
    else:
        value = float(f"{trial.suggest_float(name, low, high, log=logarithmic):.6g}")
    return (value,), axes_.shown(axis.keys[0], value)


class _Watcher:
    """Reads the running average accuracy of a run that another process does."""

    def __init__(self, run: Run) -> None:
        self._file = run.directory / "events.jsonl"
        self._read: set[int] = set()

    def read(self) -> list[tuple[int, float]]:
        """(stage, mean over the tasks seen so far) of the stages that are complete and were not read before."""
        try:
            lines = self._file.read_text(encoding="utf-8").split("\n")  # U+2028 in a task's name ends no line
        except FileNotFoundError:
            return []
        found = []
        for stage, value in running_average(lines):
            if stage not in self._read:
                self._read.add(stage)
                found.append((stage, value))
        return found


def running_average(lines: Iterable[str]) -> list[tuple[int, float]]:
    """After each stage of ``events.jsonl`` that is scored completely, the mean over the tasks seen so far."""
    names: list[str] = []
    scores: dict[int, dict[str, float]] = {}
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # the last line, of which half is written
        if event["event"] == "task":
            names.append(event["name"])
        elif event["event"] == "score" and event["after"].startswith("after ") and "weights" not in event:
            # Of several metrics the task's own comes first.
            scores.setdefault(event["stage"], {}).setdefault(event["task"], event["value"])
    found = []
    for stage, values in scores.items():
        seen = names[: stage + 1]
        if len(seen) == stage + 1 and all(values.get(name) is not None for name in seen):
            found.append((stage, sum(values[name] for name in seen) / len(seen)))
    return found
