"""Edit requests: what a user wants changed, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clkit.errors import Problem, RequestError, did_you_mean

if TYPE_CHECKING:
    from clkit.tasks.base import EditRecord


@dataclass(frozen=True)
class EditRequest:
    """A fact to change.

    Attributes:
        prompt: is to be answered by
        target_new: this text.
        rephrase_prompt: the prompt in other words; scored, not learned from.
        locality_prompt: a prompt that must stay as it is; learned from and scored.
        locality_answer: its answer.
        subject: what the fact is about.
        id: a name of its own; by default it is made from prompt and target.
    """

    prompt: str
    target_new: str
    rephrase_prompt: str | None = None
    locality_prompt: str | None = None
    locality_answer: str | None = None
    subject: str | None = None
    id: str | None = None

    def record(self) -> EditRecord:
        """The same with an id."""
        from clkit.tasks.base import EditRecord, content_id

        given = self.id or content_id({"prompt": self.prompt, "target_new": self.target_new})
        return EditRecord(**{**dataclasses.asdict(self), "id": given})


_FIELDS = tuple(field.name for field in dataclasses.fields(EditRequest))


def checked(requests: Iterable[EditRequest | Mapping[str, Any]]) -> list[EditRecord]:
    """Records of requests given in Python.

    Raises:
        RequestError: with everything that is wrong with any of them.
    """
    problems: list[Problem] = []
    made: list[EditRequest] = []
    for i, given in enumerate(requests):
        where = f"request {i + 1}"
        content = dataclasses.asdict(given) if isinstance(given, EditRequest) else given
        if not isinstance(content, Mapping):
            problems.append(Problem(where, f"got {type(given).__name__}, expected an EditRequest or a mapping"))
            continue
        before = len(problems)
        for key in sorted(set(content) - set(_FIELDS)):
            problems.append(Problem(where, f"unknown field '{key}'.{did_you_mean(key, _FIELDS)}"))
        for key in _FIELDS:
            value, needed = content.get(key), key in ("prompt", "target_new")
            if value is None and needed:
                problems.append(Problem(where, f"'{key}' is missing"))
            elif value is not None and (not isinstance(value, str) or not value.strip()):
                problems.append(Problem(where, f"'{key}' must be text that is not empty (got {value!r})"))
            elif value is not None and any("\ud800" <= c <= "\udfff" for c in value):
                problems.append(Problem(where, f"'{key}' has half of a surrogate pair, which is not a character"))
        if len(problems) == before:
            made.append(EditRequest(**content))
    if problems:
        raise RequestError.collect("Some edit requests are malformed; nothing was edited:", problems)
    return [request.record() for request in made]


def read_requests(path: str | Path) -> list[EditRecord]:
    """Read edit requests from a JSONL, JSON, CSV or parquet file.

    Raises:
        RequestError: with every line that is malformed.
    """
    from clkit.tasks.base import EditRecord
    from clkit.tasks.readers import READERS, read_rows
    from clkit.tasks.records import Ids, RecordsConfig, RowParser

    problems: list[Problem] = []
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path}: there is no such file of edit requests")
    if path.suffix.lower() not in READERS:
        raise RequestError(f"{path}: edit requests are read from {', '.join(READERS)} (got '{path.suffix}')")
    parser = RowParser(RecordsConfig(kind="edit"), Ids(), problems)
    parsed = parser.parse(read_rows(path, problems), "requests")
    if problems:
        raise RequestError.collect(f"Some edit requests in {path} are malformed; nothing was edited:", problems)
    return [p.record for p in parsed if isinstance(p.record, EditRecord)]


def conflicts(records: Sequence[EditRecord], active: Iterable[EditRecord]) -> list[tuple[EditRecord, EditRecord]]:
    """Pairs (earlier, later) that ask for different answers to the same prompt."""
    latest = {asked(record): record for record in active}
    found = []
    for record in records:
        earlier = latest.get(asked(record))
        if earlier is not None and earlier.target_new != record.target_new:
            found.append((earlier, record))
        latest[asked(record)] = record
    return found


def replaced(record: EditRecord, active: Iterable[EditRecord]) -> list[EditRecord]:
    """Those of ``active`` that give another answer to the prompt of ``record``."""
    key = asked(record)
    return [other for other in active if other.target_new != record.target_new and asked(other) == key]


def lasting(records: Sequence[EditRecord]) -> list[EditRecord]:
    """The records that give the last of several answers to their prompt."""
    last = {asked(record): record.target_new for record in records}
    return [record for record in records if record.target_new == last[asked(record)]]


def asked(record: EditRecord) -> str:
    """Its prompt, by which edits are compared."""
    return " ".join(record.prompt.split())
