"""The continual metrics: published numbers, hand-computed matrices, what is undefined, and how ours differ."""

import copy
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clkit.metrics.continual import DEFINITIONS, label, summarize

properties = settings(derandomize=True, deadline=None, max_examples=60)
NAN = float("nan")
ORDER_1 = [
    [98.7105, NAN, NAN, NAN],
    [98.5526, 57.7632, NAN, NAN],
    [97.4079, 57.4079, 71.9079, NAN],
    [97.7368, 56.0658, 71.0395, 88.6184],
]
# Task 0 is best after task 1, and was better still before it was learned.
FULL = np.array([[0.6, 0.1, 0.2], [0.8, 0.9, 0.3], [0.5, 0.4, 0.7]])


def matrices(min_size: int = 2) -> st.SearchStrategy[np.ndarray]:
    """Full T x T matrices with scores in [0, 1]."""
    return st.integers(min_size, 6).flatmap(
        lambda n: arrays(np.float64, (n, n), elements=st.floats(0, 1, allow_subnormal=False))
    )


def test_the_published_order_1_matrix_gives_the_published_metrics():
    found = summarize(ORDER_1)
    assert found["learning_accuracy"] == pytest.approx(79.2500, abs=5e-5)
    assert found["average_accuracy"] == pytest.approx(78.3651, abs=5e-5)
    assert found["average_incremental_accuracy"] == pytest.approx(82.7020, abs=5e-5)
    assert found["bwt_over_T"] == pytest.approx(-0.8849, abs=5e-5)
    assert found["bwt"] == pytest.approx(-1.1798, abs=5e-5)
    assert found["forgetting"] == pytest.approx(1.1798, abs=5e-5)


@pytest.mark.parametrize(
    ("run", "mft", "mfn", "maa", "bwt_over_T", "bwt", "forgetting"),
    [
        ("long_olora/exact_match", 72.8586, 72.1746, 67.8247, -0.6840, -0.7329, 1.7436),
        ("long_olora/rougeL", 74.4003, 73.8679, 72.0336, -0.5324, -0.5704, 1.6245),
        ("order1_olora/exact_match", 79.2500, 78.3651, 82.7020, -0.8849, -1.1798, 1.1798),
        ("order1_olora/rougeL", 82.4512, 81.7264, 86.2539, -0.7248, -0.9664, 1.0234),
    ],
)
def test_published_logs_give_the_tabulated_metrics(data_root, run, mft, mfn, maa, bwt_over_T, bwt, forgetting):
    with np.load(data_root.parent / "golden" / "ilora" / "score_matrices.npz") as stored:
        found = summarize(stored[run])
    keys = ("learning_accuracy", "average_accuracy", "average_incremental_accuracy", "bwt_over_T", "bwt", "forgetting")
    want = (mft, mfn, maa, bwt_over_T, bwt, forgetting)
    assert [found[key] for key in keys] == pytest.approx(want, abs=5e-5)


def test_every_metric_of_a_small_matrix_is_what_a_hand_computes():
    found = summarize(FULL, initial=[0.3, 0.05, 0.25], single=[0.7, 0.95, 0.9])
    rows = found.pop("per_task")
    assert found == pytest.approx(
        {
            "average_accuracy": (0.5 + 0.4 + 0.7) / 3,
            "average_incremental_accuracy": (0.6 + (0.8 + 0.9) / 2 + (0.5 + 0.4 + 0.7) / 3) / 3,
            "learning_accuracy": (0.6 + 0.9 + 0.7) / 3,
            "bwt": ((0.5 - 0.6) + (0.4 - 0.9)) / 2,
            "bwt_over_T": ((0.5 - 0.6) + (0.4 - 0.9)) / 3,
            "fwt": ((0.1 - 0.05) + (0.3 - 0.25)) / 2,
            "forgetting": ((0.8 - 0.5) + (0.9 - 0.4)) / 2,
            "intransigence": ((0.7 - 0.6) + (0.95 - 0.9) + (0.9 - 0.7)) / 3,
            "worst_case_accuracy": 0.7 / 3 + (2 / 3) * (min(0.8, 0.5) + 0.4) / 2,
        }
    )
    assert rows[0] == pytest.approx(
        {"task": 0, "first": 0.3, "learned": 0.6, "best": 0.8, "final": 0.5, "bwt": -0.1, "forgetting": 0.3}
    )
    assert rows[2]["bwt"] is None and rows[2]["forgetting"] is None
    assert rows[2]["best"] == rows[2]["learned"] == rows[2]["final"] == 0.7


def test_the_keys_are_exactly_the_defined_ones():
    assert set(summarize(ORDER_1)) == {*DEFINITIONS, "per_task"}
    assert set(DEFINITIONS) == {
        "average_accuracy", "average_incremental_accuracy", "learning_accuracy", "bwt", "bwt_over_T", "fwt",
        "forgetting", "intransigence", "worst_case_accuracy",
    }  # fmt: skip


def test_the_definition_is_part_of_the_printed_name():
    assert label("bwt") == "bwt (mean over i<T of R[T,i]-R[i,i])"
    assert all(label(key).startswith(f"{key} (") for key in DEFINITIONS)


def test_with_one_task_nothing_can_be_forgotten_or_transferred():
    found = summarize([[0.7]], initial=[0.1], single=[0.8])
    assert {key for key in DEFINITIONS if found[key] is None} == {"bwt", "bwt_over_T", "fwt", "forgetting"}
    assert found["average_accuracy"] == found["learning_accuracy"] == found["worst_case_accuracy"] == 0.7
    assert found["intransigence"] == pytest.approx(0.1)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_joint_training_has_an_average_accuracy_and_nothing_else(n):
    found = summarize([*[[None] * n] * (n - 1), [0.7] * n], initial=[0.1] * n, single=[0.9] * n)
    assert [key for key in DEFINITIONS if found[key] is not None] == ["average_accuracy"]
    assert found["per_task"][0]["final"] == 0.7 and found["per_task"][0]["learned"] is None


@pytest.mark.parametrize(
    ("hole", "lost"),
    [
        ((2, 0), {"average_accuracy", "average_incremental_accuracy", "bwt", "bwt_over_T", "forgetting",
                  "worst_case_accuracy"}),
        ((1, 1), {"average_incremental_accuracy", "learning_accuracy", "bwt", "bwt_over_T", "forgetting",
                  "intransigence"}),
        ((1, 0), {"average_incremental_accuracy", "forgetting", "worst_case_accuracy"}),
        ((0, 1), {"fwt"}),
        ((0, 2), set()),
    ],
)  # fmt: skip
def test_a_metric_is_undefined_exactly_when_an_entry_of_its_formula_is_missing(hole, lost):
    holed = FULL.copy()
    holed[hole] = NAN
    found = summarize(holed, initial=[0.1] * 3, single=[0.9] * 3)
    assert {key for key in DEFINITIONS if found[key] is None} == lost


def test_transfer_and_intransigence_need_their_reference_scores():
    found = summarize(FULL)
    assert found["fwt"] is None and found["intransigence"] is None
    assert summarize(FULL, initial=[NAN, NAN, 0.2])["fwt"] is None
    assert summarize(FULL, initial=[NAN, 0.1, 0.2])["fwt"] is not None, "the first task's baseline is not needed"


def test_where_lower_is_better_differences_change_sign_and_levels_keep_their_unit():
    perplexity = [[20.0, NAN], [50.0, 10.0]]
    found = summarize(perplexity, initial=[90.0, 60.0], higher_is_better=False)
    assert found["forgetting"] == 30.0 and found["bwt"] == -30.0
    assert found["average_accuracy"] == 30.0 and found["learning_accuracy"] == 15.0
    assert found["worst_case_accuracy"] == 10.0 / 2 + 50.0 / 2
    assert found["per_task"][0] == {
        "task": 0, "first": 90.0, "learned": 20.0, "best": 20.0, "final": 50.0, "bwt": -30.0, "forgetting": 30.0,
    }  # fmt: skip


def test_tasks_of_both_directions_have_rows_but_no_totals():
    found = summarize([[0.9, NAN], [0.5, 10.0]], higher_is_better=[True, False])
    assert all(found[key] is None for key in DEFINITIONS)
    assert found["per_task"][0]["forgetting"] == pytest.approx(0.4)
    assert found["per_task"][1]["final"] == 10.0


def test_an_infinite_score_gives_no_number_and_no_warning():
    found = summarize([[math.inf, NAN], [math.inf, 3.0]], higher_is_better=False)
    assert found["bwt"] is None and found["average_accuracy"] == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"R": []}, "square"),
        ({"R": [[1.0, 2.0]]}, r"shape \(1, 2\)"),
        ({"R": [[1.0], [1.0, 2.0]]}, "`R` must be numbers"),
        ({"R": [["x"]]}, "`R` must be numbers"),
        ({"R": [[1.0]], "initial": [1.0, 2.0]}, r"`initial` .* shape \(1,\)"),
        ({"R": [[1.0]], "single": 3.0}, r"`single` .* shape \(1,\)"),
        ({"R": [[1.0]], "higher_is_better": [True, False]}, "higher_is_better"),
    ],
)
def test_a_shape_that_does_not_fit_is_an_error_that_names_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        summarize(**arguments)


@properties
@given(matrices())
def test_the_inputs_are_never_changed(R):
    nested, before = R.tolist(), R.copy()
    initial = R[0].copy()
    summarize(R, initial=initial, single=R[-1], higher_is_better=False)
    summarize(nested)
    assert np.array_equal(R, before) and nested == before.tolist() and np.array_equal(initial, before[0])


@properties
@given(matrices(1))
def test_every_metric_stays_within_its_stated_bounds(R):
    found = summarize(R, initial=R[0], single=R[-1])
    for key, definition in DEFINITIONS.items():
        if found[key] is not None:
            low, high = definition.bounds
            assert low - 1e-12 <= found[key] <= high + 1e-12, key


@properties
@given(matrices(), st.floats(-5, 5), st.floats(0.1, 100))
def test_levels_follow_a_shift_and_scale_of_the_scores_and_differences_only_the_scale(R, shift, scale):
    initial, single = R[0], R[-1]
    plain = summarize(R, initial, single)
    moved = summarize(R * scale + shift, initial * scale + shift, single * scale + shift)
    for key in DEFINITIONS:
        level = key.endswith("accuracy")
        want = plain[key] * scale + (shift if level else 0)
        assert moved[key] == pytest.approx(want, rel=1e-9, abs=1e-9), key


@properties
@given(matrices(), st.randoms(use_true_random=False))
def test_the_order_of_old_tasks_does_not_matter_when_they_were_measured_only_at_their_own_and_the_last_row(R, rng):
    n = len(R)
    order = [*rng.sample(range(n - 1), n - 1), n - 1]
    last, diagonal = R[-1], R.diagonal()

    def matrix(last, diagonal):
        out = np.full((n, n), NAN)
        out[np.arange(n), np.arange(n)] = diagonal
        out[-1] = [*last[:-1], diagonal[-1]]
        return summarize(out)

    for key in ("average_accuracy", "learning_accuracy", "bwt", "bwt_over_T"):
        assert matrix(last, diagonal)[key] == pytest.approx(matrix(last[order], diagonal[order])[key], abs=1e-12)


@properties
@given(matrices())
def test_forgetting_is_at_least_minus_bwt_and_the_two_bwt_differ_by_their_divisor(R):
    found, n = summarize(R), len(R)
    assert found["forgetting"] >= -found["bwt"] - 1e-12
    assert found["bwt_over_T"] == pytest.approx(found["bwt"] * (n - 1) / n)
    assert found["worst_case_accuracy"] <= found["average_accuracy"] + 1e-12


@properties
@given(matrices())
def test_turning_all_scores_round_turns_the_direction_round(R):
    up, down = summarize(R, R[0], R[-1]), summarize(-R, -R[0], -R[-1], higher_is_better=False)
    for key in DEFINITIONS:
        sign = -1 if key.endswith("accuracy") else 1
        assert down[key] == pytest.approx(sign * up[key])


@properties
@given(matrices(), st.data())
def test_entries_that_no_formula_names_change_nothing(R, data):
    n = len(R)
    lower = np.where(np.tri(n, dtype=bool), R, NAN)
    full, part = summarize(R), summarize(lower)
    assert {k: full[k] for k in DEFINITIONS} == {k: part[k] for k in DEFINITIONS}
    row, column = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1))
    if column > row:
        lower[row, column] = data.draw(st.floats(0, 1))
        assert summarize(lower)["forgetting"] == part["forgetting"]


@properties
@given(matrices())
def test_forgetting_and_bwt_agree_with_avalanche_where_the_definitions_coincide(R):
    from clkit.tasks.avalanche import importing

    with importing():
        from avalanche.evaluation.metrics.forgetting_bwt import BWT, Forgetting

    R[:, :] = np.minimum(R, R.diagonal())  # never above "just learned": then the best score is the learned one
    n, forgetting, bwt = len(R), Forgetting(), BWT()
    for metric in (forgetting, bwt):
        for k in range(n):
            for i in range(k + 1):
                metric.update(i, R[k, i], initial=i == k)
    found = summarize(R)
    assert found["forgetting"] == pytest.approx(np.mean([forgetting.result()[i] for i in range(n - 1)]))
    assert found["bwt"] == pytest.approx(np.mean([bwt.result()[i] for i in range(n - 1)]))
    assert [row["forgetting"] for row in found["per_task"][:-1]] == pytest.approx(
        [forgetting.result()[i] for i in range(n - 1)]
    )


class TestWherePeersDiffer:
    """One matrix per known pitfall: what a peer would print, and what is printed here."""

    def test_forgetting_is_measured_from_the_best_score_not_from_the_first_one(self):
        # Avalanche: a(i,i) - a(T,i), so its forgetting is always minus its backward transfer.
        found = summarize(FULL)
        assert -found["bwt"] == pytest.approx(0.3) and found["forgetting"] == pytest.approx(0.4)

    def test_rows_before_a_task_was_learned_are_no_best_score(self):
        # Renate: max over k<T from the first row on; a task known beforehand would count as forgotten.
        R = [[0.5, 0.9, 0.0], [0.5, 0.6, 0.0], [0.5, 0.6, 0.7]]
        assert summarize(R)["forgetting"] == 0.0

    def test_forgetting_is_negative_when_old_tasks_got_better(self):
        # Mammoth, PILOT, PyCIL: max over all rows with the last one and zero padding, so never below 0.
        R = [[0.5, NAN, NAN], [0.6, 0.7, NAN], [0.8, 0.9, 0.7]]
        assert summarize(R)["forgetting"] == pytest.approx((-0.2 - 0.2) / 2)

    def test_entries_not_measured_are_not_zeros(self):
        # Zero padding would leave the average accuracy at 0.3 and find a forgetting of 0.
        found = summarize([[0.6, NAN], [NAN, 0.6]])
        assert found["average_accuracy"] is None and found["forgetting"] is None

    def test_a_nested_list_of_the_caller_is_not_changed(self):
        # Mammoth pads the caller's own rows.
        ragged_filled = [[0.6, None], [0.4, 0.5]]
        before = copy.deepcopy(ragged_filled)
        summarize(ragged_filled)
        assert ragged_filled == before

    def test_transfer_is_measured_from_the_untouched_model(self):
        # Mammoth measures the baseline just before each task, with the trained model: about 0 by construction.
        R = [[0.9, 0.4], [0.8, 0.9]]
        assert summarize(R, initial=[0.1, 0.1])["fwt"] == pytest.approx(0.3)
        assert summarize(R, initial=R[0])["fwt"] == 0.0
        assert summarize(R)["fwt"] is None

    def test_columns_are_tasks_by_position_for_more_than_ten_of_them(self):
        # PyCIL sorts column names as strings ("100-119" before "20-39"), which permutes the matrix.
        n = 12
        R = np.where(np.tri(n, dtype=bool), 0.5, NAN)
        R[10:, 10] = 0.9
        R[11, 10] = 0.1
        rows = summarize(R)["per_task"]
        assert [row["task"] for row in rows] == list(range(n))
        assert [round(row["forgetting"], 6) for row in rows[:-1]] == [0.0] * 10 + [0.8]

    def test_a_failed_evaluation_is_no_score(self):
        # LLMCL writes -1 into the table and averages it.
        assert summarize([[0.9, NAN], [0.7, NAN]])["average_accuracy"] is None

    def test_a_score_missing_at_the_end_makes_forgetting_undefined_not_zero(self):
        # Avalanche leaves it out silently when the ids of train and evaluation experiences differ.
        found = summarize([[0.9, NAN, NAN], [0.5, 0.9, NAN], [NAN, 0.4, 0.9]])
        assert found["forgetting"] is None
        assert found["per_task"][0]["forgetting"] is None
        assert found["per_task"][1]["forgetting"] == pytest.approx(0.5)
