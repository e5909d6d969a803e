"""Statistics over seeds against hand numbers, scipy and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clkit.metrics.comparison import estimate, front, paired

numbers = st.lists(st.integers(-50, 50), min_size=2, max_size=9)


def test_an_estimate_by_hand():
    found = estimate([0.5, 0.6, 0.7, 0.8])
    assert found.n == 4 and found.mean == pytest.approx(0.65)
    assert found.sd == pytest.approx(math.sqrt((0.0225 + 0.0025) * 2 / 3))
    half = 3.182446 * found.sd / 2  # t with 3 degrees of freedom, from a table
    assert (found.low, found.high) == pytest.approx((0.65 - half, 0.65 + half), abs=1e-6)


def test_one_value_has_no_spread():
    found = estimate([0.25])
    assert (found.n, found.mean, found.sd, found.low, found.high) == (1, 0.25, None, None, None)


@settings(deadline=None, max_examples=50)
@given(numbers)
def test_the_interval_is_scipys(values):
    found = estimate(values)
    sem = stats.sem(values)
    if sem > 0:
        assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, len(values) - 1, np.mean(values), sem))
    else:
        assert found.low == found.high == found.mean


def exact_p(differences):
    """Two-sided p of the signed-rank sum over all signs, by brute force."""
    ranks = stats.rankdata(np.abs(differences))
    observed = ranks[np.array(differences) > 0].sum()
    middle = ranks.sum() / 2
    sums = [
        sum(r for r, s in zip(ranks, signs, strict=True) if s) for signs in itertools.product((0, 1), repeat=len(ranks))
    ]
    return np.mean([abs(s - middle) >= abs(observed - middle) - 1e-9 for s in sums])


@settings(deadline=None, max_examples=50)
@given(numbers)
def test_wilcoxons_p_is_that_of_going_through_all_signs(differences):
    found = paired(differences, [0] * len(differences)).wilcoxon_p
    nonzero = [d for d in differences if d]
    if not nonzero:
        assert found is None
    else:
        assert found == pytest.approx(exact_p(nonzero))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=1, max_size=9))
def test_rounding_tells_no_ties_apart(percents):
    first, second = zip(*percents, strict=True)
    found = paired([x / 100 for x in first], [x / 100 for x in second]).wilcoxon_p
    assert found == paired(first, second).wilcoxon_p


def test_means_of_the_same_scores_in_another_order_are_no_difference():
    first, second = [np.mean([0.8, 0.7, 0.9])] * 6, [np.mean([0.7, 0.9, 0.8])] * 6
    assert first != second and paired(first, second).wilcoxon_p is None


def test_a_paired_difference_is_the_first_minus_the_second():
    found = paired([0.9, 0.8, 0.85, 0.7, 0.95], [0.5, 0.6, 0.55, 0.6, 0.45])
    assert found.difference.mean == pytest.approx(0.3)
    assert found.wilcoxon_p == pytest.approx(2 / 2**5), "the smallest that five pairs can give"


def test_pareto_by_hand():
    points = [[0.9, 9.0], [0.8, 3.0], [0.8, 4.0], [0.7, 3.0], [0.95, math.nan], [0.8, 3.0]]
    assert front(points, [True, False]) == [True, True, False, False, False, True]
    assert front([], [True, False]) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_no_point_dominates(points):
    def dominates(a, b):
        return a[0] >= b[0] and a[1] <= b[1] and a != b

    assert front(points, [True, False]) == [not any(dominates(a, b) for a in points) for b in points]


@pytest.mark.parametrize("wrong", [[], [math.nan], [[1.0]], [math.inf]])
def test_what_is_no_list_of_numbers_is_refused(wrong):
    with pytest.raises(ValueError, match="finite"):
        estimate(wrong)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="one value per seed"):
        paired([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="shape"):
        front([[1.0]], [True, False])
