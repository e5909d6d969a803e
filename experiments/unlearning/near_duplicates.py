"""How many edited copies of forgotten TOFU rows the near-duplicate search finds, and how many others it lists.

    python experiments/unlearning/near_duplicates.py

Forgotten: the 400 rows of forget10. Retained: the 3600 rows of retain90, and one edited copy of each forgotten row.
Prints a table: the kind of edit, the share of copies found at each threshold, and retained rows listed beside them.
Needs CLKIT_DATA (see tests), and about a minute.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from clkit.unlearning.duplicates import near_duplicates
from clkit.unlearning.records import Place, Record, content_hash

THRESHOLDS = (0.4, 0.6, 0.8)
Row = dict[str, str]
Edit = Callable[[Row, np.random.Generator], tuple[str, str]]


def record(task: str, position: int, prompt: str, answer: str) -> Record:
    """A training record."""
    fields = {"prompt": prompt, "answer": answer}
    return Record(Place(task, "train", position), f"{task}/{position}", content_hash(**fields), fields)


def words(share: float, how: str) -> Edit:
    """Drop, or replace by another word of the row, a share of the words of the answer."""

    def edit(row: Row, draws: np.random.Generator) -> tuple[str, str]:
        answer = row["answer"].split()
        hit = set(draws.choice(len(answer), max(1, round(share * len(answer))), replace=False).tolist())
        if how == "drop":
            left = [w for i, w in enumerate(answer) if i not in hit]
        else:
            left = [answer[int(draws.integers(len(answer)))] if i in hit else w for i, w in enumerate(answer)]
        return row["question"], " ".join(left)

    return edit


EDITS: dict[str, Edit] = {
    "same words, other case and spaces": lambda r, _: (r["question"].upper(), "  ".join(r["answer"].split())),
    "quoted in a text five times as long": lambda r, _: ("Notes", f"{'x y z w ' * 120}{r['question']} {r['answer']}"),
    "answer alone, under another question": lambda r, _: ("What is said of this author?", r["answer"]),
    "question alone, with another answer": lambda r, _: (r["question"], "I have no information about that."),
    "5 % of the answer's words dropped": words(0.05, "drop"),
    "10 % replaced": words(0.1, "replace"),
    "25 % replaced": words(0.25, "replace"),
    "50 % replaced": words(0.5, "replace"),
    "TOFU's paraphrased answer": lambda r, _: (r["question"], r["paraphrased_answer"]),
    "TOFU's paraphrased answer and question": lambda r, _: (r["paraphrased_question"], r["paraphrased_answer"]),
}


def main() -> int:
    """Measure and print."""
    folder = Path(os.environ.get("CLKIT_DATA", "../shared/data")) / "tofu"
    full = [json.loads(line) for line in (folder / "full.jsonl").read_text(encoding="utf-8").splitlines()]
    gone = [json.loads(line) for line in (folder / "forget10_perturbed.jsonl").read_text(encoding="utf-8").splitlines()]
    forgotten = [record("gone", i, r["question"], r["answer"]) for i, r in enumerate(gone)]
    kept = [record("kept", i, r["question"], r["answer"]) for i, r in enumerate(full[: len(full) - len(gone)])]
    print("| edit | " + " | ".join(f"found at {t}" for t in THRESHOLDS) + " | others listed |")
    print("|---" * (len(THRESHOLDS) + 2) + "|")
    for name, edit in EDITS.items():
        draws = np.random.default_rng(0)
        copies = [record("copy", i, *edit(r, draws)) for i, r in enumerate(gone)]
        cells, others = [], []
        for threshold in THRESHOLDS:
            pairs = near_duplicates(forgotten, [*kept, *copies], threshold)
            found = sum(p.retained.place.task == "copy" for p in pairs)
            others.append(len(pairs) - found)
            cells.append(f"{found / len(copies):.1%}")
        print(f"| {name} | {' | '.join(cells)} | {', '.join(map(str, others))} of {len(kept)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
