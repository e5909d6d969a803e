"""Porter's stemmer for English (Porter 1980), as ROUGE is computed with by the published TOFU evaluation.

With the extensions that nltk has on by default, because rouge-score uses nltk's: a few irregular words, short words
left alone, ``ies`` and ``ied`` by length, ``logi``, ``fulli`` and ``alli``.
"""

from __future__ import annotations

import itertools

_IRREGULAR = {
    "skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news",
    "innings": "inning", "inning": "inning", "outings": "outing", "outing": "outing", "cannings": "canning",
    "canning": "canning", "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip
_SECOND = (
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"),
    ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
    ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"),
    ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful"), ("logi", "log"),
)  # fmt: skip
_THIRD = (
    ("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""),
)  # fmt: skip
_FOURTH = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti",
    "ous", "ive", "ize",
)  # fmt: skip


def stem(word: str) -> str:
    """The stem of a lower-case English word.

    >>> stem("relational"), stem("hopping"), stem("authors"), stem("studies")
    ('relat', 'hop', 'author', 'studi')
    """
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_plural, _past, _y, _double_suffix, _suffix, _last_suffix, _final_e, _final_l):
        word = step(word)
    return word


def _consonant(word: str, i: int) -> bool:
    if word[i] in "aeiou":
        return False
    return word[i] != "y" or i == 0 or not _consonant(word, i - 1)


def _measure(part: str) -> int:
    """How often a vowel is followed by a consonant."""
    kinds = [_consonant(part, i) for i in range(len(part))]
    return sum(after and not before for before, after in itertools.pairwise(kinds))


def _has_vowel(part: str) -> bool:
    return not all(_consonant(part, i) for i in range(len(part)))


def _double(word: str) -> bool:
    return len(word) >= 2 and word[-1] == word[-2] and _consonant(word, len(word) - 1)


def _short(word: str) -> bool:
    """Ends consonant, vowel, consonant other than w, x and y; or is a vowel and a consonant."""
    if len(word) == 2:
        return not _consonant(word, 0) and _consonant(word, 1)
    if len(word) < 3:
        return False
    end = len(word)
    kinds = [_consonant(word, i) for i in (end - 3, end - 2, end - 1)]
    return kinds == [True, False, True] and word[-1] not in "wxy"


def _plural(word: str) -> str:
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for ending in ("ed", "ing"):
        if word.endswith(ending):
            rest = word[: -len(ending)]
            if _has_vowel(rest):
                return _mended(rest)
            break
    return word


def _mended(rest: str) -> str:
    """What is left of a word without ``ed`` or ``ing``, as a word again."""
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if _double(rest):
        return rest if rest[-1] in "lsz" else rest[:-1]
    return rest + "e" if _measure(rest) == 1 and _short(rest) else rest


def _y(word: str) -> str:
    turns = word.endswith("y") and len(word) > 2 and _consonant(word, len(word) - 2)
    return word[:-1] + "i" if turns else word


def _replaced(word: str, endings: tuple[tuple[str, str], ...]) -> str:
    """Replace the first ending that is there, where what stands before it has a measure above 0."""
    for ending, by in endings:
        if word.endswith(ending):
            rest = word[: -len(ending)]
            # The l of "logi" belongs to what is measured.
            return rest + by if _measure(rest + "l" if ending == "logi" else rest) > 0 else word
    return word


def _double_suffix(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _double_suffix(word[:-2])
    return _replaced(word, _SECOND)


def _suffix(word: str) -> str:
    return _replaced(word, _THIRD)


def _last_suffix(word: str) -> str:
    for ending in _FOURTH:
        rest = word[: -len(ending)]
        if word.endswith(ending) and (ending != "ion" or rest.endswith(("s", "t"))):
            return rest if _measure(rest) > 1 else word
    return word


def _final_e(word: str) -> str:
    if not word.endswith("e"):
        return word
    rest = word[:-1]
    return rest if _measure(rest) > 1 or (_measure(rest) == 1 and not _short(rest)) else word


def _final_l(word: str) -> str:
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
