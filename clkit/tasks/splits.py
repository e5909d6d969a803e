"""Cutting one labelled data set into a sequence of tasks: by class, or with all classes in every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from clkit.config import opt
from clkit.errors import DataError, Problem, did_you_mean
from clkit.tasks.base import LabelledExamples, Task, TaskSequence
from clkit.tasks.sampling import limited, ranked, stream
from clkit.tasks.transforms import permute_pixels, rotate

Scenario = Literal["class", "task", "domain"]


@dataclass
class SplitConfig:
    """How labelled examples become a sequence of tasks."""

    scenario: str = opt(
        "class",
        "class = new classes in each task, one label space; task = the same, the task is known at test; "
        "domain = all classes in each task",
        choices=("class", "task", "domain"),
    )
    classes_per_task: int = opt(2, "classes in each task; what remains makes a smaller last task", min=1)
    num_tasks: int = opt(0, "number of tasks, as even as possible; when above 0, classes_per_task is not used", min=0)
    class_order: list[Any] = opt([], "every class once, by name or number; empty = the data set's order, or order_seed")
    order_seed: int | None = opt(
        None, "shuffle the classes with numpy's RandomState of this seed", min=0, max=2**32 - 1
    )
    domain: str = opt(
        "shards",
        "what makes a task of scenario domain: shards = examples dealt out at random; permute = all examples, "
        "pixels permuted; rotate = all examples, rotated by task number x 180 / num_tasks degrees",
        choices=("shards", "permute", "rotate"),
    )
    train_limit: int = opt(0, "training examples per class; 0 = all", min=0)
    eval_limit: int = opt(0, "evaluation examples per class; 0 = all", min=0)


def class_order(num_classes: int, order_seed: int | None = None) -> list[int]:
    """Class numbers in the order of learning.

    The legacy generator is used on purpose: seed 1993 gives the order that the class-incremental literature uses.

    Example:
        >>> class_order(100, 1993)[:5]
        [68, 56, 78, 8, 23]
    """
    if order_seed is None:
        return list(range(num_classes))
    return [int(c) for c in np.random.RandomState(order_seed).permutation(num_classes)]


def split_problems(config: SplitConfig, class_names: Sequence[str] | None = None) -> list[Problem]:
    """What is wrong with the options; with the class names, also what does not fit this data set."""
    problems = []
    if config.class_order and config.order_seed is not None:
        problems.append(Problem("tasks.order_seed", "give class_order or order_seed, not both"))
    if config.scenario == "domain":
        if config.num_tasks == 0:
            problems.append(Problem("tasks.num_tasks", "scenario 'domain' needs the number of tasks (got 0)"))
        if config.class_order or config.order_seed is not None:
            key = "class_order" if config.class_order else "order_seed"
            problems.append(Problem(f"tasks.{key}", "has no meaning with scenario 'domain'; remove it"))
    elif config.domain != "shards":
        problems.append(Problem("tasks.domain", f"'{config.domain}' needs scenario 'domain' (got '{config.scenario}')"))
    if class_names is None:
        return problems
    if config.scenario != "domain" and config.num_tasks > len(class_names):
        what = f"more tasks than classes (got {config.num_tasks}, expected at most {len(class_names)})"
        problems.append(Problem("tasks.num_tasks", what))
    if config.class_order:
        problems += _order_problems(config.class_order, class_names)
    return problems


def _order_problems(order: Sequence[Any], class_names: Sequence[str]) -> list[Problem]:
    where = "tasks.class_order"
    problems = []
    seen: list[int] = []
    for given in map(str, order):
        number = _class_number(given, class_names)
        if number is None:
            problems.append(Problem(where, f"unknown class '{given}'.{did_you_mean(given, class_names)}"))
        elif number in seen:
            problems.append(Problem(where, f"class '{class_names[number]}' is listed twice"))
        else:
            seen.append(number)
    missing = [name for number, name in enumerate(class_names) if number not in seen]
    if missing and not problems:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        problems.append(Problem(where, f"{len(missing)} of {len(class_names)} classes are missing: {shown}"))
    return problems


def _class_number(given: str, class_names: Sequence[str]) -> int | None:
    if given in class_names:
        return class_names.index(given)
    if given.isdecimal() and int(given) < len(class_names):
        return int(given)
    return None


def split_examples(
    train: LabelledExamples,
    eval: LabelledExamples,
    class_names: Sequence[str],
    config: SplitConfig,
    seed: int,
    files: Sequence[Path] = (),
    metadata: Mapping[str, Any] | None = None,
) -> TaskSequence:
    """Cut a labelled data set into tasks named ``task-1``, ``task-2``, ...

    With scenarios ``class`` and ``task`` the classes are renumbered in the order of learning, so that a growing
    head only ever appends rows; ``metadata["source_classes"]`` has the data set's own numbers.

    Args:
        train: labels are indices into ``class_names``.
        eval: likewise.
        class_names: one name per class, in the data set's order.
        config: how to split.
        seed: for limits, shards and pixel permutations; the class order has its own ``order_seed``.
        files: what the examples were read from.
        metadata: put into every task.

    Raises:
        DataError: the options do not fit the data, or a class has no example in a task.
    """
    problems = split_problems(config, class_names)
    for part, examples in (("train", train), ("eval", eval)):
        present = set(examples.labels.tolist())
        problems += [
            Problem(f"class '{name}'", f"has no {part} example")
            for c, name in enumerate(class_names)
            if c not in present
        ]
    if problems:
        raise DataError.collect("The data can't be split into tasks:", problems)
    train = _limit(train, config.train_limit, seed, "train_limit")
    eval = _limit(eval, config.eval_limit, seed, "eval_limit")
    build = _by_domain if config.scenario == "domain" else _by_class
    tasks = build(train, eval, class_names, config, seed)
    tasks = [replace(task, metadata={**task.metadata, **(metadata or {})}) for task in tasks]
    return TaskSequence(tasks, scenario=cast(Scenario, config.scenario), files=files)


def _limit(examples: LabelledExamples, limit: int, seed: int, purpose: str) -> LabelledExamples:
    return examples.subset(limited(examples.ids, examples.labels.tolist(), limit, seed, purpose))


def _by_class(
    train: LabelledExamples, eval: LabelledExamples, class_names: Sequence[str], config: SplitConfig, seed: int
) -> list[Task]:
    if config.class_order:
        order = [cast(int, _class_number(str(given), class_names)) for given in config.class_order]
    else:
        order = class_order(len(class_names), config.order_seed)
    new_number = torch.empty(len(order), dtype=torch.long)
    new_number[torch.tensor(order)] = torch.arange(len(order))
    if config.num_tasks:
        groups = [g.tolist() for g in np.array_split(np.arange(len(order)), config.num_tasks)]
    else:
        step = config.classes_per_task
        groups = [list(range(i, min(i + step, len(order)))) for i in range(0, len(order), step)]
    tasks = []
    for number, group in enumerate(groups, start=1):
        parts = []
        for examples in (train, eval):
            labels = new_number[examples.labels]
            chosen = torch.isin(labels, torch.tensor(group)).nonzero().flatten().tolist()
            part = examples.subset(chosen)
            parts.append(LabelledExamples(part.inputs, labels[chosen], part.ids))
        source = [order[c] for c in group]
        metadata = {"class_names": [class_names[c] for c in source], "source_classes": source}
        tasks.append(_task(f"task-{number}", parts[0], parts[1], group, metadata))
    return tasks


def _by_domain(
    train: LabelledExamples, eval: LabelledExamples, class_names: Sequence[str], config: SplitConfig, seed: int
) -> list[Task]:
    count = config.num_tasks
    if config.domain == "shards":
        problems = [
            Problem(f"class '{name}'", f"has {size} {part} examples, fewer than the {count} tasks")
            for part, examples in (("train", train), ("eval", eval))
            for name, size in zip(class_names, examples.labels.bincount().tolist(), strict=True)
            if size < count
        ]
        if problems:
            raise DataError.collect("The data can't be split into tasks:", problems)
        shards = [_shards(train, "train", count, seed), _shards(eval, "eval", count, seed)]
        pairs = list(zip(*shards, strict=True))
    else:
        pairs = [(_transformed(train, k, config, seed), _transformed(eval, k, config, seed)) for k in range(count)]
    metadata = {"class_names": list(class_names), "source_classes": list(range(len(class_names)))}
    classes = range(len(class_names))
    return [_task(f"task-{k}", a, b, classes, metadata) for k, (a, b) in enumerate(pairs, start=1)]


def _task(
    name: str, train: LabelledExamples, eval: LabelledExamples, classes: Sequence[int], metadata: Mapping[str, Any]
) -> Task:
    return Task(name, train, eval, "classification", "accuracy", tuple(classes), metadata)


def _shards(examples: LabelledExamples, part: str, count: int, seed: int) -> list[LabelledExamples]:
    """Deal the examples out, class after class, so that sizes differ by at most one in total and per class."""
    labels = examples.labels.tolist()
    order = sorted(ranked(examples.ids, seed, f"shards {part}"), key=labels.__getitem__)
    return [examples.subset(sorted(order[k::count])) for k in range(count)]


def _transformed(examples: LabelledExamples, k: int, config: SplitConfig, seed: int) -> LabelledExamples:
    """All examples as task ``k`` sees them; the first task sees them unchanged."""
    if not isinstance(examples.inputs, Tensor):
        raise DataError(
            f"tasks.domain: '{config.domain}' works on images and vectors in memory, not on texts or image files"
        )
    if k == 0:
        return examples
    if config.domain == "permute":
        inputs = permute_pixels(examples.inputs, stream(seed, f"permute {k}"))
    else:
        inputs = rotate(examples.inputs, 180.0 * k / config.num_tasks)
    return LabelledExamples(inputs, examples.labels, [f"{i}@{config.domain}-{k + 1}" for i in examples.ids])
