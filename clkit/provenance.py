"""What a run was made of: package versions, git revision, platform, hashes of the data."""

from __future__ import annotations

import platform
import subprocess
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from clkit.files import file_sha256
from clkit.tasks.base import Task, TaskSequence

_PACKAGES = (
    "clkit",
    "torch",
    "transformers",
    "peft",
    "numpy",
    "safetensors",
    "tokenizers",
    "avalanche-lib",
    "opacus",
    "deepspeed",
)


def collect(tasks: TaskSequence) -> dict[str, Any]:
    """JSON for ``run.json``; ``data`` identifies every example, ``files`` the files they came from.

    ``answer_styles`` counts the training records of each task that were converted into each style, where any were.
    """
    styles = {t.name: dict(Counter(r["style"] for r in answer_styles([t]))) for t in tasks if t.metadata.get("asd")}
    return {
        "versions": {"python": platform.python_version(), **{p: v for p in _PACKAGES if (v := _version(p))}},
        "platform": platform.platform(),
        "git": git_revision(Path.cwd()),
        "data": fingerprints(tasks),
        "files": {str(f): file_sha256(f) for f in tasks.files},
        **({"answer_styles": styles} if styles else {}),
    }


def fingerprints(tasks: TaskSequence) -> dict[str, dict[str, str]]:
    """Hashes of the training and the evaluation examples of every task."""
    return {t.name: {"train": t.train.fingerprint(), "eval": t.eval.fingerprint()} for t in (*tasks, *tasks.holdout)}


def answer_styles(tasks: Iterable[Task]) -> list[dict[str, str]]:
    """``task``, ``id``, ``style`` and ``source_id`` of every training record that `tasks.asd` converted."""
    return [
        {"task": task.name, "id": id, **origin} for task in tasks for id, origin in task.metadata.get("asd", {}).items()
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision(folder: Path) -> str | None:
    """The commit of the user's working directory, with ``-dirty`` when files differ; None outside git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
