"""The records of a task sequence one by one: what a request selects of them, and the sequence without some."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch

from clkit.errors import Problem, RequestError
from clkit.tasks.base import EditExamples, Examples, LabelledExamples, Task, TaskSequence, TextExamples
from clkit.unlearning.request import DeletionRequest


class Place(NamedTuple):
    """Where a record stands: task, ``train`` or ``eval``, position."""

    task: str
    part: str
    position: int


class Record(NamedTuple):
    """One record.

    Attributes:
        place: where it stands.
        id: its id.
        content: SHA-256 of what it says (``content_hash``).
        fields: its texts by name; empty for what is not text.
    """

    place: Place
    id: str
    content: str
    fields: dict[str, str]

    @property
    def text(self) -> str:
        """What it says, for comparison."""
        return " ".join(self.fields[k] for k in ("prompt", "answer", "target_new") if k in self.fields)


def content_hash(**texts: str) -> str:
    """The SHA-256 by which a request names a record's content: of sorted-key JSON, NFC, white space made single.

    Args:
        **texts: ``prompt`` and ``answer``; ``prompt`` and ``target_new`` of an edit; ``prompt`` alone of a text to
            classify.

    >>> content_hash(prompt="Who?", answer="Ada") == content_hash(answer=" Ada ", prompt="Who?")
    True
    """
    plain = {key: spelled(text) for key, text in texts.items()}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def spelled(text: str) -> str:
    """A text as it is compared: NFC, white space made single.

    >>> spelled(" Zoe\\u0308  Quill") == spelled("Zo\\u00eb Quill")
    True
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def records(tasks: TaskSequence) -> Iterator[Record]:
    """Every record of a sequence, holdout tasks included, in order."""
    for task in (*tasks, *tasks.holdout):
        yield from task_records(task, "train")
        yield from task_records(task, "eval")


def task_records(task: Task, part: Literal["train", "eval"]) -> Iterator[Record]:
    """Every record of one part of a task, in order."""
    examples: Examples = getattr(task, part)
    styled = task.metadata.get("asd", {}) if part == "train" else {}
    for index, given in enumerate(examples.ids):
        record_id = styled[given]["source_id"] if given in styled else given
        fields = _fields(examples, index)
        said = {k: fields[k] for k in ("prompt", "answer", "target_new") if k in fields}
        content = content_hash(**said) if said else _input_hash(examples, index)
        yield Record(Place(task.name, part, index), record_id, content, {"id": record_id, **fields})


def _fields(examples: Examples, index: int) -> dict[str, str]:
    if isinstance(examples, TextExamples | EditExamples):
        record = examples.records[index]
        names = ("prompt", "answer", "target_new", "subject", "label")
        return {k: v for k in names if isinstance(v := getattr(record, k, None), str)}
    if isinstance(examples, LabelledExamples) and isinstance(examples.inputs, tuple):
        return {"prompt": examples.inputs[index]}
    return {}


def _input_hash(examples: Examples, index: int) -> str:
    if not isinstance(examples, LabelledExamples):
        return examples.subset([index]).fingerprint()
    inputs: Any = examples.inputs
    row = inputs[torch.tensor([index])].contiguous()
    return hashlib.sha256(f"{row.dtype}{tuple(row.shape)}".encode() + row.numpy().tobytes()).hexdigest()


def select(requests: Sequence[DeletionRequest], known: Sequence[Record]) -> dict[str, set[Place]]:
    """The places that each request selects, by request id.

    Raises:
        RequestError: with every unknown id, empty selection and request for a subject where records have none; a
            request whose records were only scored; or the requests together leave nothing to train on.
    """
    problems: list[Problem] = []
    chosen: dict[str, set[Place]] = {}
    for request in requests:
        found = _matching(request, known, problems)
        if request.unit == "subject" and request.scope != "subject_ids":
            subjects = {_said(r, "subject") for r in found}
            if None in subjects:
                problems.append(Problem(f"{request.where}.unit", "is subject, and a selected record has no subject"))
            found = [r for r in known if _said(r, "subject") in subjects - {None}]
        chosen[request.request_id] = {r.place for r in found}
        if found and not any(r.place.part == "train" for r in found):
            what = "selects only records that were scored, never trained on; delete them from their file"
            problems.append(Problem(f"{request.where}.scope", what))
    everything = {r.place for r in known if r.place.part == "train"}
    if everything and everything <= set().union(*chosen.values()):
        problems.append(Problem("", "the requests select every training record; delete the run instead"))
    if problems:
        raise RequestError.collect("The requests can't be served on this data:", problems)
    return chosen


def _matching(request: DeletionRequest, known: Sequence[Record], problems: list[Problem]) -> list[Record]:
    if request.scope == "predicate":
        field, wanted = request.values
        found = [r for r in known if _said(r, field) == (wanted if field == "id" else spelled(wanted))]
        if not found:
            problems.append(Problem(f"{request.where}.scope.predicate", "selects no record"))
        return found

    def name(record: Record) -> str | None:
        return {
            "record_ids": record.id,
            "subject_ids": _said(record, "subject"),
            "content_hashes": record.content,
        }[request.scope]

    def plain(value: str) -> str:
        return spelled(value) if request.scope == "subject_ids" else value

    there = {name(r) for r in known}
    for position, value in enumerate(request.values):
        if plain(value) not in there:
            problems.append(Problem(f"{request.where}.scope.{request.scope}[{position}]", "is not in the run's data"))
    wanted_values = set(map(plain, request.values))
    return [r for r in known if name(r) in wanted_values]


def _said(record: Record, field: str) -> str | None:
    """One of its texts, as texts are compared; an id is what it is."""
    text = record.fields.get(field)
    return text if text is None or field == "id" else spelled(text)


def without(tasks: TaskSequence, places: Collection[Place]) -> TaskSequence:
    """The sequence without some records; a task with no training record left is gone.

    Raises:
        RequestError: a task could be trained but no longer scored; or answers of one record stand in others (``asd``),
            so that leaving a record out does not leave out what it says.
    """
    if not places:
        return tasks
    gone = set(places)
    problems: list[Problem] = []

    def rest(task: Task, part: str) -> Examples:
        examples: Examples = getattr(task, part)
        kept = [i for i in range(len(examples)) if Place(task.name, part, i) not in gone]
        return examples if len(kept) == len(examples) else examples.subset(kept)

    def cut(task: Task, trained: bool) -> Task | None:
        left = dataclasses.replace(task, train=rest(task, "train"), eval=rest(task, "eval"))
        if not len(left.train if trained else left.eval):
            return None
        if trained and len(task.eval) and not len(left.eval):
            what = "would have no record left to score it with; give it more evaluation records"
            problems.append(Problem(f"task '{task.name}'", what))
        if task.metadata.get("asd"):
            what = "tasks.asd put other records' answers among its options, so nothing can be left out; set it to 0"
            problems.append(Problem(f"task '{task.name}'", what))
        return left

    kept = [cut(task, True) for task in tasks]
    holdout = [cut(task, False) for task in tasks.holdout]
    if problems:
        raise RequestError.collect("Records can't be left out of this sequence:", problems)
    return TaskSequence(
        [task for task in kept if task], [task for task in holdout if task], tasks.scenario, tasks.files
    )
