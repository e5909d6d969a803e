"""Forgetting as form and content: worked by hand, additive, undefined where a score is missing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clkit.metrics.continual import summarize
from clkit.metrics.format import FORMAT_DEFINITIONS, split_forgetting

N = None


def test_a_case_worked_by_hand():
    # Task 0 keeps its facts and loses its form; task 1 loses facts, and the form of half of what it still knows.
    strict = [[0.8, N, N], [0.3, 0.6, N], [0.1, 0.2, 0.9]]
    tolerant = [[0.8, N, N], [0.9, 0.7, N], [0.8, 0.4, 0.9]]
    found = split_forgetting(strict, tolerant)
    first, second, last = found["per_task"]
    assert first == {
        "task": 0,
        "strict": pytest.approx(0.7),
        "superficial": pytest.approx(0.6),
        "essential": pytest.approx(0.1),
    }
    assert second == {
        "task": 1,
        "strict": pytest.approx(0.4),
        "superficial": pytest.approx(0.1),
        "essential": pytest.approx(0.3),
    }
    assert last == {"task": 2, "strict": None, "superficial": None, "essential": None}
    means = {key: found[key] for key in FORMAT_DEFINITIONS}
    assert means == {"strict": pytest.approx(0.55), "superficial": pytest.approx(0.35), "essential": pytest.approx(0.2)}


def test_a_format_that_comes_back_is_negative_superficial_forgetting():
    found = split_forgetting([[0.1, N], [0.6, 0.5]], [[0.9, N], [0.7, 0.5]])
    assert (found["strict"], found["superficial"], found["essential"]) == pytest.approx((-0.5, -0.7, 0.2))


def test_what_was_not_measured_is_undefined_and_the_rest_is_not():
    full = [[0.8, N, N], [0.3, 0.6, N], [0.1, 0.2, 0.9]]
    holed = [[0.8, N, N], [0.9, N, N], [0.8, 0.4, 0.9]]
    found = split_forgetting(full, holed)
    assert found["strict"] == pytest.approx(0.55) and found["superficial"] is None and found["essential"] is None
    assert found["per_task"][0]["superficial"] == pytest.approx(0.6)
    assert split_forgetting(holed, full)["essential"] == pytest.approx(0.55)
    alone = split_forgetting([[0.5]], [[0.6]])
    assert [alone[key] for key in FORMAT_DEFINITIONS] == [None, None, None]


def test_matrices_of_different_tasks_are_refused():
    with pytest.raises(ValueError, match="the same tasks, got 2 and 1 tasks"):
        split_forgetting([[0.1, N], [0.6, 0.5]], [[0.5]])


@st.composite
def pairs(draw):
    size = draw(st.integers(2, 5))
    score = st.floats(0, 1, allow_subnormal=False)
    return tuple(draw(arrays(np.float64, (size, size), elements=score)) for _ in range(2))


@given(pairs())
def test_the_parts_add_up_are_those_of_forgetting_and_leave_their_input_alone(pair):
    strict, tolerant = pair
    before = strict.copy(), tolerant.copy()
    found = split_forgetting(strict, tolerant)
    assert found["superficial"] + found["essential"] == pytest.approx(found["strict"])
    assert (
        found["strict"] == summarize(strict)["forgetting"] and found["essential"] == summarize(tolerant)["forgetting"]
    )
    rows = found["per_task"][:-1]
    for key in FORMAT_DEFINITIONS:
        assert found[key] == pytest.approx(np.mean([row[key] for row in rows]))
    assert split_forgetting(strict, strict)["superficial"] == 0
    np.testing.assert_array_equal(before, (strict, tolerant))
