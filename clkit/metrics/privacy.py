"""Privacy metrics: can an attacker tell what a model was trained on, and take it out word by word.

Membership inference scores are **higher for what looks less like a member** (a loss is one). They are made of the log
probabilities that the model gave the tokens of each text, one array of T values per text, natural logarithm, special
tokens at the end left out. What is undefined is NaN (a score) or None (a summary), never 0.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]

MIN_K = 0.4  # open-unlearning's and MUSE's share of tokens for Min-K % and Min-K++
_VARIANCE_FLOOR = 1e-6  # open-unlearning's, for Min-K++


def loss_scores(log_probs: Sequence[ArrayLike]) -> Array:
    """LOSS: the mean token loss of each text; NaN for one without tokens.

    >>> loss_scores([[-1.0, -3.0], []])
    array([ 2., nan])
    """
    return np.array([_mean(-_tokens(text)) for text in log_probs])


def zlib_scores(log_probs: Sequence[ArrayLike], texts: Sequence[str]) -> Array:
    """ZLib (Carlini et al. 2021): the loss over the text's compressed size in bytes."""
    sizes = [len(zlib.compress(text.encode())) for text in texts]
    return loss_scores(log_probs) / np.array(sizes, dtype=np.float64)


def reference_scores(log_probs: Sequence[ArrayLike], reference: Sequence[ArrayLike]) -> Array:
    """Reference (Carlini et al. 2021): the loss minus a reference model's loss of the same text."""
    return loss_scores(log_probs) - loss_scores(reference)


def gradient_scores(norms: Sequence[ArrayLike]) -> Array:
    """GradNorm: the mean over tensors of the gradient's norm at each text.

    Args:
        norms: for each text the norms of its gradient, one per parameter tensor.
    """
    return np.array([_mean(_tokens(text)) for text in norms])


def min_k_scores(log_probs: Sequence[ArrayLike], k: float = MIN_K) -> Array:
    """Min-K % (Shi et al. 2024): minus the mean of the ``max(1, floor(k T))`` lowest token log probabilities.

    >>> min_k_scores([[-1.0, -5.0, -2.0]], k=0.7)
    array([3.5])
    """
    return np.array([_lowest(_tokens(text), k) for text in log_probs])


def min_k_plus_scores(log_probs: Sequence[ArrayLike], distributions: Sequence[ArrayLike], k: float = MIN_K) -> Array:
    """Min-K++ (Zhang et al. 2025): Min-K % on log probabilities normalised by the distribution they come from.

    ``z_t = (log p_t - mu_t) / sqrt(max(var_t, 1e-6))``, ``mu_t`` and ``var_t`` the mean and the variance of ``log p``
    over the vocabulary.

    Args:
        log_probs: for each text (T,) log probabilities of its tokens.
        distributions: for each text (T, V) log probabilities of the whole vocabulary at those places.
        k: share of the tokens.
    """
    scores = []
    for text, distribution in zip(log_probs, distributions, strict=True):
        mine = _tokens(text)
        if not len(mine):
            scores.append(math.nan)
            continue
        every = np.asarray(distribution, dtype=np.float64)
        if every.ndim != 2 or len(every) != len(mine):
            raise ValueError(f"`distributions` must be (T, V) with T = {len(mine)}, got shape {every.shape}")
        p = np.exp(every)
        weighted = np.where(p > 0, p * np.where(p > 0, every, 0), 0)  # 0 log 0 = 0
        mean = weighted.sum(axis=1)
        variance = (weighted * np.where(p > 0, every, 0)).sum(axis=1) - mean**2
        scores.append(_lowest((mine - mean) / np.sqrt(np.maximum(variance, _VARIANCE_FLOOR)), k))
    return np.array(scores)


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Membership:
    """What a score tells about membership.

    Attributes:
        auc: chance that a member looks more like one than a non-member does; 0.5 = nothing, 1 = everything.
        tpr_at_fpr: share of members found while at most ``fpr`` of the non-members are accused; None below ``1 / fpr``
            non-members, where it can't be measured.
        fpr: that rate.
        n: members and non-members.
    """

    auc: Estimate
    tpr_at_fpr: Estimate | None
    fpr: float
    n: tuple[int, int]


def membership(
    members: ArrayLike,
    others: ArrayLike,
    generator: np.random.Generator,
    *,
    fpr: float = 0.01,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Membership | None:
    """AUC and TPR at a low FPR of one membership score, with percentile bootstrap intervals.

    Args:
        members: (N,) scores of what is suspected to be in the training data, such as the forget set.
        others: (M,) scores of a holdout from the same source.
        generator: draws the resamples.
        fpr: false-positive rate of the second figure.
        resamples: how many; members and others are drawn separately.
        confidence: of the intervals.

    Returns:
        None when a side is empty or has an undefined score.
    """
    a, b = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if not len(a) or not len(b) or np.isnan(a).any() or np.isnan(b).any():
        return None
    measurable = len(b) * fpr >= 1
    draws = [(generator.choice(a, len(a)), generator.choice(b, len(b))) for _ in range(resamples)]
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    auc = _estimate(membership_auc(a, b), [membership_auc(x, y) for x, y in draws], tails)
    tpr = None
    if measurable:
        tpr = _estimate(true_positive_rate(a, b, fpr), [true_positive_rate(x, y, fpr) for x, y in draws], tails)
    return Membership(auc, tpr, fpr, (len(a), len(b)))


def membership_auc(members: Array, others: Array) -> float:
    """Chance that a member's score is below a non-member's, ties half: the AUC of "lower = member".

    >>> membership_auc(np.array([1.0, 2.0]), np.array([2.0, 3.0]))
    0.875
    """
    ranks = stats.rankdata(np.concatenate([members, others]))
    above = ranks[len(members) :].sum() - len(others) * (len(others) + 1) / 2
    return float(above / (len(members) * len(others)))


def true_positive_rate(members: Array, others: Array, fpr: float) -> float:
    """Share of members strictly below the threshold that at most ``floor(fpr * M)`` of the M others are below."""
    allowed = math.floor(fpr * len(others) + 1e-9)
    threshold = np.sort(others)[allowed] if allowed < len(others) else math.inf
    return float((members < threshold).mean())


def roc(members: ArrayLike, others: ArrayLike, most: int = 64) -> tuple[Array, Array]:
    """The curve of "a score below the threshold = member": false- and true-positive rates from (0, 0) to (1, 1).

    Args:
        members: (N,) scores.
        others: (M,) scores.
        most: at most so many points are kept, at even steps along the curve.

    Returns:
        Two arrays (P,) in rising order. The area below the whole curve is :func:`membership_auc`.

    >>> roc([1.0, 2.0], [2.0, 3.0])
    (array([0. , 0. , 0.5, 1. ]), array([0. , 0.5, 1. , 1. ]))
    """
    a, b = np.sort(np.asarray(members, dtype=np.float64)), np.sort(np.asarray(others, dtype=np.float64))
    thresholds = np.unique(np.concatenate([a, b]))
    fpr = np.concatenate([[0.0], np.searchsorted(b, thresholds, side="right") / len(b)])
    tpr = np.concatenate([[0.0], np.searchsorted(a, thresholds, side="right") / len(a)])
    kept = np.unique(np.linspace(0, len(fpr) - 1, min(most, len(fpr))).round().astype(int))
    return fpr[kept], tpr[kept]


def extraction_strength(predicted: Sequence[ArrayLike], tokens: Sequence[ArrayLike]) -> Array:
    """Extraction strength (Carlini et al. 2021): ``1 - k/T``, k the shortest prefix that gives the rest away.

    Args:
        predicted: for each text (T,) the model's most likely token at each place, given the true ones before.
        tokens: for each text (T,) the true tokens.

    Returns:
        (N,) in [0, 1]; 0 when not even the last token is right (open-unlearning gives 1/T there); NaN without tokens.

    >>> extraction_strength([[7, 2, 3], [1, 2, 9]], [[1, 2, 3], [1, 2, 3]]).round(3)
    array([0.667, 0.   ])
    """
    found = []
    for right in _hits(predicted, tokens):
        wrong = np.flatnonzero(~right)
        found.append(math.nan if not len(right) else 1 - (wrong[-1] + 1 if len(wrong) else 0) / len(right))
    return np.array(found, dtype=np.float64)


def exact_memorisation(predicted: Sequence[ArrayLike], tokens: Sequence[ArrayLike]) -> Array:
    """The share of places at which the model's most likely token is the true one; arguments as above."""
    return np.array([right.mean() if len(right) else math.nan for right in _hits(predicted, tokens)], dtype=np.float64)


def attack_limit(epsilon: float, delta: float, fpr: float) -> float:
    """The most true positives that *any* membership attack reaches at ``fpr`` against an (epsilon, delta)-DP model.

    ``min(e^eps FPR + delta, 1 - e^-eps (1 - delta - FPR))``, both sides of the definition (Kairouz et al. 2015).

    >>> round(attack_limit(1.0, 0.0, 0.01), 4), attack_limit(0.0, 0.0, 0.01)
    (0.0272, 0.01)
    """
    first = fpr * math.exp(epsilon) + delta if epsilon < 700 else 1.0
    return max(0.0, min(1.0, first, 1 - math.exp(-epsilon) * (1 - delta - fpr)))


def _hits(predicted: Sequence[ArrayLike], tokens: Sequence[ArrayLike]) -> list[NDArray[np.bool_]]:
    pairs = [(np.asarray(p), np.asarray(t)) for p, t in zip(predicted, tokens, strict=True)]
    for p, t in pairs:
        if p.shape != t.shape or p.ndim != 1:
            raise ValueError(f"predictions and tokens of a text must both be (T,), got {p.shape} and {t.shape}")
    return [p == t for p, t in pairs]


def _lowest(values: Array, k: float) -> float:
    if not 0 < k <= 1:
        raise ValueError(f"`k` must be in (0, 1], got {k}")
    if not len(values):
        return math.nan
    return float(-np.sort(values)[: max(1, math.floor(k * len(values) + 1e-9))].mean())


def _estimate(value: float, resampled: list[float], tails: tuple[float, float]) -> Estimate:
    low, high = np.quantile(resampled, tails)
    return Estimate(value, float(low), float(high))


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else math.nan


def _tokens(values: ArrayLike) -> Array:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1:
        raise ValueError(f"the values of a text must be (T,), got shape {found.shape}")
    return found
