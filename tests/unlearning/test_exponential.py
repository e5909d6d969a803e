"""The exponential mechanism: the sheet's numbers, the DP inequality itself, and draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from clkit.errors import ConfigError
from clkit.unlearning.exponential import ROBERTA_RANGE, best_chance, probabilities, temperature, text_epsilon

LOGITS = [10, 8, 3, -2, -9, 25]


@pytest.mark.parametrize(
    ("epsilon", "expected"),
    [
        (1, [0.178895, 0.172019, 0.155964, 0.141406, 0.132787, 0.218928]),
        (10, [0.104065, 0.070321, 0.026396, 0.009908, 0.005283, 0.784027]),
        (100, [0, 0, 0, 0, 0, 1]),
    ],
)
def test_probabilities_are_the_check_numbers(epsilon, expected):
    assert probabilities(LOGITS, epsilon) == pytest.approx(expected, abs=5e-7)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    arrays(np.float64, (2, 7), elements=st.floats(-40, 60)),
    st.sampled_from([0.1, 1.0, 10.0, 100.0]),
)
def test_no_outcome_is_more_than_e_to_the_epsilon_likelier_under_another_text(pair, epsilon):
    a, b = np.log(probabilities(pair, epsilon))
    assert np.abs(a - b).max() <= epsilon * (1 + 1e-9)


def test_the_inequality_is_reached_by_nothing_smaller():
    low, high = ROBERTA_RANGE
    worst = np.full((2, 50), [[low], [high]])
    worst[0, 0], worst[1, 0] = high, low
    a, b = np.log(probabilities(worst, 1.0))
    assert 0.97 < np.abs(a - b).max() <= 1.0


def test_draws_follow_the_probabilities():
    p = probabilities(LOGITS, 10)
    counts = np.bincount(np.random.default_rng(0).choice(6, 100_000, p=p), minlength=6)
    assert stats.chisquare(counts, p * 100_000).pvalue > 0.001


def test_the_best_token_is_hopeless_at_a_small_epsilon_and_a_text_costs_its_length():
    assert [best_chance(e, 50265) for e in (1, 10, 25)] == pytest.approx([3.28e-5, 0.0029, 0.842], rel=0.02)
    vocabulary = np.full(50265, ROBERTA_RANGE[0])
    vocabulary[7] = ROBERTA_RANGE[1]
    assert probabilities(vocabulary, 25)[7] == pytest.approx(best_chance(25, 50265))
    assert text_epsilon(2.5, 40) == 100
    assert temperature(1.0) == pytest.approx(51.0282, abs=5e-5)
    for wrong in ((0, -1, 1), (1, 1, 1)):
        with pytest.raises(ConfigError, match="above"):
            temperature(*wrong)
