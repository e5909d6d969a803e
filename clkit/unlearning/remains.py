"""What is left on disk after a request: the superseded run's weights, features of forgotten inputs, and other runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clkit import api
from clkit.cache import computed_root, holding, row_names
from clkit.errors import CheckpointError
from clkit.files import disk_errors
from clkit.rundir import RunDirectory
from clkit.tasks.base import LabelledExamples
from clkit.unlearning.case import Source
from clkit.unlearning.ledger import FOLDER, Ledger
from clkit.unlearning.records import Place
from clkit.unlearning.tombstones import Tombstones, known_to

_OF_RUN = ("checkpoints", "export", "samples.json", "report.html", "report_figures")  # weights, and what quotes records


@dataclass(frozen=True)
class Remains:
    """What is still there.

    Attributes:
        own: what the superseded run has of weights, and of records that are quoted.
        cached: files of the feature cache with rows of forgotten inputs.
        others: other runs that began before the records were forgotten; they may have learned them.
        top: the folder below which all of these were looked for.
    """

    own: list[Path]
    cached: list[Path]
    others: list[Path]
    top: Path


def find(source: Source, gone: Collection[Place], new_run: Path, ledger: Ledger) -> Remains:
    """Look for it.

    Args:
        source: the superseded run.
        gone: where in its data the forgotten records stand.
        new_run: the run without them, whose model says under which names features are kept.
        ledger: the ledger; all runs beside and below the superseded one are looked at, and all below the folder in
            which the ledger's is, to a depth of two where that is no folder above the run (``$CLKIT_LEDGER``).
    """
    own = [source.path / name for name in _OF_RUN if (source.path / name).exists()]
    if _quotes(events := source.path / "events.jsonl"):
        own.append(events)
    serial = max((serial for serial, _, _ in ledger.tombstones()), default=0)
    name = Tombstones(ledger.key).name
    top, beside = ledger.folder.parent.resolve(), source.path.resolve().parent
    runs = {*_runs(beside, 64), *_runs(top, 64 if ledger.folder.name == FOLDER and beside.is_relative_to(top) else 2)}
    others = []
    for run_dir in sorted(runs - {source.path.resolve(), new_run.resolve()}):
        try:
            facts = RunDirectory(run_dir).read("run.json")
        except CheckpointError:
            facts = None  # damaged: it may have learned anything
        if not isinstance(facts, dict) or known_to(facts, name, nearest=True) < serial:
            others.append(run_dir)
    return Remains(own, _cached(source, gone, new_run), others, top if beside.is_relative_to(top) else beside)


def _quotes(events: Path) -> bool:
    """Whether a run's events quote records: each edit that it learned, or ids of those whose loss was not finite."""
    if not events.is_file():
        return False
    kinds = tuple(f'{{"event": "{kind}"' for kind in ("edit", "edits", "not_finite"))
    with events.open(encoding="utf-8", errors="replace") as file:
        return any(line.startswith(kinds) for line in file)


def _runs(top: Path, depth: int) -> Iterator[Path]:
    """The run directories below a folder; there is no other within one."""
    seen: set[Path] = set()
    for folder, inner, files in os.walk(top, followlinks=True):
        path = Path(folder)
        if "run.json" in files or len(path.relative_to(top).parts) >= depth or path.resolve() in seen:
            inner.clear()
        seen.add(path.resolve())
        inner[:] = [name for name in inner if not name.startswith(".")]
        if "run.json" in files and path != top:
            yield path.resolve()


def _cached(source: Source, gone: Collection[Place], new_run: Path) -> list[Path]:
    root = computed_root()
    if not any(root.glob("*/*.safetensors")):
        return []
    parts = []
    for task in (*source.tasks, *source.tasks.holdout):
        for part in ("train", "eval"):
            rows = sorted(p.position for p in gone if (p.task, p.part) == (task.name, part))
            if rows:
                examples = getattr(task, part).subset(rows)
                if isinstance(examples, LabelledExamples):  # names know no class, and the new network may lack theirs
                    examples = LabelledExamples(examples.inputs, torch.zeros_like(examples.labels), examples.ids)
                parts.append(examples)
    with api.open_run(new_run) as trainer:
        names = {name for examples in parts for name in row_names(trainer.model.encode(examples))}
    return holding(root, names)


def summary(remains: Remains, run_dir: Path) -> dict[str, Any]:
    """For the certificate: names within the superseded run and within the cache, and how many other runs there are."""
    return {
        "still_there": [path.relative_to(run_dir).as_posix() for path in remains.own],
        "cached_features": [path.relative_to(computed_root()).as_posix() for path in remains.cached],
        "other_runs_begun_before": [os.path.relpath(path, remains.top) for path in remains.others],
    }


def purge(remains: Remains, say: Callable[[str], None]) -> None:
    """Delete the superseded run's weights and quotations, and the cached features; other runs are only named."""
    for path in (*remains.own, *remains.cached):
        with disk_errors(path):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        say(f"deleted {path}")
    for path in remains.others:
        say(f"left: {path} began before these records were forgotten, and may have learned them")
