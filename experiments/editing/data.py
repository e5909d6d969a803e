"""Edits and probes from the public copies of ZsRE and of the SelfCheckGPT hallucination set."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clkit.editing import Probe
from clkit.errors import DataError
from clkit.metrics.editing import READINGS
from clkit.tasks.base import EditRecord

# The last edits of a set are kept for choosing options (`zsre-kept`), and never drawn otherwise.
TUNING = 100
# Offsets into the pool of irrelevant questions: one is learned from, another is asked.
_ASKED, _LEARNED = 0, 2000


@dataclass(frozen=True)
class Edits:
    """What one run learns and asks.

    Attributes:
        records: the edits; their irrelevant prompt is never among the questions asked.
        probes: reliability, generalisation, locality (unrelated questions) and portability.
        near: locality again, on other facts about the edited subjects.
        readings: of ``clkit.metrics.editing.READINGS``, those that make sense here.
    """

    records: tuple[EditRecord, ...]
    probes: tuple[Probe, ...]
    near: tuple[Probe, ...]
    readings: tuple[str, ...]


def folder() -> Path:
    """Where the data are."""
    return Path(os.environ.get("CLKIT_DATA", "../shared/data")) / "editing"


def draw(name: str, count: int, seed: int) -> Edits:
    """``count`` edits of a data set; the first ones of a seed are the same for every count.

    Raises:
        DataError: the data are not there, or too few.
    """
    file, make, readings = SETS[name]
    rows, pool = _read(file), _read("nq_locality_pairs.json")
    kept = name.endswith("-kept")
    order = np.random.default_rng(seed).permutation(TUNING if kept else len(rows) - TUNING)
    order += (len(rows) - TUNING) * kept
    if count > len(order):
        what = "edits kept for tuning" if kept else f"edits beside the {TUNING} kept for tuning"
        raise DataError(f"{file} has {len(order)} {what}; {count} were asked for")
    made = [make(rows[i], int(i), pool) for i in order[:count].tolist()]
    records, probes, near = zip(*made, strict=True)
    return Edits(records, tuple(p for ps in probes for p in ps), tuple(p for ps in near for p in ps), readings)


def _read(file: str) -> list[dict[str, Any]]:
    path = folder() / file
    if not path.is_file():
        raise DataError(f"{path} is missing; set CLKIT_DATA to the directory that holds editing/")
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def zsre(
    row: dict[str, Any], number: int, pool: Sequence[dict[str, Any]]
) -> tuple[EditRecord, list[Probe], list[Probe]]:
    """Edit, probes and near probes of one ZsRE row."""
    name, target = f"zsre-{number}", row["target_new"]
    irrelevant = pool[_LEARNED + number]["prompt"]
    record = EditRecord(row["prompt"], target, name, row["rephrase_prompt"], irrelevant, subject=row["subject"])
    others = tuple(a for a in row["ground_truth"][:1] if a != target)
    asked = [
        Probe("reliability", row["prompt"], target, name, others),
        Probe("generalisation", row["rephrase_prompt"], target, name, others),
        Probe("locality", row["locality_prompt"], _first(row["locality_ground_truth"]), name),
    ]
    for questions in row["portability"].values():
        asked += [Probe("portability", q["prompt"], _first(q["ground_truth"]), name) for q in questions]
    return record, asked, _near(row, name)


def hallucination(
    row: dict[str, Any], number: int, pool: Sequence[dict[str, Any]]
) -> tuple[EditRecord, list[Probe], list[Probe]]:
    """Edit, probes and near probes of one passage whose next sentence was hallucinated."""
    name = f"hallucination-{number}"
    irrelevant = pool[_LEARNED + number]["prompt"]
    record = EditRecord(row["prompt"], row["target_new"], name, locality_prompt=irrelevant, subject=row["subject"])
    question = pool[_ASKED + number]
    asked = [
        Probe("reliability", row["prompt"], row["target_new"], name),
        Probe("locality", question["prompt"], _first(question["ground_truth"]), name),
    ]
    return record, asked, _near(row, name)


def _near(row: dict[str, Any], name: str) -> list[Probe]:
    found = [(q["prompt"], _first(q["ground_truth"])) for q in row["relation_specificity"][:1]]
    return [Probe("locality", prompt, answer, name) for prompt, answer in found if answer]


def _first(answer: Any) -> str:
    while isinstance(answer, list):
        answer = answer[0] if answer else ""
    return str(answer)


Maker = Callable[[dict[str, Any], int, Sequence[dict[str, Any]]], tuple[EditRecord, list[Probe], list[Probe]]]
SETS: dict[str, tuple[str, Maker, tuple[str, ...]]] = {
    "zsre": ("zsre_edit_1000.json", zsre, tuple(READINGS)),
    "zsre-kept": ("zsre_edit_1000.json", zsre, ("tokens", "generated-normalised")),
    "hallucination": ("selfcheckgpt_wikibio_hallucination_770.json", hallucination, ("tokens", "exact")),
}
