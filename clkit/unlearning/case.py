"""What a method is given: the run that learned the records, and which of them must go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clkit import build, resolve
from clkit.config import RunConfig
from clkit.errors import RequestError
from clkit.provenance import collect
from clkit.rundir import RunDirectory
from clkit.tasks.base import TaskSequence
from clkit.unlearning.records import Place, Record, records
from clkit.unlearning.tombstones import in_force


@dataclass(frozen=True)
class Source:
    """The run that learned what shall be forgotten, with its data as it saw them."""

    path: Path
    config: RunConfig
    tasks: TaskSequence
    facts: dict[str, Any]
    known: list[Record]


@dataclass(frozen=True)
class Case:
    """One batch of requests on one run, as a method sees it.

    Attributes:
        source: the run, and its data as it saw them.
        gone: where in them the records stand that must be out, those of earlier requests included.
        retained: the data without them.
    """

    source: Source
    gone: frozenset[Place]
    retained: TaskSequence

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        return self.source.config

    def training_places(self) -> list[Place]:
        """Where the forgotten records stand that were trained on, in the order of the data."""
        learned = [task.name for task in self.source.tasks]
        found = [p for p in self.gone if p.part == "train" and p.task in learned]
        return sorted(found, key=lambda p: (learned.index(p.task), p.position))


def open_source(run_dir: Path) -> Source:
    """Read a finished run's configuration and data.

    Raises:
        RequestError: there is no finished run, or its data files have changed since.
    """
    if run_dir.is_symlink():  # ledger and new run belong beside the run, not beside a link to it
        run_dir = run_dir.resolve()
    directory = RunDirectory(run_dir)
    if not (run_dir / "config.yaml").is_file() or not directory.finished:
        raise RequestError(f"{run_dir}: no finished run here. Give the output_dir of a run that is finished.")
    facts = directory.read("run.json") or {}
    if "python" in (facts.get("tasks_from"), facts.get("model_from")):
        raise RequestError(f"{run_dir}: its tasks or model were made in Python, so it can't be trained again from here")
    if facts.get("strategy_from") == "python":
        raise RequestError(f"{run_dir}: began with the weights of another run; give the run that began without any")
    config = resolve.load(run_dir / "config.yaml")
    tasks = in_force(run_dir, facts).apply(build.make_tasks(config))
    now = collect(tasks)
    if now["data"] != facts.get("data"):
        files = [name for name, sha256 in now["files"].items() if facts.get("files", {}).get(name) != sha256]
        raise RequestError(
            f"{run_dir}: its data have changed since it was trained ({', '.join(files) or 'not in a file'}), so it is "
            "not certain what it learned. Restore them, serve the request, and delete from the files after that."
        )
    return Source(run_dir, config, tasks, facts, list(records(tasks)))
