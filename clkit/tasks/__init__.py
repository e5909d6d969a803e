"""Tasks and where they come from; importing this package does not import torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clkit.errors import ConfigError, Problem
from clkit.registry import Registry

if TYPE_CHECKING:
    from clkit.tasks.base import (
        EditExamples,
        EditRecord,
        LabelledExamples,
        Task,
        TaskSequence,
        TextExamples,
        TextRecord,
    )
    from clkit.tasks.source import TaskSource

__all__ = [
    "SOURCES",
    "EditExamples",
    "EditRecord",
    "LabelledExamples",
    "Task",
    "TaskSequence",
    "TaskSource",
    "TextExamples",
    "TextRecord",
    "build_tasks",
]

SOURCES: Registry[type[TaskSource]] = Registry("task source", "clkit.tasks")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "source" if name == "TaskSource" else "base"
    return getattr(importlib.import_module(f"clkit.tasks.{module}"), name)


def build_tasks(source: str, config: Any = None, seed: int = 0) -> TaskSequence:
    """Check a source's options and build its tasks.

    Args:
        source: a name from ``clkit ls tasks``.
        config: an instance of the source's ``config_class``, its options as a mapping, or None for the defaults.
        seed: decides every random choice (subsets, splits, invented facts).

    Raises:
        ConfigError: the source or an option is unknown or wrong; nothing was read.
        DataError: the data are missing or malformed.

    Example:
        >>> tasks = build_tasks("digits", {"classes_per_task": 5}, seed=0)
        >>> [task.classes for task in tasks]
        [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
    """
    found = SOURCES.get(source)
    problems: list[Problem] = []
    if config is None or isinstance(config, Mapping):
        from clkit import resolve

        config = resolve._fill(found.config_class, config or {}, "tasks.", problems)
    if not problems:
        problems = found.check(config)
    if problems:
        raise ConfigError.collect(f"The options of the task source '{source}' are wrong:", problems)
    return found.build(config, seed)
