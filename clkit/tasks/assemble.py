"""From rows of several files to one sequence of tasks; used by every source whose data are records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from clkit.errors import DataError, Problem
from clkit.tasks.asd import diversify, given_explanations
from clkit.tasks.base import (
    EditExamples,
    EditRecord,
    Examples,
    Kind,
    LabelledExamples,
    Task,
    TaskSequence,
    TextExamples,
    TextRecord,
)
from clkit.tasks.readers import Row
from clkit.tasks.records import Ids, Parsed, RecordsConfig, RowParser, options_from_labels
from clkit.tasks.sampling import held_out, limited
from clkit.tasks.splits import Scenario, split_examples


@dataclass(frozen=True)
class RawTask:
    """The rows of one task. ``eval`` None: a part of ``train`` is held out. ``where`` is for error messages."""

    name: str
    where: str
    train: list[Row]
    eval: list[Row] | None = None


@dataclass(frozen=True)
class Named:
    """Inputs whose classes are still names; ``where`` each of them stands is for error messages."""

    inputs: Any
    labels: list[str]
    ids: list[str]
    where: list[str]

    def numbered(self, number: Mapping[str, int]) -> LabelledExamples:
        """The examples with class numbers."""
        labels = torch.tensor([number[name] for name in self.labels], dtype=torch.long)
        return LabelledExamples(self.inputs, labels, self.ids)


@dataclass(frozen=True)
class NamedTask:
    """A classification task whose classes are still names."""

    name: str
    train: Named
    eval: Named
    metadata: Mapping[str, Any]

    @property
    def labels(self) -> set[str]:
        """All its classes."""
        return {*self.train.labels, *self.eval.labels}


@dataclass
class _Draft:
    """A task whose rows were checked but which is not yet known to be good."""

    raw: RawTask
    train: list[Parsed]
    eval: list[Parsed]

    def metadata(self) -> dict[str, Any]:
        parts = (self.train, self.eval)
        seen = {p.content for p in self.train}
        repeated = sum(len(part) - len({p.content for p in part}) for part in parts)
        return {"duplicates": repeated, "overlap": sum(p.content in seen for p in self.eval)}


def build_sequence(
    tasks: Sequence[RawTask],
    holdout: Sequence[RawTask],
    config: RecordsConfig,
    seed: int,
    files: Sequence[Path],
    problems: list[Problem],
    class_names: Sequence[str] = (),
) -> TaskSequence:
    """Check all rows and build the sequence.

    A holdout task has its rows in ``eval`` and is scored as text or edits. Each task's metadata counts
    ``duplicates`` (records that say the same as one before in the same set) and ``overlap`` (evaluation records
    that say the same as a training record).

    Args:
        tasks: at least one.
        holdout: scored, never trained on.
        config: how rows are read and split.
        seed: for what is held out, for limits and for splits.
        files: what the rows were read from.
        problems: what went wrong before; whatever is found here is added.
        class_names: see :func:`classification_sequence`.

    Raises:
        DataError: there is any problem.
    """
    parser = RowParser(config, Ids(), problems)
    drafts = [_draft(raw, parser, config, seed) for raw in tasks]
    extra = [_draft(raw, parser, config, seed, holdout=True) for raw in holdout]
    if config.kind == "classification":
        named = [NamedTask(d.raw.name, _named(d.train), _named(d.eval), d.metadata()) for d in drafts]
        return classification_sequence(named, config, seed, files, problems, class_names)
    if problems:
        raise DataError.collect("The data are not usable:", problems)
    return TaskSequence(
        [_records_task(d, config, seed) for d in drafts], [_records_task(d, config, seed) for d in extra], files=files
    )


def scored_tasks(raw: Sequence[RawTask], config: RecordsConfig, problems: list[Problem]) -> list[Task]:
    """Tasks whose rows are in ``eval`` and are only scored; ids are unique within each of them.

    Raises:
        DataError: there is any problem.
    """
    drafts = [_draft(one, RowParser(config, Ids(), problems), config, 0, holdout=True) for one in raw]
    if problems:
        raise DataError.collect("The data are not usable:", problems)
    return [_records_task(draft, config, 0) for draft in drafts]


def _draft(raw: RawTask, parser: RowParser, config: RecordsConfig, seed: int, holdout: bool = False) -> _Draft:
    problems = parser.problems
    # Training ids are unique over the whole sequence, because `joint`, replay and unlearning mix the tasks.
    train = parser.parse(raw.train, "train")
    given_eval = None if raw.eval is None else parser.parse(raw.eval, f"eval of {raw.name}")
    if given_eval is not None:
        eval = given_eval
    elif config.kind == "edit":
        eval = train  # an edit that was never made can't be scored
    else:
        labels = [p.label for p in train]
        ids, contents = [p.record.id for p in train], [p.content for p in train]
        kept, out = held_out(ids, labels, config.eval_fraction, seed, contents)
        train, eval = [train[i] for i in kept], [train[i] for i in out]
    if config.kind == "text":
        train, eval = options_from_labels(config, (train, eval), problems)
    told = any(p.where.startswith(raw.where) for p in problems)
    if not (train and eval) and not holdout and not told:
        what = "no training records" if not train else "too few records to hold some out for evaluation"
        problems.append(Problem(raw.where, what))
    return _Draft(raw, train, eval)


def _records_task(draft: _Draft, config: RecordsConfig, seed: int) -> Task:
    """A text or edit task, cut to its limits."""
    metadata = draft.metadata()
    sets = []
    for parsed, limit, purpose in ((draft.train, config.train_limit, "train"), (draft.eval, config.eval_limit, "eval")):
        ids = [p.record.id for p in parsed]
        chosen = limited(ids, [0] * len(ids), limit, seed, f"limit {purpose}")
        sets.append([parsed[i].record for i in chosen])
    if config.kind == "edit" and draft.raw.eval is None:
        sets[1] = sets[0][: config.eval_limit or None]  # score only edits that are made
    if config.asd:
        texts = [r for r in sets[0] if isinstance(r, TextRecord)]
        explanations = {p.record.id: p.explanation for p in draft.train if p.explanation is not None}
        explain = given_explanations(explanations) if explanations else None
        converted, metadata["asd"] = diversify(texts, config.asd, seed, explain)
        sets[0] = [*converted]
    train, eval = (_examples(records, config.kind) for records in sets)
    metric = config.metric
    if metric == "auto":
        choice = config.kind == "text" and all(isinstance(r, TextRecord) and r.options for r in sets[1])
        metric = "edit-exact" if config.kind == "edit" else "option-loglik" if choice else "exact-match"
    return Task(draft.raw.name, train, eval, cast(Kind, config.kind), metric, metadata=metadata)


def _examples(records: list[TextRecord | EditRecord], kind: str) -> Examples:
    if kind == "edit":
        return EditExamples(tuple(r for r in records if isinstance(r, EditRecord)))
    return TextExamples(tuple(r for r in records if isinstance(r, TextRecord)))


def _named(parsed: Sequence[Parsed]) -> Named:
    return Named(
        tuple(p.record.prompt for p in parsed),
        [p.label for p in parsed],
        [p.record.id for p in parsed],
        [p.where for p in parsed],
    )


def classification_sequence(
    tasks: Sequence[NamedTask],
    config: RecordsConfig,
    seed: int,
    files: Sequence[Path],
    problems: list[Problem],
    class_names: Sequence[str] = (),
) -> TaskSequence:
    """Number the classes and build the sequence: several tasks as they are, a single one split by the options.

    Classes are numbered in the order of the tasks, within a task as the data set numbers them, else by name; whole
    numbers as names count as numbers, so that 10 comes after 9.

    Args:
        tasks: at least one.
        config: how they are split.
        seed: for limits and splits.
        files: what the examples were read from.
        problems: what went wrong before.
        class_names: the data set's classes in its own order, where it has one.

    Raises:
        DataError: there is any problem, a class is in two tasks (unless scenario is ``domain``), or the split does
            not fit the data.
    """
    if len(tasks) > 1 and config.scenario != "domain":
        _check_owners(tasks, problems)
    if problems:
        raise DataError.collect("The data are not usable:", problems)
    place = {name: k for k, name in reversed(list(enumerate(class_names)))}

    def rank(name: str) -> tuple[int, int, str]:
        return (0, place[name], name) if name in place else by_number(name)

    names: list[str] = []
    for task in tasks:
        names += sorted(task.labels - set(names), key=rank)
    number = {name: k for k, name in enumerate(names)}
    if len(tasks) == 1:
        train, eval = (part.numbered(number) for part in (tasks[0].train, tasks[0].eval))
        return split_examples(train, eval, names, config, seed, files, tasks[0].metadata)
    built = []
    for task in tasks:
        parts = []
        for part, limit, purpose in (
            (task.train, config.train_limit, "train_limit"),
            (task.eval, config.eval_limit, "eval_limit"),
        ):
            parts.append(part.numbered(number).subset(limited(part.ids, part.labels, limit, seed, purpose)))
        classes = tuple(sorted(number[name] for name in task.labels))
        metadata = {"class_names": [names[c] for c in classes], **task.metadata}
        built.append(Task(task.name, parts[0], parts[1], "classification", "accuracy", classes, metadata))
    return TaskSequence(built, scenario=cast(Scenario, config.scenario), files=files)


def by_number(name: str) -> tuple[int, int, str]:
    """What names are sorted by: whole numbers first, 10 after 9; then the others as text."""
    return (1, int(name), name) if name.removeprefix("-").isdecimal() else (2, 0, name)


def _check_owners(tasks: Sequence[NamedTask], problems: list[Problem]) -> None:
    """With new classes in each task, a class belongs to one task only; each further task is told once."""
    owner: dict[str, str] = {}
    told = set()
    for task in tasks:
        for part in (task.train, task.eval):
            for label, where in zip(part.labels, part.where, strict=True):
                first = owner.setdefault(label, task.name)
                if first != task.name and (label, task.name) not in told:
                    told.add((label, task.name))
                    what = f"class '{label}' is already in task '{first}'; merge them or set scenario: domain"
                    problems.append(Problem(where, what))
