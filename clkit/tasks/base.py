"""Tasks, sequences of tasks, and the records they are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from clkit.errors import DataError, Problem

Kind = Literal["classification", "text", "edit"]


def content_id(content: Mapping[str, Any] | str | bytes) -> str:
    """The stable id of a record without one: SHA-256 of its canonical JSON (sorted keys) or bytes, 16 hex digits."""
    if isinstance(content, bytes):
        raw = content
    elif isinstance(content, str):
        raw = content.encode()
    else:
        raw = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    return hashlib.sha256(raw).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class TextRecord:
    """A prompt and its answer. ``options``: the answers to choose from; ``label``: the class of the answer."""

    prompt: str
    answer: str
    id: str
    options: tuple[str, ...] | None = None
    subject: str | None = None
    label: str | None = None


@dataclass(frozen=True, slots=True)
class EditRecord:
    """A fact to change: ``prompt`` shall be answered by ``target_new``; the locality answer shall stay."""

    prompt: str
    target_new: str
    id: str
    rephrase_prompt: str | None = None
    locality_prompt: str | None = None
    locality_answer: str | None = None
    subject: str | None = None


class Inputs(Protocol):
    """What a classifier reads: indexable by a LongTensor, giving a batch. A Tensor is one; files can be another."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """The inputs at ``indices``, as one batch."""

    def subset(self, indices: Tensor, /) -> Inputs:
        """Only the inputs at ``indices``."""


class Examples(Protocol):
    """A set of records that never changes; ``ids`` are unique and stable from run to run."""

    @property
    def ids(self) -> Sequence[str]:
        """The id of each record."""

    def __len__(self) -> int:
        """How many there are."""

    def subset(self, indices: Sequence[int]) -> Examples:
        """Only the records at ``indices``."""

    def fingerprint(self) -> str:
        """A hash of everything in them, in order."""


@dataclass(frozen=True)
class TextExamples:
    """Text records (language-model tasks)."""

    records: tuple[TextRecord, ...]

    @property
    def ids(self) -> Sequence[str]:
        """The id of each record."""
        return [r.id for r in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def subset(self, indices: Sequence[int]) -> TextExamples:
        """Only the records at ``indices``."""
        return TextExamples(tuple(self.records[i] for i in indices))

    def fingerprint(self) -> str:
        """SHA-256 over all records in order."""
        return _fingerprint(
            json.dumps([r.id, r.prompt, r.answer, r.options, r.subject, r.label], ensure_ascii=False)
            for r in self.records
        )


@dataclass(frozen=True)
class EditExamples:
    """Edit records."""

    records: tuple[EditRecord, ...]

    @property
    def ids(self) -> Sequence[str]:
        """The id of each record."""
        return [r.id for r in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def subset(self, indices: Sequence[int]) -> EditExamples:
        """Only the records at ``indices``."""
        return EditExamples(tuple(self.records[i] for i in indices))

    def fingerprint(self) -> str:
        """SHA-256 over all records in order."""
        return _fingerprint(
            json.dumps([getattr(r, k) for k in EditRecord.__slots__], ensure_ascii=False) for r in self.records
        )


@dataclass(frozen=True)
class LabelledExamples:
    """Inputs with class labels.

    Attributes:
        inputs: a Tensor (N, ...) - float, or uint8 images (N, C, H, W) -, a tuple of N strings, or lazy ``Inputs``.
        labels: LongTensor (N,), the global class index (the same class has the same number in every task).
        ids: N stable ids.
    """

    inputs: Tensor | tuple[str, ...] | Inputs
    labels: Tensor
    ids: Sequence[str]

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, indices: Sequence[int]) -> LabelledExamples:
        """Only the records at ``indices``."""
        index = torch.as_tensor(list(indices), dtype=torch.long)
        if isinstance(self.inputs, tuple):
            inputs: Any = tuple(self.inputs[i] for i in index.tolist())
        elif isinstance(self.inputs, Tensor):
            inputs = self.inputs[index]
        else:
            inputs = self.inputs.subset(index)
        return LabelledExamples(inputs, self.labels[index], [self.ids[i] for i in index.tolist()])

    def fingerprint(self) -> str:
        """SHA-256 over ids, labels and (where they are in memory) inputs."""
        digest = hashlib.sha256(json.dumps([list(self.ids), self.labels.tolist()]).encode())
        if isinstance(self.inputs, tuple):
            digest.update(json.dumps(self.inputs, ensure_ascii=False).encode())
        elif isinstance(self.inputs, Tensor):
            digest.update(self.inputs.contiguous().numpy().tobytes())
        return digest.hexdigest()


def _fingerprint(lines: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode())
        digest.update(b"\n")
    return digest.hexdigest()


@dataclass(frozen=True)
class Task:
    """One element of a sequence: what is trained on, what is scored, and how.

    Attributes:
        name: unique within the sequence.
        train: training examples (may be empty for a holdout task).
        eval: examples that are scored, never trained on.
        kind: ``classification`` (LabelledExamples), ``text`` (TextExamples) or ``edit`` (EditExamples).
        metric: the name of the score that fills the matrix R (see ``clkit ls metrics``).
        classes: the classes of this task, for classification.
        metadata: free JSON; reports use ``class_names`` (in the order of ``classes``, or by number), and
            ``image_shape`` (C, H, W) where vectors are images.
    """

    name: str
    train: Examples
    eval: Examples
    kind: Kind
    metric: str
    classes: tuple[int, ...] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


class TaskSequence(Sequence[Task]):
    """Tasks in the order they are learned, and ``holdout`` tasks that are scored but never learned.

    Args:
        tasks: at least one task.
        holdout: scored after every task (general ability).
        scenario: ``class`` (one label space that grows), ``task`` (the task is known at test) or ``domain``.
        files: data files behind the tasks, hashed into the run directory.

    Raises:
        DataError: no task, a name twice, or (class-incremental) a class in two tasks.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        holdout: Sequence[Task] = (),
        scenario: Literal["class", "task", "domain"] = "domain",
        files: Sequence[Path] = (),
    ) -> None:
        self.tasks = tuple(tasks)
        self.holdout = tuple(holdout)
        self.scenario = scenario
        self.files = tuple(files)
        problems = []
        if not self.tasks:
            problems.append(Problem("tasks", "the sequence is empty; give at least one task"))
        names = [t.name for t in (*self.tasks, *self.holdout)]
        problems += [
            Problem("tasks", f"name '{n}' is used twice") for n in sorted({n for n in names if names.count(n) > 1})
        ]
        if scenario in ("class", "task"):
            owner: dict[int, str] = {}
            for task in self.tasks:
                for c in task.classes or ():
                    if c in owner:
                        problems.append(Problem(f"task '{task.name}'", f"class {c} is already in task '{owner[c]}'"))
                    owner.setdefault(c, task.name)
        if problems:
            raise DataError.collect("The task sequence is not usable:", problems)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: Any) -> Any:
        return self.tasks[index]

    @property
    def num_classes(self) -> int | None:
        """Size of the label space over all tasks (largest class index + 1); None without classes.

        A task that does not name its classes has those of its labels.
        """
        found = [c for t in self.tasks for c in t.classes or _largest_label(t)]
        return max(found) + 1 if found else None


def _largest_label(task: Task) -> list[int]:
    """That of a classification task, or nothing."""
    parts = [part for part in (task.train, task.eval) if isinstance(part, LabelledExamples) and len(part)]
    return [max(int(part.labels.max()) for part in parts)] if parts else []
