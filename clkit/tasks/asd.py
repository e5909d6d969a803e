"""Answer-style diversification: some training records of a task asked and answered in the other styles.

After Chen et al. 2025 (SEFE): a model that sees one style of answer per task forgets the *form* of earlier answers
(superficial forgetting). A part of each task's records is converted, evenly over the styles that it lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from clkit.tasks.base import TextRecord
from clkit.tasks.sampling import ranked, stream

STYLES = ("yes-no", "choice", "short", "brief", "detail")
_EXPLAINED = ("brief", "detail")
_LETTERS = "ABCD"

Explain = Callable[[TextRecord, str], str | None]
"""(record, "brief" or "detail") -> the answer with an explanation of about 20 or 50 words; None = there is none."""


def native_style(records: Sequence[TextRecord]) -> str:
    """The style that a task has already: of yes and no, of single letters to choose, or short."""
    answers = {r.answer.strip().strip(".()").lower() for r in records}
    if answers <= {"yes", "no"}:
        return "yes-no"
    return "choice" if all(len(a) == 1 and a.isalpha() for a in answers) else "short"


def diversify(
    records: Sequence[TextRecord], fraction: float, seed: int, explain: Explain | None = None
) -> tuple[list[TextRecord], dict[str, dict[str, str]]]:
    """Convert ``fraction`` of the records, evenly over the styles that can be made; the rest stays as it is.

    Yes/no and multiple choice are made by rule, with the other answers as distractors (a record's ``options``, else the
    task's answers); half of the yes/no records propose the right answer; the order of options is shuffled. A task
    whose answers are letters or of several lines gives no answers to choose from, so only ``explain`` can convert it.
    Without ``explain``, brief and detailed explanations are left out and the others get their share.

    Args:
        records: the training records of one task, never its evaluation records.
        fraction: in [0, 1].
        seed: which records and distractors; a function of it, the records and nothing else.
        explain: gives explanations; a record without one stays as it is.

    Returns:
        As many records in the same order, and for each new id its ``style`` and ``source_id``.
    """
    native = native_style(records) if records else "short"
    answers = sorted({r.answer for r in records})
    worded = native != "choice" and len(answers) >= 2 and not any("\n" in a for a in answers)
    ruled = [s for s in ("yes-no", "choice") if s != native] if worded else []
    styles = ruled + (list(_EXPLAINED) if explain is not None else [])
    result, provenance = list(records), {}
    if not styles:
        return result, {}
    order = ranked([r.id for r in records], seed, "asd")[: round(fraction * len(records))]
    random = stream(seed, "asd")
    for style, chosen in zip(styles, np.array_split(order, len(styles)), strict=True):
        for turn, index in enumerate(int(i) for i in chosen):
            source = records[index]
            made = _convert(source, style, turn, answers, random, explain)
            if made is not None:
                result[index] = replace(made, id=f"{source.id}#{style}")
                provenance[result[index].id] = {"style": style, "source_id": source.id}
    return result, provenance


def _convert(
    record: TextRecord,
    style: str,
    turn: int,
    answers: Sequence[str],
    random: np.random.Generator,
    explain: Explain | None,
) -> TextRecord | None:
    if style in _EXPLAINED:
        text = explain(record, style) if explain is not None else None
        request = f"Answer and explain {'in one sentence' if style == 'brief' else 'in detail'}."
        return None if text is None else replace(record, prompt=_asked(record, request), answer=text, options=None)
    wrong = [a for a in record.options or answers if a != record.answer]
    distractors = [wrong[i] for i in random.choice(len(wrong), min(len(wrong), len(_LETTERS) - 1), replace=False)]
    if style == "yes-no":
        right = turn % 2 == 0
        request = f"Proposed answer: {record.answer if right else distractors[0]}\nIs it correct? Answer yes or no."
        return replace(record, prompt=_asked(record, request), answer="yes" if right else "no", options=("yes", "no"))
    shown = [record.answer, *distractors]
    shown = [shown[i] for i in random.permutation(len(shown))]
    lines = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, shown, strict=False))
    request = f"{lines}\nAnswer with the letter of the right option."
    letters = tuple(_LETTERS[: len(shown)])
    return replace(record, prompt=_asked(record, request), answer=letters[shown.index(record.answer)], options=letters)


def _asked(record: TextRecord, request: str) -> str:
    return f"{record.prompt.rstrip()}\n{request}"
