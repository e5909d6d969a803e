"""Text, classification and edit tasks from JSON-lines, JSON, CSV and parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from clkit.config import opt
from clkit.errors import Problem, did_you_mean
from clkit.tasks.assemble import RawTask, build_sequence, scored_tasks
from clkit.tasks.base import Task, TaskSequence
from clkit.tasks.readers import READERS, read_rows
from clkit.tasks.records import RecordsConfig, record_problems
from clkit.tasks.source import TaskSource

EVAL_NAMES = ("test", "eval", "dev", "valid", "validation")


@dataclass
class JsonlConfig(RecordsConfig):
    """One file or folder is one task (a single classification file is split by class)."""

    root: str = opt(".", "folder that the entries of tasks and holdout are relative to")
    tasks: list[str] = opt(
        [],
        "in the order of learning: files (.jsonl, .json, .csv, .parquet), or folders with a train file and a test "
        "(or eval, dev, valid) file",
    )
    holdout: list[str] = opt([], "files or folders that are scored after every task and never trained on")


@dataclass(frozen=True)
class _Files:
    """The files of one entry of ``tasks`` or ``holdout``."""

    name: str
    train: Path | None
    eval: Path | None


class JsonlSource(TaskSource):
    """Tasks from files; see :class:`clkit.tasks.records.RecordsConfig` for the columns."""

    config_class: ClassVar[type] = JsonlConfig

    @classmethod
    def check(cls, config: JsonlConfig) -> list[Problem]:
        """Files that are missing or of an unknown type, names used twice, options that exclude each other."""
        problems = record_problems(config, single=len(config.tasks) == 1)
        if not config.tasks:
            problems.append(Problem("tasks.tasks", "is empty; give at least one file or folder"))
        root = Path(config.root).expanduser()
        if not root.is_dir():
            near = _near(root)
            return [*problems, Problem("tasks.root", f"folder '{root}' does not exist.{near}")]
        found = [_find(root, entry, key, problems) for key in ("tasks", "holdout") for entry in getattr(config, key)]
        problems += _same_names(found, "tasks.tasks")
        if config.holdout and config.kind == "classification":
            problems.append(Problem("tasks.holdout", "works for kind text and edit, not classification"))
        return problems

    @classmethod
    def build(cls, config: JsonlConfig, seed: int) -> TaskSequence:
        """Read every file, then check every record.

        Raises:
            DataError: one error with all problems of all files.
        """
        problems: list[Problem] = []
        files: list[Path] = []
        root = Path(config.root).expanduser()

        def read(path: Path) -> list[Any]:
            files.append(path)
            return read_rows(path, problems)

        parts: dict[str, list[RawTask]] = {"tasks": [], "holdout": []}
        for key, raw in parts.items():
            for entry in getattr(config, key):
                found = _find(root, entry, key, problems)
                if found is None:
                    continue
                train = read(found.train) if found.train is not None and key == "tasks" else []
                eval = read(found.eval) if found.eval is not None else None
                if key == "holdout" and found.eval is None and found.train is not None:
                    eval = read(found.train)
                raw.append(RawTask(found.name, str(found.train or found.eval), train, eval))
        return build_sequence(parts["tasks"], parts["holdout"], config, seed, files, problems)


def to_score(entries: Sequence[str], metric: str, where: str) -> list[Task]:
    """Text tasks that are only scored: all records of a file, or those of a folder's test file.

    Args:
        entries: files or folders, as in ``tasks.holdout``.
        metric: their score, or ``auto``.
        where: how the entries are called in messages.

    Raises:
        DataError: with every problem of all files.
    """
    problems: list[Problem] = []
    found = [_find(Path(), entry, where, problems) for entry in entries]
    problems += _same_names(found, where)
    paths = {files.name: path for files in found if files is not None and (path := files.eval or files.train)}
    raw = [RawTask(name, str(path), [], read_rows(path, problems)) for name, path in paths.items()]
    return scored_tasks(raw, RecordsConfig(metric=metric), problems)


def _same_names(found: Sequence[_Files | None], where: str) -> list[Problem]:
    names = [files.name for files in found if files is not None]
    twice = sorted({n for n in names if names.count(n) > 1})
    return [Problem(where, f"two entries make a task named '{name}'; rename a file or folder") for name in twice]


def _find(root: Path, entry: str, key: str, problems: list[Problem]) -> _Files | None:
    """The files behind one entry; None after a problem was noted."""
    path = root / Path(entry).expanduser()
    where = key if key.startswith("-") else f"tasks.{key}"
    if path.is_dir():
        train = _part(path, ("train",), where, problems)
        eval = _part(path, EVAL_NAMES, where, problems)
        if key == "tasks" and train is None:
            problems.append(Problem(where, f"folder '{path}' has no train file (train{'|'.join(READERS)})"))
            return None
        if train is None and eval is None:
            problems.append(Problem(where, f"folder '{path}' has neither a test nor a train file"))
            return None
        return _Files(path.resolve().name, train, eval)
    if not path.is_file():
        problems.append(Problem(where, f"'{path}' does not exist.{_near(path)}"))
        return None
    if path.suffix.lower() not in READERS:
        problems.append(Problem(where, f"'{path}' has an unknown type (expected {', '.join(READERS)})"))
        return None
    return _Files(path.stem, path, None)


def _part(folder: Path, names: tuple[str, ...], where: str, problems: list[Problem]) -> Path | None:
    """The first of ``names`` that exists in a known format."""
    for name in names:
        found = [folder / f"{name}{suffix}" for suffix in READERS if (folder / f"{name}{suffix}").is_file()]
        if len(found) > 1:
            problems.append(Problem(where, f"'{folder}' has {' and '.join(p.name for p in found)}; keep one"))
        if found:
            return found[0]
    return None


def _near(path: Path) -> str:
    """The near name beside a path that does not exist."""
    if not path.parent.is_dir():
        return f" Nor does the folder '{path.parent}'."
    return did_you_mean(path.name, sorted(p.name for p in path.parent.iterdir()))
