"""clkit: continual learning, model editing and unlearning on one sequential-task trainer.

Nothing heavy is imported until it is used, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "fit": "clkit.api",
    "run": "clkit.api",
    "open_run": "clkit.api",
    "RunConfig": "clkit.config",
    "RunResult": "clkit.result",
    "SequentialTrainer": "clkit.trainer",
    "Strategy": "clkit.strategy",
    "Task": "clkit.tasks.base",
    "TaskSequence": "clkit.tasks.base",
    "Editor": "clkit.editing.editor",
    "EditRequest": "clkit.editing.request",
    "ClkitError": "clkit.errors",
}
_MODULES = ("analysis", "editing", "metrics", "models", "tasks")

__all__ = [
    "ClkitError",
    "EditRequest",
    "Editor",
    "RunConfig",
    "RunResult",
    "SequentialTrainer",
    "Strategy",
    "Task",
    "TaskSequence",
    "analysis",
    "editing",
    "fit",
    "metrics",
    "models",
    "open_run",
    "run",
    "tasks",
]

if TYPE_CHECKING:
    from clkit import analysis, editing, metrics, models, tasks
    from clkit.api import fit, open_run, run
    from clkit.config import RunConfig
    from clkit.editing.editor import Editor
    from clkit.editing.request import EditRequest
    from clkit.errors import ClkitError
    from clkit.result import RunResult
    from clkit.strategy import Strategy
    from clkit.tasks.base import Task, TaskSequence
    from clkit.trainer import SequentialTrainer


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"clkit.{name}")
    raise AttributeError(f"module 'clkit' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_MODULES])
