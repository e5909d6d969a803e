"""Membership inference, extraction and memorisation: closed forms, hand-made cases and independent computations."""

import math
import zlib

import numpy as np
import pytest

from clkit.metrics.privacy import (
    attack_limit,
    exact_memorisation,
    extraction_strength,
    gradient_scores,
    loss_scores,
    membership,
    membership_auc,
    min_k_plus_scores,
    min_k_scores,
    reference_scores,
    true_positive_rate,
    zlib_scores,
)


def log_softmax(logits):
    logits = np.asarray(logits, dtype=np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_loss_zlib_reference_and_gradient_scores_are_their_formulas():
    texts, log_probs = ["aaaa", "a longer text"], [[-1.0, -3.0], [-2.0, -2.0, -5.0]]
    assert loss_scores(log_probs) == pytest.approx([2, 3])
    assert zlib_scores(log_probs, texts) == pytest.approx(
        [2 / len(zlib.compress(b"aaaa")), 3 / len(zlib.compress(b"a longer text"))]
    )
    assert reference_scores(log_probs, [[-1.0, -1.0], [-4.0, -4.0, -4.0]]) == pytest.approx([1, -1])
    assert gradient_scores([[1.0, 3.0], [5.0]]) == pytest.approx([2, 5])


def test_min_k_takes_the_lowest_tokens_and_at_least_one():
    log_probs = [-math.log(p) for p in (1, 1, 1)], [-1.0, -5.0, -2.0, -4.0, -3.0]
    assert min_k_scores(log_probs)[0] == 0
    assert min_k_scores(log_probs)[1] == pytest.approx((5 + 4) / 2), "0.4 of five tokens are two"
    assert min_k_scores([[-1.0, -5.0]], k=0.1) == pytest.approx([5])
    assert min_k_scores(log_probs, k=1.0) == pytest.approx(loss_scores(log_probs))
    assert min_k_scores([-np.arange(1.0, 11.0)], k=0.3) == pytest.approx([9]), "0.3 of ten is three, not two"


def test_uniform_logits_give_log_v_and_a_normalised_score_of_zero():
    uniform = log_softmax(np.zeros((3, 7)))
    assert min_k_scores([uniform[:, 0]]) == pytest.approx([math.log(7)])
    assert min_k_plus_scores([uniform[:, 0]], [uniform]) == pytest.approx([0], abs=1e-9), "the variance has a floor"


def test_a_nearly_certain_target_is_at_least_as_likely_as_expected():
    logits = np.zeros((2, 5))
    logits[:, 3] = 20
    every = log_softmax(logits)
    assert min_k_plus_scores([every[:, 3]], [every])[0] <= 0, "z >= 0, and the score is minus z"


def test_min_k_plus_equals_a_direct_computation():
    draw = np.random.default_rng(3)
    every = log_softmax(draw.normal(size=(9, 6)) * 3)
    tokens = draw.integers(0, 6, 9)
    mine = every[np.arange(9), tokens]
    z = []
    for t in range(9):
        mu = sum(math.exp(v) * v for v in every[t])
        var = sum(math.exp(v) * (v - mu) ** 2 for v in every[t])
        z.append((mine[t] - mu) / math.sqrt(var))
    assert min_k_plus_scores([mine], [every]) == pytest.approx([-np.mean(sorted(z)[:3])])


def test_a_vocabulary_entry_of_probability_zero_counts_nothing():
    every = np.array([[math.log(0.5), math.log(0.5), -math.inf], [math.log(0.25), math.log(0.75), -math.inf]])
    assert min_k_plus_scores([every[:, 0]], [every]) == pytest.approx(min_k_plus_scores([every[:, 0]], [every[:, :2]]))
    with pytest.raises(ValueError, match=r"\(T, V\)"):
        min_k_plus_scores([[-1.0, -2.0]], [every[:1]])


def test_auc_counts_pairs_and_half_the_ties():
    draw = np.random.default_rng(1)
    a, b = draw.integers(0, 9, 37).astype(float), draw.integers(2, 11, 23).astype(float)
    pairs = np.mean([[(x < y) + 0.5 * (x == y) for y in b] for x in a])
    assert membership_auc(a, b) == pytest.approx(pairs)
    assert membership_auc(a, b) + membership_auc(b, a) == pytest.approx(1)
    assert membership_auc(np.zeros(4), np.ones(5)) == 1


def test_the_true_positive_rate_never_accuses_more_others_than_allowed():
    others = np.arange(200.0)
    assert true_positive_rate(np.array([0.5, 1.5, 2.5, 3.5]), others, 0.01) == 0.5, "below the third lowest of 200"
    draw = np.random.default_rng(5)
    for _ in range(20):
        members, others = draw.normal(size=50), draw.normal(0.5, size=300).round(1)
        rate = true_positive_rate(members, others, 0.01)
        threshold = np.sort(others)[3]
        assert (others < threshold).mean() <= 0.01 and rate == (members < threshold).mean()
    assert true_positive_rate(np.zeros(3), np.zeros(300), 0.01) == 0, "ties are not found"


def test_membership_has_intervals_that_cover_and_come_from_the_generator():
    draw = np.random.default_rng(0)
    members, others = draw.normal(size=150), draw.normal(1, size=200)
    found = membership(members, others, np.random.default_rng(7), resamples=300)
    assert found == membership(members, others, np.random.default_rng(7), resamples=300)
    assert found != membership(members, others, np.random.default_rng(8), resamples=300)
    assert found.auc.low < found.auc.value == membership_auc(members, others) < found.auc.high
    truth = 0.7602  # P(N(0,1) < N(1,1)) = Phi(1 / sqrt 2)
    assert found.auc.low < truth < found.auc.high and found.auc.high - found.auc.low < 0.15
    assert found.tpr_at_fpr.low <= found.tpr_at_fpr.value <= found.tpr_at_fpr.high
    assert found.n == (150, 200) and found.fpr == 0.01


def test_one_percent_of_fewer_than_a_hundred_others_cant_be_measured():
    few = membership(np.zeros(20), np.ones(99), np.random.default_rng(0), resamples=10)
    assert few.tpr_at_fpr is None and few.auc.value == 1
    assert membership(np.zeros(20), np.ones(100), np.random.default_rng(0), resamples=10).tpr_at_fpr.value == 1


def test_extraction_strength_is_the_part_that_follows_from_the_shortest_prefix():
    true = [[1, 2, 3, 4]] * 4
    said = [[1, 2, 3, 4], [9, 2, 3, 4], [1, 2, 9, 4], [1, 2, 3, 9]]
    assert extraction_strength(said, true) == pytest.approx([1, 0.75, 0.25, 0])
    assert exact_memorisation(said, true) == pytest.approx([1, 0.75, 0.75, 0.75])
    with pytest.raises(ValueError, match=r"\(T,\)"):
        exact_memorisation([[1]], [[1, 2]])


def test_what_is_undefined_is_nan_or_none_never_zero():
    for scores in (loss_scores([[]]), min_k_scores([[]]), min_k_plus_scores([[]], [np.zeros((0, 5))]),
                   gradient_scores([[]]), extraction_strength([[]], [[]]), exact_memorisation([[]], [[]]),
                   zlib_scores([[]], [""]), reference_scores([[]], [[-1.0]])):  # fmt: skip
        assert np.isnan(scores).all() and len(scores) == 1
    assert membership([], [1.0], np.random.default_rng(0)) is None
    assert membership([1.0, math.nan], [1.0], np.random.default_rng(0)) is None


def test_no_attack_on_gaussian_noise_beats_its_limit():
    # Sensitivity 1, sigma 1: the best test's TPR is Phi(Phi^-1(FPR) + 1); (4.37718, 1e-5) is what it satisfies.
    from scipy.stats import norm

    for fpr in (0.001, 0.01, 0.1, 0.5, 0.9):
        assert norm.cdf(norm.ppf(fpr) + 1) <= attack_limit(4.37718, 1e-5, fpr) + 1e-9
    assert attack_limit(1.0, 1e-5, 0.01) == pytest.approx(math.e * 0.01 + 1e-5)
    assert attack_limit(1000.0, 1e-5, 0.01) == 1
    assert attack_limit(0.0, 0.0, 0.3) == pytest.approx(0.3)
