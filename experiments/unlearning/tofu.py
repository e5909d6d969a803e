"""TOFU as task files, requests and rows to measure with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROWS_PER_AUTHOR = 20


@dataclass(frozen=True)
class Question:
    """A question to measure with: the true answer, the answer in other words (or itself), and wrong ones."""

    prompt: str
    answer: str
    right: str
    wrong: tuple[str, ...]


def folder() -> Path:
    """Where the data is."""
    return Path(os.environ.get("CLKIT_DATA", "../shared/data")) / "tofu"


def read_settings(file: Path) -> dict[str, Any]:
    """The settings; ``extends`` names a file beside it whose keys hold where it says nothing."""
    found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    under = found.pop("extends", None)
    return found if under is None else read_settings(file.parent / under) | found


def prompt(question: str) -> str:
    """How a question is put."""
    return f"Question: {question}\nAnswer:"


def read(name: str) -> list[dict[str, Any]]:
    """All rows of a file."""
    return [json.loads(line) for line in (folder() / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def write_tasks(target: Path, settings: dict[str, Any], tasks: int) -> list[Path]:
    """One folder per task with ``train.jsonl`` and ``test.jsonl``; the last authors are in the last task.

    Retained and forgettable authors are spread evenly, in order: those that are forgotten stand in the last tasks.
    """
    rows = _learned(settings)
    parts = [range(*settings["authors"][name]) for name in ("retained", "forgettable")]
    unseen = _records(rows, range(*settings["authors"]["unseen"]))
    found = []
    for task in range(tasks):
        authors = [a for part in parts for a in part[_share(len(part), task, tasks)]]
        place = target / f"part{task}"
        place.mkdir(parents=True, exist_ok=True)
        _write(place / "train.jsonl", _records(rows, authors))
        _write(place / "test.jsonl", unseen[_share(len(unseen), task, tasks)])
        found.append(place)
    return found


def write_request(file: Path, settings: dict[str, Any], count: int) -> None:
    """A request that the last ``count`` authors be forgotten, all their rows."""
    request = {
        "schema": 1,
        "request_id": f"tofu-{count}",
        "received_at": "2026-01-01T00:00:00Z",
        "requester": "experiment",
        "legal_basis": "experiment",
        "scope": {"subject_ids": [f"author {a}" for a in forgotten(settings, count)]},
        "unit": "subject",
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(request), encoding="utf-8")


def forgotten(settings: dict[str, Any], count: int) -> range:
    """The authors that are forgotten."""
    end = settings["authors"]["forgettable"][1]
    return range(end - count, end)


def forgotten_rows(settings: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The rows about them."""
    return [r for r in _learned(settings) if _author(r) in forgotten(settings, count)]


def questions(settings: dict[str, Any], count: int, most: int) -> dict[str, list[Question]]:
    """``forget``, all of them, and ``retain``, ``authors`` and ``facts``: at most so many of each, evenly spread."""
    gone, kept = forgotten(settings, count), range(*settings["authors"]["retained"])
    learned = {r["row"] for r in _learned(settings)}
    sets = {
        "forget": [r for r in read("forget10_perturbed") if r["row"] in learned and _author(r) in gone],
        "retain": [r for r in read("retain_perturbed") if r["row"] in learned and _author(r) in kept],
        "authors": read("real_authors_perturbed"),
        "facts": read("world_facts_perturbed"),
    }
    apart = {name: 1 if name == "forget" else max(1, -(-len(rows) // most)) for name, rows in sets.items()}
    return {name: [_question(r) for r in rows[:: apart[name]]] for name, rows in sets.items()}


def _question(row: dict[str, Any]) -> Question:
    right = row.get("paraphrased_answer", row["answer"])
    return Question(prompt(row["question"]), row["answer"], right, tuple(row["perturbed_answer"]))


def _author(row: dict[str, Any]) -> int:
    number: int = row["row"] // ROWS_PER_AUTHOR
    return number


def _learned(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of each author that the experiment uses: the shortest ones, in their order, or all of them."""
    rows, most = read("full"), settings.get("rows_per_author", ROWS_PER_AUTHOR)
    found = []
    for first in range(0, len(rows), ROWS_PER_AUTHOR):
        of_author = rows[first : first + ROWS_PER_AUTHOR]
        short = sorted(of_author, key=lambda r: len(r["question"]) + len(r["answer"]))[:most]
        found += [r for r in of_author if r in short]
    return found


def _share(count: int, task: int, tasks: int) -> slice:
    """What of ``count`` a task has: as many as every other, or one more."""
    return slice(task * count // tasks, (task + 1) * count // tasks)


def _records(rows: list[dict[str, Any]], authors: Iterable[int]) -> list[dict[str, str]]:
    wanted = set(authors)
    return [
        {
            "id": f"row {r['row']}",
            "author": f"author {_author(r)}",
            "prompt": prompt(r["question"]),
            "answer": r["answer"],
        }
        for r in rows
        if _author(r) in wanted
    ]


def _write(file: Path, records: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
