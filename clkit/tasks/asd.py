"""Answer-style diversification: some training records of a task asked and answered in the other styles.

After Chen et al. 2025 (SEFE): a model that sees one style of answer per task forgets the *form* of earlier answers
(superficial forgetting). A part of each task's records is converted, evenly over the styles that it lacks.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from clkit.tasks.base import TextRecord
from clkit.tasks.sampling import ranked, stream

STYLES = ("yes-no", "choice", "short", "brief", "detail")
_EXPLAINED = ("brief", "detail")
# Native style -> what is made of it by rule.
_RULED: dict[str, tuple[str, ...]] = {
    "choice": ("yes-no", "short"),
    "yes-no": ("choice",),
    "short": ("yes-no", "choice"),
}
_LETTERS = "ABCD"

Explain = Callable[[TextRecord, str], str | None]
"""(record, "brief" or "detail") -> the answer with an explanation of about 20 or 50 words; None = there is none."""

_CUE = re.compile(r"[^\W\d_]+:")
_LONE_LETTER = re.compile(r"\(?([A-Za-z])[.):]*")
_LISTED = re.compile(r"\s*\(?([A-Z])[.):]\s+(\S.*?)\s*")
# A full stop after one letter ("U.S.", "e.g.", "J. Smith") or a short title ends no sentence.
_SENTENCE_END = re.compile(
    r"(?<![\s.(][A-Za-z])(?<!^[A-Za-z])(?<!\b(?:Dr|Mr|Ms|St|vs))(?<!\bMrs)[.!?][\"')\]]*(?=\s|$)|[。！？]|\n"
)


def native_style(records: Sequence[TextRecord]) -> str:
    """The style that a task has already: of yes and no, of letters to choose, or short."""
    answers = {r.answer.strip() for r in records}
    if {a.strip(".()").lower() for a in answers} <= {"yes", "no"}:
        return "yes-no"
    return "choice" if all(_letter(a) is not None for a in answers) else "short"


def listed_options(record: TextRecord) -> dict[str, str] | None:
    """The texts behind the letters of a multiple-choice record, where they are known beyond doubt.

    They are its ``options`` if each reads "B. text" (or "B) text", "(B) text"), else the one block of such lines in
    its prompt, lettered from A on. A second such block, a letter that is missing, an option over several lines, two
    equal texts or an answer that is none of the letters: None.

    >>> listed_options(TextRecord("What is it?\\nA. red\\nB. blue", "B", "1"))
    {'A': 'red', 'B': 'blue'}
    """
    given = record.options or ()
    lines = given if given and all(_LISTED.fullmatch(o) for o in given) else record.prompt.split("\n")
    found = [_LISTED.fullmatch(line) for line in lines]
    blocks = [list(block) for is_listed, block in itertools.groupby(found, bool) if is_listed]
    if len(blocks) != 1:
        return None
    texts = {match[1]: match[2] for match in blocks[0] if match is not None}
    in_order = [match[1] for match in blocks[0] if match is not None] == [chr(65 + k) for k in range(len(blocks[0]))]
    different = len({_folded(text) for text in texts.values()}) == len(blocks[0]) >= 2
    return texts if in_order and different and _letter(record.answer) in texts else None


def given_explanations(texts: Mapping[str, str]) -> Explain:
    """Explain by texts that came with the records: the answer on one line, below it the explanation.

    Args:
        texts: record id -> explanation. ``detail`` takes all of it, ``brief`` its first sentence; what has one sentence
            only is brief and nothing else.
    """

    def explain(record: TextRecord, style: str) -> str | None:
        text = texts.get(record.id, "").strip()
        brief = first_sentence(text)
        chosen = brief if style == "brief" else text if text != brief else ""
        return f"{record.answer.strip()}\n{chosen}" if chosen else None

    return explain


def first_sentence(text: str) -> str:
    """The first sentence, or the first line where that is shorter.

    >>> first_sentence("Dr. J. Smith works in the U.S. today. He does, e.g., sums.")
    'Dr. J. Smith works in the U.S. today.'
    """
    end = _SENTENCE_END.search(text.strip())
    return text.strip() if end is None else text.strip()[: end.end()].strip()


def diversify(
    records: Sequence[TextRecord], fraction: float, seed: int, explain: Explain | None = None
) -> tuple[list[TextRecord], dict[str, dict[str, str]]]:
    """Convert ``fraction`` of the records, evenly over the styles that can be made; the rest stays as it is.

    By rule:

    - a short answer, or one of yes and no, becomes multiple choice, a short one also yes/no; distractors are the
      record's other ``options``, else the task's other answers;
    - a letter becomes short, or yes/no, where the texts behind the letters are known (:func:`listed_options`);
    - a task with answers of several lines gives nothing: only ``explain`` can convert it.

    Half of the yes/no records (of an odd number one more) propose the right answer; options are shuffled. ``explain``
    makes brief and detailed explanations. What can't be made leaves its share to the other styles: where all can be
    made their counts differ by one at most, and fewer records than asked for are converted only when no other can be.

    Args:
        records: the training records of one task, never its evaluation records.
        fraction: in [0, 1].
        seed: which records and distractors; a function of it, the records and nothing else.
        explain: gives explanations; asked for no more records than needed.

    Returns:
        As many records in the same order, and for each new id its ``style`` and ``source_id``.
    """
    native = native_style(records) if records else "short"
    answers = sorted({r.answer for r in records})
    one_line = not any("\n" in answer.strip() for answer in answers)
    ruled = _RULED[native] if one_line else ()
    explained = _EXPLAINED if explain is not None else ()
    styles = (*explained, *ruled)
    total = round(fraction * len(records))
    order = ranked([r.id for r in records], seed, "asd")
    queues = {style: iter(order) for style in styles}
    counts: Counter[str] = Counter()
    made: dict[int, tuple[str, TextRecord]] = {}
    alive = set(styles)

    def take(style: str) -> bool:
        """Convert the first record left that can be; False when there is none."""
        for index in queues[style]:
            if index not in made:
                new = _convert(records[index], style, native, counts[style] % 2 == 0, answers, seed, explain)
                if new is not None:
                    made[index] = style, new
                    counts[style] += 1
                    return True
        return False

    def deal(group: Sequence[str]) -> None:
        """Let the styles of ``group`` convert in turn, up to their part of what is left to all that still can."""
        while able := [style for style in group if style in alive]:
            settled = sum(counts[style] for style in styles if style not in alive)
            if sum(counts[style] for style in able) >= (total - settled) * len(able) // len(alive):
                return
            style = min(able, key=counts.__getitem__)
            if not take(style):
                alive.remove(style)

    # Explanations are what may be rare, so they choose first; at last comes what rounding and dead ends left over.
    for group in (explained, ruled, styles):
        deal(group)
    result, provenance = list(records), {}
    for index in sorted(made):
        style, new = made[index]
        result[index] = replace(new, id=f"{records[index].id}#{style}")
        provenance[result[index].id] = {"style": style, "source_id": records[index].id}
    return result, provenance


def _convert(
    record: TextRecord,
    style: str,
    native: str,
    propose_right: bool,
    answers: Sequence[str],
    seed: int,
    explain: Explain | None,
) -> TextRecord | None:
    """The record in another style; None when it can't be made."""
    if style in _EXPLAINED:
        text = explain(record, style) if explain is not None else None
        request = f"Answer and explain {'in one sentence' if style == 'brief' else 'in detail'}."
        return None if text is None else replace(record, prompt=_asked(record, request), answer=text, options=None)
    right, candidates = record.answer.strip(), tuple(record.options or answers)
    if native == "choice":
        texts = listed_options(record)
        if texts is None:
            return None
        right, candidates = texts[f"{_letter(record.answer)}"], tuple(texts.values())
        if style == "short":
            request = "Answer with the words of the right option, without its letter."
            return replace(record, prompt=_asked(record, request), answer=right, options=candidates)
    wrong = list({_folded(c): c.strip() for c in candidates if _folded(c) != _folded(right)}.values())
    if not wrong:
        return None
    random = stream(seed, f"asd {record.id}")
    distractors = [wrong[i] for i in random.permutation(len(wrong))[: len(_LETTERS) - 1]]
    if style == "yes-no":
        proposed = right if propose_right else distractors[0]
        request = f"Proposed answer: {proposed}\nIs it correct? Answer yes or no."
        answer = "yes" if propose_right else "no"
        return replace(record, prompt=_asked(record, request), answer=answer, options=("yes", "no"))
    shown = [right, *distractors]
    shown = [shown[i] for i in random.permutation(len(shown))]
    lines = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, shown, strict=False))
    request = f"{lines}\nAnswer with the letter of the right option."
    letters = tuple(_LETTERS[: len(shown)])
    return replace(record, prompt=_asked(record, request), answer=letters[shown.index(right)], options=letters)


def _letter(answer: str) -> str | None:
    """The letter that an answer consists of or begins with ("b", "(B)", "B. blue"), as a capital."""
    match = _LONE_LETTER.fullmatch(answer.strip()) or _LISTED.fullmatch(answer)
    return match[1].upper() if match else None


def _folded(text: str) -> str:
    """What two answers have in common that say the same: case, white space and a full stop aside."""
    words = " ".join(text.casefold().split())
    return words.rstrip(" .") or words


def _asked(record: TextRecord, request: str) -> str:
    """The prompt with a request below it; a last line such as "Answer:" stays the last."""
    prompt = record.prompt.rstrip()
    body, _, cue = prompt.rpartition("\n")
    return f"{body.rstrip()}\n{request}\n{cue}" if _CUE.fullmatch(cue) and body.strip() else f"{prompt}\n{request}"
