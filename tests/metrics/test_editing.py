"""Editing metrics: the published token accuracy, four readings, intervals, perplexity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from clkit.metrics.editing import (
    ASPECTS,
    READINGS,
    estimate,
    normalised_match,
    perplexity,
    prefers,
    summarize_edits,
    token_accuracy,
    token_match,
)


def published_accuracy(logits, labels):
    """The published definition for one case: shift by one, argmax, compare over the target's tokens, mean."""
    answers = logits[0, :-1].argmax(-1)[-len(labels) :]
    return float(np.mean(np.equal(labels, answers.tolist())))


@pytest.mark.parametrize("seed", range(5))
def test_token_accuracy_is_the_published_one(seed):
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, 4, (6,), generator=generator).tolist()
    target = torch.randint(0, 4, (5,), generator=generator).tolist()
    logits = torch.randn(1, 11, 4, generator=generator)
    predicted = logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    assert token_accuracy(predicted, target) == pytest.approx(published_accuracy(logits, target))


def test_locality_is_the_same_function_of_answers_before_and_after():
    assert token_accuracy([1, 2, 3, 4], [1, 2, 0, 4]) == 0.75
    assert token_match([1, 2], [1, 2]) and not token_match([1, 2], [2, 2])


@pytest.mark.parametrize(("predicted", "wanted"), [([1], [1, 2]), ([], [])])
def test_lengths_that_differ_are_an_error(predicted, wanted):
    with pytest.raises(ValueError, match="as many predicted tokens"):
        token_accuracy(predicted, wanted)


@pytest.mark.parametrize(
    ("prediction", "gold", "same"),
    [
        ("The Eiffel Tower.", "eiffel tower", True),
        ("Paris, France", "Paris", False),
        ("", "Paris", False),
        ("?", "!", False),
        ("!", "!", True),
        ("ＡＢＣ", "abc", True),
        ("an a", "a", False),
    ],
)
def test_normalised_match(prediction, gold, same):
    assert normalised_match(prediction, gold) is same


def test_a_tie_of_options_is_no_preference():
    assert prefers([-1.0, -1.5, -3.0]) and prefers([-2.0, -1.0], right=1)
    assert not prefers([-1.0, -1.0]) and not prefers([-2.0, -1.0])


@pytest.mark.parametrize(("right", "n"), [(0, 10), (7, 10), (10, 10), (1, 1)])
def test_shares_have_wilson_intervals(right, n):
    found = estimate([1.0] * right + [0.0] * (n - right))
    expected = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == right / n and found.n == n


def test_fractions_have_t_intervals_within_bounds():
    values = [0.2, 0.5, 0.75, 1.0]
    found = estimate(values, 0.9)
    low, high = stats.t.interval(0.9, 3, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, min(high, 1.0)))
    assert estimate([0.5]) == estimate(iter([0.5])) and estimate([0.5]).low is None
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])


def test_the_summary_has_every_aspect_in_every_reading():
    cases = {aspect: {reading: [1.0, 0.0, 1.0] for reading in READINGS} for aspect in ASPECTS}
    found = summarize_edits(cases)
    assert set(found) == set(ASPECTS) and set(found["locality"]) == set(READINGS)
    assert found["portability"]["options"] == estimate([1.0, 0.0, 1.0])
    assert summarize_edits({"locality": {"tokens": []}}) == {"locality": {}}
    with pytest.raises(ValueError, match=r"unknown: reliabilty, token; aspects: reliability"):
        summarize_edits({"reliabilty": {"token": [1.0]}})


def test_perplexity_is_over_all_tokens_together_and_not_clipped():
    assert perplexity([10.0, 2.0], [5, 1]) == pytest.approx(math.exp(2.0))
    assert perplexity([700.0], [100]) == pytest.approx(math.exp(7.0))
    assert perplexity([1e5, 1.0], [10, 1]) == math.inf  # a model that diverged
    with pytest.raises(ValueError, match="at least one token"):
        perplexity([], [])
