"""Tasks whose training records were rewritten, on disk with what was claimed of them: data for a protected base."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from clkit.errors import CapabilityError
from clkit.files import file_sha256, write_json, write_text
from clkit.strategies.dp2unlearning.rewrite import Claim, Rewriter
from clkit.tasks.base import Task, TaskSequence, TextExamples, TextRecord

NAME = "rewriting.json"
_NOTHING = "."
_ADJACENT = (
    "a record's text replaced by another{same}; that the record was there, its id and its subject are not hidden"
)


def write_tasks(tasks: TaskSequence, folder: Path | str, rewriter: Rewriter) -> Claim:
    """Write every text task into ``folder/<task>``: training records rewritten, evaluation records as they are.

    Of a training record only id, subject, prompt and answer are written: options and labels could say again what the
    words said. ``folder/rewriting.json`` has the claim, the tokens drawn for each record, and the files' hashes.

    A file's ids are unique among all files, so an evaluation record that says what a training record says gets none.

    Raises:
        CapabilityError: a task is not of text records.
    """
    folder = Path(folder)
    taken = {record.id for task in tasks for record in _records(task)[0]}
    files: dict[str, str] = {}
    tokens: dict[str, int] = {}
    for task in tasks:
        train, evaluated = _records(task)
        rows = []
        for record in train:
            before = len(rewriter.claim.tokens)
            prompt, answer = rewriter.rewrite_all([record.prompt, record.answer])
            tokens[record.id] = sum(rewriter.claim.tokens[before:])
            # Both texts belong to one record, and so does what they cost.
            rewriter.claim.tokens[before:] = [tokens[record.id]]
            # A text of which nothing is left could not be read again; putting something there says nothing.
            said = {"prompt": prompt or _NOTHING, "answer": answer or _NOTHING}
            rows.append({"id": record.id, "subject": record.subject, **said})
        shown = []
        for r in evaluated:
            named = {} if r.id in taken else {"id": r.id}
            taken.add(r.id)
            shown.append({**named, "subject": r.subject, "prompt": r.prompt, "answer": r.answer})
        (folder / task.name).mkdir(parents=True, exist_ok=True)
        for name, lines in (("train.jsonl", rows), ("test.jsonl", shown)):
            file = folder / task.name / name
            write_text(file, "".join(json.dumps(row) + "\n" for row in lines))
            files[file.relative_to(folder).as_posix()] = file_sha256(file)
    write_json(folder / NAME, {"claim": rewriter.claim.to_json(), "tokens": tokens, "files": files})
    return rewriter.claim


def _records(task: Task) -> tuple[tuple[TextRecord, ...], tuple[TextRecord, ...]]:
    if not isinstance(task.train, TextExamples) or not isinstance(task.eval, TextExamples):
        raise CapabilityError(f"task '{task.name}': only text records can be rewritten")
    return task.train.records, task.eval.records


def rewriting_of(files: Iterable[str]) -> dict[str, Any] | None:
    """The rewriting that a run's data files came from, None when any of them came from none, or has changed."""
    found: dict[str, Any] | None = None
    for name in files:
        file = Path(name)
        note = file.parent.parent / NAME
        if not note.is_file():
            return None
        said: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        if said["files"].get(f"{file.parent.name}/{file.name}") != file_sha256(file) or found not in (None, said):
            return None
        found = said
    return found


def statement(rewriting: dict[str, Any], ids: Collection[str]) -> dict[str, Any]:
    """What the rewriting guarantees about the records called so, as JSON for a certificate."""
    claim, lengths = rewriting["claim"], [rewriting["tokens"][i] for i in ids]
    per_token, void = claim["epsilon_per_token"], claim["void"]
    total = None if void else {"epsilon": per_token * sum(lengths), "delta": 0.0}
    same = " of the same length, punctuation and white space" if claim["method"] == "dp_mlm" else ""
    return {
        "mechanism": claim["method"],
        "unit": "record",
        "epsilon_per_token": per_token,
        "tokens": {"sum": sum(lengths), "max": max(lengths, default=0)},
        "delta": 0.0,
        "adjacency": _ADJACENT.format(same=same),
        "epsilon": None if void else per_token * max(lengths, default=0),
        "group": {"units": len(lengths), "tight": total, "naive": total},
        "void": void,
        "assumptions": [
            "every token was drawn by itself, by the exponential mechanism on logits clipped to a range that was not "
            "taken from the texts"
        ],
        "not_claimed": [
            "anything about lengths, punctuation and copied text, or that a record or a subject was there",
            "anything about what other records say of the same person",
        ],
    }
