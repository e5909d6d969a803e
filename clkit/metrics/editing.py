"""Scores of model editing: four aspects of an edit, each in four readings, with confidence intervals; perplexity.

Aspects (the data decide which one a case is about):

- *reliability*: the edit's own prompt is answered by the new target.
- *generalisation*: so is a prompt in other words.
- *locality*: an unrelated prompt is answered as it was before the edits.
- *portability*: a question that follows from the edit is answered by its consequence.

Readings: teacher-forced token accuracy (what the papers print), teacher-forced exact match, free generation to its
natural end (exact and normalised match), and option likelihood. Teacher forcing shows the model the right beginning
and the right length, so it flatters: see "The Mirage of Model Editing" (arXiv 2502.11177).
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

ASPECTS = ("reliability", "generalisation", "locality", "portability")
READINGS = {
    "tokens": "teacher-forced token accuracy, the answer's tokens without the end token",
    "exact": "teacher-forced exact match: every token of the answer is the most likely one",
    "generated": "free greedy generation with natural stop, exact match",
    "generated-normalised": "free greedy generation with natural stop, equal after case, articles and punctuation",
    "options": "the right option has the largest log-likelihood",
}
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval; ``low`` and ``high`` are None where there are too few values."""

    mean: float
    low: float | None
    high: float | None
    n: int


def token_accuracy(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """Share of positions at which the two agree; the published definition, for locality with the answers before.

    Raises:
        ValueError: the lengths differ, or there is no token.

    >>> token_accuracy([5, 7, 9], [5, 8, 9])
    0.6666666666666666
    """
    if len(predicted) != len(wanted) or not wanted:
        raise ValueError(
            f"need as many predicted tokens as wanted ones, at least one ({len(predicted)}, {len(wanted)})"
        )
    return sum(p == w for p, w in zip(predicted, wanted, strict=True)) / len(wanted)


def token_match(predicted: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether all tokens agree.

    >>> token_match([5, 7], [5, 7]), token_match([5, 8], [5, 7])
    (True, False)
    """
    return token_accuracy(predicted, wanted) == 1.0


def normalised(text: str) -> str:
    """Lower case, no articles, no punctuation, single spaces (SQuAD's normalisation, after NFKC).

    >>> normalised(" The  U.S.A.")
    'usa'
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(c for c in folded if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def normalised_match(prediction: str, gold: str) -> bool:
    """Whether two texts are equal after :func:`normalised`; two that normalise to nothing must be equal as they are.

    >>> normalised_match("the Owlet moths.", "Owlet Moths"), normalised_match("Owlet moths are moths", "Owlet moths")
    (True, False)
    """
    a, b = normalised(prediction), normalised(gold)
    return a == b if a or b else prediction.strip() == gold.strip()


def prefers(logliks: Sequence[float], right: int = 0) -> bool:
    """Whether option number ``right`` has a larger log-likelihood than every other one; a tie is none.

    >>> prefers([-1.0, -2.0]), prefers([-2.0, -2.0])
    (True, False)
    """
    return all(logliks[right] > value for i, value in enumerate(logliks) if i != right)


def estimate(values: Iterable[float], confidence: float = 0.95) -> Estimate:
    """Mean and confidence interval of scores in [0, 1].

    Wilson's interval where every value is 0 or 1, else Student's t interval cut to [0, 1].

    Raises:
        ValueError: there is no value.
    """
    data = np.fromiter(values, dtype=np.float64)
    n = len(data)
    if not n:
        raise ValueError("need at least one value")
    mean = float(data.mean())
    if bool(np.isin(data, (0.0, 1.0)).all()):
        z = float(stats.norm.ppf(0.5 + confidence / 2))
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return Estimate(mean, max(0.0, centre - half), min(1.0, centre + half), n)
    if n == 1:
        return Estimate(mean, None, None, n)
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * float(data.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half), n)


def summarize_edits(
    cases: Mapping[str, Mapping[str, Sequence[float]]], confidence: float = 0.95
) -> dict[str, dict[str, Estimate]]:
    """Estimates per aspect and reading.

    Args:
        cases: aspect -> reading -> one value per case, all on the final model, after every edit.
        confidence: of the intervals.

    Raises:
        ValueError: an aspect or a reading is not known.
    """
    unknown = [a for a in cases if a not in ASPECTS] + [r for c in cases.values() for r in c if r not in READINGS]
    if unknown:
        raise ValueError(
            f"unknown: {', '.join(unknown)}; aspects: {', '.join(ASPECTS)}; readings: {', '.join(READINGS)}"
        )
    return {
        aspect: {reading: estimate(values, confidence) for reading, values in readings.items() if len(values)}
        for aspect, readings in cases.items()
    }


def perplexity(nll: Sequence[float], tokens: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood per token, over all texts together; not clipped.

    Infinite where that is too large for a float, as of a model that its edits broke.

    Args:
        nll: per text the sum over its tokens, in nats.
        tokens: per text how many.

    >>> round(perplexity([math.log(4.0), math.log(2.0)], [1, 1]), 6)
    2.828427
    """
    if not sum(tokens):
        raise ValueError("need at least one token")
    try:
        return math.exp(math.fsum(nll) / sum(tokens))
    except OverflowError:
        return math.inf
