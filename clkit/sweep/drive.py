"""Does the runs of a sweep that are not done, and survives anything that happens to them or to itself."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from clkit.errors import BusyError, ClkitError
from clkit.files import replace_file
from clkit.progress import Bar, Progress
from clkit.result import RunResult
from clkit.rundir import RunDirectory
from clkit.sweep.axes import shown
from clkit.sweep.launchers import Launcher, make_launcher
from clkit.sweep.plan import Run, Sweep, check
from clkit.sweep.summary import MANIFEST
from clkit.sweep.worker import Outcome

_POLL_SECONDS = 0.5
_PROBLEM = ("tasks", "model", "eval")  # settings that differ in these learn something else, and are not compared


def run_all(sweep: Sweep, *, retry_failed: bool = False, progress: Progress | None = None) -> dict[Run, str]:
    """Check all runs, then do those that are not finished.

    Args:
        sweep: from :func:`clkit.sweep.plan.load`.
        retry_failed: do runs again that failed before; they go on from their last checkpoint.
        progress: shows what is going on.

    Returns:
        The runs that failed, with the reason.

    Raises:
        ConfigError: something is wrong with a run; nothing was started.
        KeyboardInterrupt: the runs that were going on are saved.
    """
    progress = progress or Progress(enabled=False)
    hashes = check(sweep.runs, sweep.origin)
    launcher = make_launcher(sweep.options.launcher, sweep.directory)
    write_manifest(sweep, sweep.runs, hashes)
    states = {run: state_of(run) for run in sweep.runs}
    failed = {run: reason for run, (state, reason) in states.items() if state == "failed" and not retry_failed}
    todo = [run for run in sweep.runs if states[run][0] != "finished" and run not in failed]
    done = len(sweep.runs) - len(todo)
    counts = f"{done - len(failed)} finished, {len(failed)} failed before, {len(todo)} to do"
    progress.say(f"{sweep.name}: {len(sweep.runs)} runs, {counts}")
    with progress.task(sweep.name, len(sweep.runs), done) as bar:
        failed |= work(launcher, todo, Report(progress, bar, len(sweep.runs), done))
    return failed


def state_of(run: Run) -> tuple[str, str]:
    """``finished``, ``failed``, ``interrupted``, ``running`` (or killed) or ``new``; and the reason of a failure."""
    directory = RunDirectory(run.directory)
    if directory.finished:
        return "finished", ""
    found = directory.state
    return str(found.get("state", "new")), str(found.get("reason", ""))


class Report:
    """Says a line for each run that ends."""

    def __init__(self, progress: Progress, bar: Bar, total: int, done: int) -> None:
        self._progress, self._bar = progress, bar
        self._total, self._done = total, done

    def ended(self, run: Run, outcome: Outcome) -> None:
        """One run is done."""
        self._done += 1
        self._bar.advance(1)
        text = outcome.state if not outcome.reason else f"{outcome.state}: {outcome.reason}"
        if outcome.state == "finished":
            result = RunResult.load(run.directory)
            cost = RunDirectory(run.directory).state.get("cost") or {}
            accuracy = result.metrics.get("average_accuracy")
            shown = "-" if accuracy is None else f"{accuracy:.3f}"
            text = f"average accuracy {shown}, {cost.get('wall_seconds', 0):.0f} s"
        self._progress.say(f"[{self._done}/{self._total}] {run}: {text}")

    def waits(self, count: int) -> None:
        """Nothing is left but runs that others do."""
        self._progress.say(f"waiting for {count} runs that another process is doing")


def work(launcher: Launcher, runs: Sequence[Run], report: Report) -> dict[Run, str]:
    """Do runs; those that another process is doing are waited for, and done here when it gave up."""
    failed: dict[Run, str] = {}
    pending = list(runs)
    while pending:
        busy = []
        iterator = launcher.launch(pending)
        try:
            for run, outcome in iterator:
                if outcome.state == "busy":
                    busy.append(run)
                    continue
                if outcome.state == "interrupted":
                    raise KeyboardInterrupt
                if outcome.state == "failed":
                    failed[run] = outcome.reason
                    _mark_failed(run, outcome.reason)
                report.ended(run, outcome)
        finally:
            iterator.close()  # type: ignore[attr-defined]
        pending = busy
        if busy:
            report.waits(len(busy))
            _wait_for_one(busy)
            for run in busy:
                state, reason = state_of(run)
                if state == "failed":
                    failed[run] = reason
                    report.ended(run, Outcome("failed", reason))
            pending = [run for run in busy if run not in failed]
    return failed


def _wait_for_one(runs: Sequence[Run]) -> None:
    while True:
        for run in runs:
            with suppress(BusyError), RunDirectory(run.directory).locked():
                return
        time.sleep(_POLL_SECONDS)


def _mark_failed(run: Run, reason: str) -> None:
    """Write into the run's status what its process could not write, because it died."""
    directory = RunDirectory(run.directory)
    with suppress(ClkitError):  # a directory that can't be read or written is reported by its run
        found = directory.state
        if found.get("state") not in ("failed", "finished"):
            with directory.locked():
                kept = {k: v for k, v in found.items() if k not in ("state", "reason", "time")}
                directory.status("failed", reason=reason, **kept)


def write_manifest(sweep: Sweep, runs: Sequence[Run], hashes: Mapping[Run, str]) -> None:
    """Write ``sweep.json``: which runs the sweep is made of, and what it compares."""
    content = {
        "name": sweep.name,
        "metrics": sweep.options.metrics,
        "best": sweep.options.best,
        "runs": [
            {
                "setting": run.setting.name,
                "seed": run.seed,
                "strategy": run.config.strategy.name,
                "problem": problem_of(run.setting.values),
                "directory": run.directory.relative_to(sweep.directory).as_posix(),
                "values": dict(run.setting.values),
                "hash": hashes[run],
            }
            for run in runs
        ],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    # Two sweeps in one directory may write it at once; each writes it whole.
    replace_file(sweep.directory / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))


def problem_of(values: Mapping[str, Any]) -> str:
    """What is learned in a setting: its values in the sections that say so."""
    return ",".join(shown(k, v) for k, v in values.items() if k.partition(".")[0] in _PROBLEM)
