"""The request file: who asks that what be forgotten. Everything that is wrong with it is told at once.

JSON (one request, or a list) or JSON Lines. Error messages give positions, never contents: a request is personal data.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clkit.errors import Problem, RequestError, did_you_mean

SCHEMA = 1
SCOPES = ("record_ids", "subject_ids", "content_hashes", "predicate")
PREDICATE_FIELDS = ("id", "prompt", "answer", "target_new", "subject", "label")
_REQUIRED = ("schema", "request_id", "received_at", "requester", "legal_basis", "scope")
_OPTIONAL = ("unit", "deadline", "dry_run")
_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")


@dataclass(frozen=True)
class DeletionRequest:
    """One request.

    Attributes:
        where: its place in the file, for messages.
        request_id: the ticket.
        received_at: ISO 8601 with time zone.
        requester: a pseudonym; names and addresses are refused.
        legal_basis: free text, such as ``GDPR Art. 17(1)(b)``.
        scope: one of ``SCOPES``.
        values: what the scope lists; for a predicate the field and the text that it must equal.
        unit: ``subject`` takes all records of the subjects of what is selected.
        deadline: ISO date.
        dry_run: only say what would be done.
        digest: SHA-256 of the request.
    """

    where: str
    request_id: str
    received_at: str
    requester: str
    legal_basis: str
    scope: str
    values: tuple[str, ...]
    unit: str
    deadline: str | None
    dry_run: bool
    digest: str


def read_requests(path: Path) -> list[DeletionRequest]:
    """All requests of a file; they are served as one batch.

    Raises:
        RequestError: the file can't be read, or with every problem in it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: can't be read ({type(error).__name__})") from error
    problems: list[Problem] = []
    found = [_request(value, where, problems) for where, value in _objects(path, text, problems)]
    requests = [request for request in found if request is not None]
    ids = [request.request_id for request in requests]
    for position, request in enumerate(requests):
        if request.request_id in ids[:position]:
            problems.append(Problem(f"{request.where}.request_id", "is used twice in this file"))
    if not found and not problems:
        problems.append(Problem(str(path), "holds no request"))
    if len({request.dry_run for request in requests}) > 1:
        problems.append(Problem(str(path), "mixes dry_run true and false; a file is served as one batch"))
    if problems:
        raise RequestError.collect("The request file is not usable; nothing was done:", problems)
    return requests


class _RepeatedKeyError(Exception):
    """An object names a key twice."""


class _Object(dict[str, Any]):
    """A JSON object each key of which stands once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        if len(self) < len(pairs):
            raise _RepeatedKeyError


def _objects(path: Path, text: str, problems: list[Problem]) -> list[tuple[str, Any]]:
    many = path.suffix.lower() == ".jsonl"
    if many:
        lines = [(f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        lines = [(f"{path}", text)]
    found: list[tuple[str, Any]] = []
    for where, line in lines:
        try:
            value = json.loads(line, object_pairs_hook=_Object)
        except _RepeatedKeyError:
            problems.append(Problem(where, "has an object with the same key twice, of which one would be lost"))
            continue
        except (ValueError, RecursionError) as error:
            place = f"line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "it"
            problems.append(Problem(where, f"is not JSON ({place})"))
            continue
        if isinstance(value, list) and not many:
            found += [(f"{where}[{i}]", entry) for i, entry in enumerate(value)]
        else:
            found.append((where, value))
    return found


def _request(value: Any, where: str, problems: list[Problem]) -> DeletionRequest | None:
    before = len(problems)

    def wrong(key: str, what: str) -> None:
        problems.append(Problem(f"{where}.{key}" if key else where, what))

    if not isinstance(value, dict):
        wrong("", "is not an object")
        return None
    known = (*_REQUIRED, *_OPTIONAL)
    for position, key in enumerate(value):
        if key not in known:
            wrong(
                "", f"has an unknown key (number {position + 1}).{did_you_mean(key, known)} Known: {', '.join(known)}"
            )
    for key in _REQUIRED:
        if key not in value:
            wrong(key, "is missing")
    if value.get("schema", SCHEMA) != SCHEMA or isinstance(value.get("schema"), bool):
        wrong("schema", f"must be {SCHEMA}, the version that this clkit reads")
    for key in ("request_id", "requester"):
        if key in value and not (isinstance(value[key], str) and _REFERENCE.fullmatch(value[key])):
            wrong(key, "must be a reference of at most 64 letters, digits and . _ : - (no name, no address)")
    if "legal_basis" in value and not (_text(value["legal_basis"]) and value["legal_basis"].strip()):
        wrong("legal_basis", "must be a text of whole characters, such as 'GDPR Art. 17(1)(b)'")
    if "received_at" in value and not _is_time(value["received_at"]):
        wrong("received_at", "must be a time with its zone, such as 2026-03-01T09:00:00+00:00")
    if value.get("deadline") is not None and not _is_date(value["deadline"]):
        wrong("deadline", "must be a date, such as 2026-04-01")
    if value.get("unit", "record") not in ("record", "subject"):
        wrong("unit", "must be record or subject")
    if not isinstance(value.get("dry_run", False), bool):
        wrong("dry_run", "must be true or false")
    scope, values = _scope(value.get("scope"), f"{where}.scope", problems) if "scope" in value else ("", ())
    if len(problems) > before:
        return None
    digest = hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return DeletionRequest(
        where,
        value["request_id"],
        value["received_at"],
        value["requester"],
        value["legal_basis"],
        scope,
        values,
        value.get("unit", "record"),
        value.get("deadline"),
        value.get("dry_run", False),
        digest,
    )


def _scope(value: Any, where: str, problems: list[Problem]) -> tuple[str, tuple[str, ...]]:
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in SCOPES:
        problems.append(Problem(where, f"must be an object with exactly one of {', '.join(SCOPES)}"))
        return "", ()
    ((scope, content),) = value.items()
    if scope == "predicate":
        field = content.get("field") if isinstance(content, dict) else None
        if field not in PREDICATE_FIELDS or set(content) != {"field", "equals"} or not _text(content["equals"]):
            what = f"must have `field` (one of {', '.join(PREDICATE_FIELDS)}) and `equals` (a text), nothing else"
            problems.append(Problem(f"{where}.predicate", what))
            return "", ()
        return scope, (field, content["equals"])
    if not isinstance(content, list) or not content or not all(_text(entry) for entry in content):
        problems.append(Problem(f"{where}.{scope}", "must be a list of texts, of whole characters, with at least one"))
        return "", ()
    first: dict[str, int] = {}
    repeated = [i for i, entry in enumerate(content) if first.setdefault(entry, i) != i]
    problems += [Problem(f"{where}.{scope}[{i}]", "stands in the list twice") for i in repeated]
    if scope == "content_hashes":
        bad = [i for i, entry in enumerate(content) if not re.fullmatch(r"[0-9a-f]{64}", entry)]
        problems += [Problem(f"{where}.{scope}[{i}]", "is not a SHA-256 (64 hexadecimal digits)") for i in bad]
    return scope, tuple(content)


def _text(value: Any) -> bool:
    """Whether it is a text that a file can hold: JSON can name half of a surrogate pair, which is no character."""
    return isinstance(value, str) and bool(value) and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_time(value: Any) -> bool:
    try:
        return datetime.datetime.fromisoformat(f"{value}".replace("Z", "+00:00")).tzinfo is not None
    except ValueError:
        return False


def _is_date(value: Any) -> bool:
    try:
        return bool(datetime.date.fromisoformat(value))
    except (TypeError, ValueError):
        return False
