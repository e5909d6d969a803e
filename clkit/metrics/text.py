"""Text metrics: exact match, format-tolerant match and ROUGE-L of one prediction against its reference.

Of text that is written without spaces (Chinese, Japanese, Thai, Lao, Burmese, Khmer) each character is one word.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from clkit.metrics.stem import stem

_ARTICLES = frozenset({"a", "an", "the"})
# A number with its sign, thousands separators and decimals is one token; so is a word with its apostrophes, C++ or C#.
_NUMBER = r"(?<!\w)[-−]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<!\.)\.\d+)(?!\w)"
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17df\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_LETTER = rf"[^\W_{_UNSPACED}]"
_MARKER = re.compile(r"\b(?:answer|option|choice)\b(?:\s+is\b)?\W*(?:the\b\s*)?", re.IGNORECASE)
_LONE_LETTER = re.compile(rf"(?:^|{_MARKER.pattern})\W*([a-z])[^\w\n]*$", re.MULTILINE | re.IGNORECASE)
# What makes "A" and "I" an article and a pronoun: a word in small letters after them, other than these.
_PROSE = re.compile(r"[^\S\n]+(?!(?:is|because|since)\b)[a-z]")


class _Patterns(NamedTuple):
    """What a word is: to a tolerant match, and to ROUGE."""

    token: re.Pattern[str]
    rouge: re.Pattern[str]


@functools.cache
def _patterns() -> _Patterns:
    r"""A letter has its marks (vowel signs of Hindi, tones of Thai, accents), which ``\w`` leaves out.

    Variation selectors, which choose between pictures of one character, are none.
    """
    codes = (c for c in range(0x300, 0x20000) if c not in range(0xFE00, 0xFE10))
    marks = "".join(chr(c) for c in codes if unicodedata.category(chr(c)) in ("Mn", "Mc"))
    single, letters = rf"(?=\w)[{_UNSPACED}][{marks}]*", rf"{_LETTER}(?:{_LETTER}|[{marks}])*"
    return _Patterns(
        re.compile(rf"{_NUMBER}|{single}|{letters}(?:['’]{letters})*(?:\+\+|#)?"), re.compile(rf"{single}|{letters}")
    )


class RougeL(NamedTuple):
    """ROUGE-L of one prediction: precision, recall and their harmonic mean, each in [0, 1]."""

    precision: float
    recall: float
    f1: float


def exact_match(prediction: str, gold: str) -> bool:
    """Whether the two are the same string, white space at both ends aside.

    >>> exact_match(" Paris\\n", "Paris"), exact_match("paris", "Paris")
    (True, False)
    """
    return prediction.strip() == gold.strip()


def rouge_l(prediction: str, reference: str, *, stemmed: bool = False) -> RougeL:
    """ROUGE-L (Lin 2004): the longest common subsequence of words, relative to either length.

    Words are runs of letters (with their marks) and digits after NFKC and lower-casing; ``stemmed``: words of more
    than three letters are reduced to their English stem (``clkit.metrics.stem``). On ASCII text this agrees with the
    ``rouge-score`` package with the same setting, which drops every other character. An empty text scores 0.

    >>> rouge_l("two authors", "two author").f1, rouge_l("two authors", "two author", stemmed=True).f1
    (0.5, 1.0)
    """
    a, b = _rouge_words(prediction), _rouge_words(reference)
    if stemmed:
        a, b = ([stem(word) if len(word) > 3 else word for word in words] for words in (a, b))
    if not a or not b:
        return RougeL(0.0, 0.0, 0.0)
    common = _lcs_length(a, b)
    precision, recall = common / len(a), common / len(b)
    return RougeL(precision, recall, 2 * precision * recall / (precision + recall) if common else 0.0)


def _rouge_words(text: str) -> list[str]:
    return _patterns().rouge.findall(unicodedata.normalize("NFKC", text).lower())


def _lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence by bit vectors (Hyyrö 2004): one row of the table is one integer."""
    positions: dict[str, int] = {}
    for i, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full  # a 0 bit = the table grows by one here
    for word in b:
        hits = row & positions.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(a) - bin(row).count("1")


def tolerant_match(prediction: str, gold: str, options: Sequence[str] | None = None) -> bool:
    """Whether a free-form prediction gives the gold answer, format aside.

    Texts are compared as lists of words: NFKC, casefolded, articles, punctuation and white space dropped, numbers with
    their sign, decimals and thousands separators understood (``1,000`` is ``1000``, ``.5`` is ``0.5`` and not ``5``,
    ``-3`` is not ``3``).

    **With options**, the option that :func:`first_option` finds must be the gold.

    **Without options**, the gold's words must stand in one piece in the prediction's first non-empty line: it equals
    the gold, begins with it or has it as a whole phrase ("It is Paris, France." has ``Paris``, "Parisian" has not). Of
    a gold of many lines the first one counts. A gold that is one capital letter must be the first option letter there.

    What it does not understand: negation ("not Paris") and hedging ("Paris or Rome" has both).

    Raises:
        ValueError: ``gold`` is not among ``options``.

    >>> tolerant_match("The answer is (B).", "B", ["A", "B", "C"])
    True
    """
    if options is not None:
        answers = [i for i, option in enumerate(options) if _words(option) == _words(gold)]
        if not answers:
            raise ValueError(f"the gold answer {gold!r} is not among the options {list(options)!r}")
        return first_option(prediction, options) in answers
    line, wanted = _first_line(prediction), _first_line(gold)
    if re.fullmatch(r"[A-Z]", wanted):
        return first_option(line, string.ascii_uppercase) == string.ascii_uppercase.index(wanted)
    return bool(_find(_words(line), _words(wanted)))


def first_option(prediction: str, options: Sequence[str]) -> int | None:
    """Index of the option that a free-form prediction names, or None.

    An option is named by its words in one piece, or, if it is a capital letter ("B") or begins with one ("B. dovish",
    "(B) dovish"), by this letter standing alone: "B", "(B)", "B.", "Answer: B". A small letter counts only where its
    line has nothing else, or only "Answer:" and the like before it; "A" and "I" do not count where prose follows
    ("A dovish view", "I think").

    What directly follows "answer", "option" or "choice" (with "is", "the" and punctuation between) decides; else the
    option named first; of several that begin at the same word the longest.
    """
    text = unicodedata.normalize("NFKC", prediction)
    tokens = _tokens(text)
    folded = [word for word, _ in tokens]
    marked = {found.end() for found in _MARKER.finditer(text)}
    letters = _letters(text, marked)
    mentions: list[tuple[int, int, int]] = []  # where it starts, minus its length in words, which option
    for index, option in enumerate(options):
        letter, words = _letter_and_words(option)
        mentions += [(at, -1, index) for found, at in letters if found == letter]
        mentions += [(tokens[at][1], -len(words), index) for at in _find(folded, words)]
    decisive = [mention for mention in mentions if mention[0] in marked] or mentions
    return min(decisive)[2] if decisive else None


def _letter_and_words(option: str) -> tuple[str | None, list[str]]:
    """The letter and the words by which an option is named; an option that is only a letter has no words."""
    text = unicodedata.normalize("NFKC", option).strip()
    alone = re.fullmatch(r"\(?([A-Z])[.):]*", text)
    if alone:
        return alone[1], []
    labelled = re.fullmatch(r"\(?([A-Z])[.):]+\s*(.+)", text, re.DOTALL)
    return (labelled[1], _words(labelled[2])) if labelled else (None, _words(text))


def _letters(text: str, marked: set[int]) -> list[tuple[str, int]]:
    """The letters that stand in ``text`` as option letters, and where; what is marked is never prose."""
    lone = {found.start(1) for found in _LONE_LETTER.finditer(text)}
    found = []
    for match in _patterns().token.finditer(text):
        letter, at = match.group(), match.start()
        if not re.fullmatch(r"[A-Za-z]", letter):
            continue
        is_prose = letter in "AI" and at not in marked and _PROSE.match(text, match.end()) is not None
        if at in lone or (letter.isupper() and not is_prose):
            found.append((letter.upper(), at))
    return found


def _tokens(text: str) -> list[tuple[str, int]]:
    """The folded words of an NFKC text and where they start; articles are dropped unless there is nothing else.

    A text of signs alone, such as ``>=``, is one word.
    """
    found = [(_fold(match.group()), match.start()) for match in _patterns().token.finditer(text)]
    signs = text.strip()
    return [token for token in found if token[0] not in _ARTICLES] or found or ([(signs, 0)] if signs else [])


def _fold(word: str) -> str:
    plain = re.sub(r"(?<=\d),(?=\d)", "", word.casefold().replace("’", "'").replace("−", "-"))
    return re.sub(r"^(-?)\.", r"\g<1>0.", plain)


def _words(text: str) -> list[str]:
    return [word for word, _ in _tokens(unicodedata.normalize("NFKC", text))]


def _first_line(text: str) -> str:
    lines = unicodedata.normalize("NFKC", text).strip().splitlines()
    return lines[0].strip() if lines else ""


def _find(words: list[str], phrase: list[str]) -> list[int]:
    """Where ``phrase`` stands in ``words``; an empty one stands nowhere."""
    size = len(phrase)
    return [i for i in range(len(words) - size + 1) if words[i : i + size] == phrase] if size else []
