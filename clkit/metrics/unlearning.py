"""Unlearning metrics: what a model still knows of the forget set, and what it kept of the rest (TOFU, MUSE).

Everything is computed from numbers that a model gave before: per-answer losses, texts and scores. A figure
that is undefined (of an empty set, of an undefined score, a division by zero) is None, never 0.

Notation: an answer of L tokens has the loss ``l`` = mean of its L token losses (natural logarithm) and the probability
``P = exp(-l)``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from clkit.metrics.text import rouge_l

Array = NDArray[np.float64]
TruthRatioForm = Literal["code", "paper", "prob_mean"]

CRITICAL_05 = 1.3581  # sup of |Brownian bridge| is below this with probability 0.95 (scipy.stats.kstwobign.isf(0.05))


def probability(losses: ArrayLike) -> float | None:
    """TOFU's probability of a set: the mean over its answers of ``exp(-l)``.

    Args:
        losses: (N,) mean token loss of each answer.

    >>> probability([0.0, 0.0]), probability([])
    (1.0, None)
    """
    return _mean(np.exp(-_floats(losses, "losses", 1)))


def choice_probability(right: ArrayLike, wrong: ArrayLike) -> float | None:
    """TOFU's probability for questions with options: the mean of ``P(a) / (P(a) + sum_j P(wrong_j))``.

    Args:
        right: (N,) mean token loss of the right answer.
        wrong: (N, M) mean token losses of the wrong ones.
    """
    losses = np.column_stack([_floats(right, "right", 1), _floats(wrong, "wrong", 2)])
    shifted = np.exp(-(losses - losses.min(axis=1, keepdims=True)))  # the quotient is the same, nothing underflows
    return _mean(shifted[:, 0] / shifted.sum(axis=1))


def rouge_l_recall(predictions: Sequence[str], references: Sequence[str]) -> float | None:
    """The mean ROUGE-L recall of generated answers, with stemming, as in TOFU's published evaluation.

    Args:
        predictions: N generated texts.
        references: N true answers.
    """
    return _mean(np.array([rouge_l(p, r, stemmed=True).recall for p, r in zip(predictions, references, strict=True)]))


def truth_ratio(right: ArrayLike, wrong: ArrayLike, form: TruthRatioForm = "code") -> Array:
    """How much a wrong answer is preferred to the right one in other words, per question.

    ``code`` is the form in TOFU's evaluation and in open-unlearning: the *geometric* mean of ``P(wrong_j)`` over
    ``P(right)``. ``paper`` has the *arithmetic* mean. Both are in [0, inf), 1 = can't tell. ``prob_mean`` is
    ``P(right) / (P(right) + mean_j P(wrong_j))``: in [0, 1], 1/2 = can't tell, and higher is *more* truthful.

    Args:
        right: (N,) mean token loss of the paraphrased right answer (of the right one where there is no paraphrase).
        wrong: (N, M) mean token losses of the wrong answers, M >= 1.

    Returns:
        (N,) ratios; infinite where the right answer's probability underflows.

    >>> truth_ratio([1.0], [[1.0, 3.0]]).round(4), truth_ratio([1.0], [[1.0, 3.0]], "paper").round(4)
    (array([0.3679]), array([0.5677]))
    """
    true, false = _floats(right, "right", 1), _floats(wrong, "wrong", 2)
    if len(true) != len(false) or not false.shape[1]:
        raise ValueError(f"`wrong` must be (N, M) with N = {len(true)} and M >= 1, got shape {false.shape}")
    if form not in ("code", "paper", "prob_mean"):
        raise ValueError(f"`form` must be 'code', 'paper' or 'prob_mean', got {form!r}")
    with np.errstate(over="ignore"):
        geometric: Array = np.exp(true - false.mean(axis=1))
        arithmetic: Array = np.exp(true[:, None] - false).mean(axis=1)
        return geometric if form == "code" else arithmetic if form == "paper" else 1 / (1 + arithmetic)


def truth_ratio_forget(ratios: ArrayLike) -> float | None:
    """The aggregate over a forget set: mean of ``min(R, 1/R)``; 1 = right and wrong can't be told apart."""
    found = _floats(ratios, "ratios", 1)
    with np.errstate(divide="ignore"):
        return _mean(np.minimum(found, 1 / found))


def truth_ratio_retain(ratios: ArrayLike) -> float | None:
    """The aggregate over a set that shall be known: mean of ``max(0, 1 - R)``; 1 = always right."""
    return _mean(np.maximum(0, 1 - _floats(ratios, "ratios", 1)))


def model_utility(scores: Sequence[float | None]) -> float | None:
    """The harmonic mean of the utility scores; 0 if one of them is 0, None if one is undefined.

    TOFU's nine: probability, ROUGE-L recall and truth ratio, each on the retain set, real authors and world facts.

    >>> model_utility([0.5, 1.0]), model_utility([0.5, 0.0]), model_utility([0.5, None])
    (0.6666666666666666, 0.0, None)
    """
    if not scores or any(s is None or math.isnan(s) for s in scores):
        return None
    known = [float(s) for s in scores if s is not None]
    if min(known) < 0:
        raise ValueError(f"`scores` must not be negative, got {min(known)}")
    return 0.0 if min(known) == 0 else len(known) / sum(1 / s for s in known)


@dataclass(frozen=True)
class ForgetQuality:
    """How far apart two models' truth ratios on the forget set are.

    Attributes:
        p_value: of the two-sample Kolmogorov-Smirnov test, TOFU's forget quality. A large one is *no* evidence that the
            two are alike: with 40 questions hardly anything is rejected. So look at the other three too.
        distance: the KS statistic D, the largest gap between the two distribution functions.
        bound: an upper 95 % confidence bound on the true gap; the two are shown to be alike *within this much*. From
            the asymptotic distribution, so conservative for ties and only roughly right below 30 questions. At most 1.
        n: questions behind each side.
    """

    p_value: float
    distance: float
    bound: float
    n: tuple[int, int]


def forget_quality(unlearned: ArrayLike, retrained: ArrayLike) -> ForgetQuality | None:
    """TOFU's forget quality: truth ratios of the unlearned model against those of one that never saw the forget set.

    The ratio and its reciprocal give the same answer.

    Args:
        unlearned: (N,) truth ratios on the forget set.
        retrained: (M,) the same of the model retrained without it.

    Returns:
        None when a side is empty.

    >>> found = forget_quality(np.arange(40) / 40, np.arange(40) / 40 + 0.1)
    >>> round(found.p_value, 4), found.distance, round(found.bound, 4), found.n
    (0.9188, 0.125, 0.4287, (40, 40))
    """
    a, b = _floats(unlearned, "unlearned", 1), _floats(retrained, "retrained", 1)
    if not len(a) or not len(b) or np.isnan(a).any() or np.isnan(b).any():
        return None
    with warnings.catch_warnings():
        # Where the exact value rounds to more than 1, scipy says so and takes the asymptotic one, which is 1.
        warnings.filterwarnings("ignore", "ks_2samp: Exact calculation unsuccessful", RuntimeWarning)
        test = stats.ks_2samp(a, b)
    distance = float(test.statistic)
    margin = CRITICAL_05 * math.sqrt((len(a) + len(b)) / (len(a) * len(b)))
    return ForgetQuality(float(test.pvalue), distance, min(1.0, distance + margin), (len(a), len(b)))


def verbatim_memory(continuations: Sequence[str], suffixes: Sequence[str]) -> float | None:
    """MUSE's VerbMem: mean ROUGE-L F1, without stemming, of what follows a forgotten text's prefix and what did."""
    return _rouge_f1(continuations, suffixes)


def knowledge_memory(answers: Sequence[str], references: Sequence[str]) -> float | None:
    """MUSE's KnowMem: mean ROUGE-L F1, without stemming, of answers about a forgotten (or a retained) text."""
    return _rouge_f1(answers, references)


def privacy_leakage(auc_unlearned: float, auc_retrained: float = 0.5) -> float | None:
    """MUSE's PrivLeak in percent: 0 = leaks like the retrained model, positive = over-, negative = under-unlearned.

    Args:
        auc_unlearned: membership inference (Min-K % with k = 0.4) of forget set against holdout on the unlearned model,
            by ``clkit.metrics.privacy.membership_auc``: 1 = the forget set looks like members. MUSE's own AUC is the
            complement, so the formula is ``100 * ((1 - a) - (1 - r)) / (1 - r)``.
        auc_retrained: the same on a model retrained without the forget set; 0.5 = assumed perfect.

    >>> privacy_leakage(0.4, 0.4), round(privacy_leakage(0.5, 0.4), 2), privacy_leakage(0.5, 1.0)
    (0.0, -16.67, None)
    """
    for name, value in (("auc_unlearned", auc_unlearned), ("auc_retrained", auc_retrained)):
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be in [0, 1], got {value}")
    return None if auc_retrained == 1 else 100 * (auc_retrained - auc_unlearned) / (1 - auc_retrained)


def relearning_robustness(retrained: tuple[float, float], unlearned: tuple[float, float]) -> float:
    """How much of what brief training on forgotten records brings is new: 1 = no more than a retrained model gains.

    After the meta-evaluation of OpenUnlearning: the retrained model's gain over the unlearned one's, at most 1; 0 where
    the retrained one gains nothing and the unlearned one does.

    Args:
        retrained: what a model retrained without the records knows of them (such as :func:`probability`) before and
            after the attack.
        unlearned: the same of the model that is judged, under the same attack.

    >>> relearning_robustness((0.1, 0.2), (0.1, 0.5)), relearning_robustness((0.1, 0.2), (0.1, 0.1))
    (0.25, 1.0)
    """
    gain = unlearned[1] - unlearned[0]
    return 1.0 if gain <= 0 else min(1.0, max(0.0, (retrained[1] - retrained[0]) / gain))


def quantisation_robustness(before: float, after: float) -> float:
    """What a model knows of forgotten records over what it knows once its weights are rounded, at most 1.

    1 = rounding brings nothing back.

    >>> quantisation_robustness(0.1, 0.4), quantisation_robustness(0.2, 0.1)
    (0.25, 1.0)
    """
    return 1.0 if after <= before else before / after


def _rouge_f1(predictions: Sequence[str], references: Sequence[str]) -> float | None:
    return _mean(np.array([rouge_l(p, r).f1 for p, r in zip(predictions, references, strict=True)]))


def _mean(values: Array) -> float | None:
    return None if not len(values) or np.isnan(values).any() else float(values.mean())


def _floats(values: ArrayLike, name: str, dimensions: int) -> Array:
    found = np.array(values, dtype=np.float64)  # a copy: the input is never changed
    if found.ndim == 1 and not len(found):
        found = found.reshape((0,) * dimensions)
    if found.ndim != dimensions:
        raise ValueError(f"`{name}` must have {dimensions} dimension(s), got shape {found.shape}")
    return found
