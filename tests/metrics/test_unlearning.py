"""TOFU's and MUSE's metrics: hand-made cases, the published check numbers, agreement with scipy and rouge-score."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats

from clkit.metrics.stem import stem
from clkit.metrics.text import rouge_l
from clkit.metrics.unlearning import (
    CRITICAL_05,
    choice_probability,
    forget_quality,
    knowledge_memory,
    model_utility,
    privacy_leakage,
    probability,
    rouge_l_recall,
    truth_ratio,
    truth_ratio_forget,
    truth_ratio_retain,
    verbatim_memory,
)

properties = settings(derandomize=True, deadline=None, max_examples=40)
LADDER = np.arange(40) / 40


def test_probability_is_the_mean_of_exp_of_minus_the_loss():
    assert probability([math.log(2), math.log(4)]) == pytest.approx((0.5 + 0.25) / 2)


def test_choice_probability_is_the_right_answers_share_and_does_not_underflow():
    right, wrong = [math.log(2), 2000.0], [[math.log(4), math.log(4), math.log(8)], [2000.0, 2000.0, 2000.0]]
    assert choice_probability(right, wrong) == pytest.approx((0.5 / (0.5 + 0.25 + 0.25 + 0.125) + 0.25) / 2)


def test_the_truth_ratio_has_three_forms():
    right, wrong = [-math.log(0.5)], [[-math.log(0.2), -math.log(0.8)]]
    assert truth_ratio(right, wrong) == pytest.approx([math.sqrt(0.2 * 0.8) / 0.5])
    assert truth_ratio(right, wrong, "paper") == pytest.approx([0.5 / 0.5])
    assert truth_ratio(right, wrong, "prob_mean") == pytest.approx([0.5 / (0.5 + 0.5)])
    with pytest.raises(ValueError, match="`form` must be"):
        truth_ratio(right, wrong, "geometric")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="M >= 1"):
        truth_ratio([1.0, 2.0], [[1.0]])


def test_truth_ratio_aggregates_are_those_of_the_reference_which_uses_the_reciprocal():
    ratios = np.array([0.25, 1.0, 4.0])
    assert truth_ratio_forget(ratios) == pytest.approx((0.25 + 1 + 0.25) / 3)
    assert truth_ratio_retain(ratios) == pytest.approx((0.75 + 0 + 0) / 3)
    inverse = 1 / ratios
    assert truth_ratio_forget(ratios) == pytest.approx(np.minimum(inverse, 1 / inverse).mean())
    assert truth_ratio_retain(ratios) == pytest.approx(np.maximum(0, 1 - 1 / inverse).mean())
    assert truth_ratio_forget([0.0, math.inf]) == 0, "an answer that is certainly right or wrong is told apart"


def test_model_utility_is_a_harmonic_mean_zero_with_a_zero_and_undefined_without_a_part():
    assert model_utility([0.2, 0.4, 0.8]) == pytest.approx(stats.hmean([0.2, 0.4, 0.8]))
    assert model_utility([0.9] * 8 + [0.0]) == 0
    assert model_utility([0.9] * 8 + [None]) is None and model_utility([0.9, math.nan]) is None
    assert model_utility([]) is None
    with pytest.raises(ValueError, match="negative"):
        model_utility([-0.1, 1.0])


@pytest.mark.parametrize(
    ("a", "b", "distance", "p"),
    [
        (LADDER, LADDER + 0.1, 0.125, 0.9188052214),
        (np.arange(200) / 200, np.arange(200) / 200 + 0.1, 0.105, 0.2205412176),
        ([0.1, 0.2, 0.3, 0.4, 0.5], [0.15, 0.25, 0.35, 0.45, 0.55, 0.9], 1 / 3, 0.8181818),
    ],
)
def test_forget_quality_gives_the_check_numbers(a, b, distance, p):
    found = forget_quality(a, b)
    assert found.distance == pytest.approx(distance) and found.p_value == pytest.approx(p, rel=1e-6)
    assert found.n == (len(a), len(b))


@pytest.mark.parametrize(
    ("moved", "p"),
    [(4, 0.9900), (5, 0.9188), (6, 0.7659), (7, 0.5786), (8, 0.4046), (9, 0.2657), (10, 0.1650), (12, 0.0541),
     (15, 0.00676)],
)  # fmt: skip
def test_with_forty_questions_the_p_value_is_a_ladder(moved, p):
    found = forget_quality(LADDER, np.concatenate([LADDER[moved:], 2 + LADDER[:moved]]))
    assert found.distance == pytest.approx(moved / 40) and found.p_value == pytest.approx(p, abs=5e-5)


# The result tables of DP2Unlearning's repository: nine means (real authors, real world, retained; of each ROUGE,
# probability, truth ratio), the utility and forget quality it gives for them, and of how many forgotten rows.
PUBLISHED = {
    "DP-MLM, epsilon 1, retain95": (
        [0.495833333, 0.339147817, 0.409706445, 0.810541311, 0.404013041, 0.481363519, 0.996417979, 0.992185154, 0.493307001],
        0.522311551, 0.92383742, 200,
    ),
    "rewritten data, epsilon 1, retain90": (
        [0.4618333333, 0.3369953477, 0.3983550336, 0.8048433048, 0.3964061490, 0.4788747504, 0.9908227113, 0.9910771512, 0.4958290625],
        0.5133625957, 0.5849809189, 300,
    ),
    "not forgotten, against retain95": (
        [0.5845, 0.3684659371, 0.4419218864, 0.8269230769, 0.4014510310, 0.4795859010, 1.0, 0.9873163752, 0.4964411451],
        0.5454464532, 8.330858010549734e-16, 200,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_tables_come_out(name):
    parts, utility, quality, rows = PUBLISHED[name]
    assert model_utility(parts) == pytest.approx(utility, rel=1e-8)
    # With as many rows there are so many steps that a p-value can have; the published one must be one of them.
    steps = np.arange(rows)
    ladder = [forget_quality(steps, steps + moved).p_value for moved in range(1, rows // 2)]
    assert min(abs(p / quality - 1) for p in ladder) < 1e-8


def test_forget_quality_where_the_exact_value_rounds_to_more_than_one():
    found = forget_quality(np.arange(400.0), np.r_[np.arange(5.0, 400.0), np.full(5, 500.0)])
    assert found.p_value == pytest.approx(1) and found.distance == pytest.approx(5 / 400)


def test_forget_quality_is_the_same_for_the_reciprocal_ratio():
    a, b = LADDER + 0.5, LADDER**2 + 0.7
    assert forget_quality(a, b) == forget_quality(1 / a, 1 / b)


def test_the_equivalence_bound_covers_the_true_gap_nineteen_times_in_twenty_and_is_narrow_only_with_many_questions():
    assert pytest.approx(stats.kstwobign.isf(0.05), abs=1e-4) == CRITICAL_05
    draw = np.random.default_rng(0)
    gap = stats.norm.cdf(0.5) - stats.norm.cdf(-0.5)  # between N(0, 1) and N(1, 1)
    bounds = [forget_quality(draw.normal(size=60), draw.normal(1, size=60)).bound for _ in range(200)]
    assert np.mean(np.array(bounds) >= gap) >= 0.95
    same = np.arange(4000) / 4000
    assert forget_quality(LADDER, LADDER).bound > 0.3 > 0.05 > forget_quality(same, same).bound
    assert forget_quality(LADDER[:2], LADDER[:2] + 9).bound == 1


def test_rouge_check_numbers():
    found = rouge_l("The full name of the author is Hina Ameen.", "The author's name is Hina Ameen.")
    assert (found.precision, found.recall, found.f1) == pytest.approx((0.5556, 0.7143, 0.625), abs=5e-5)
    assert rouge_l("a c e b d", "a b c d e").f1 == pytest.approx(0.6)
    assert rouge_l_recall(["The capital of France is Paris."], ["Paris"]) == 1
    assert rouge_l_recall(["He writes novels"], ["He wrote a novel"]) == 0.5, "TOFU's recall stems"
    assert rouge_l("He writes novels", "He wrote a novel").recall == 0.25
    assert knowledge_memory(["The capital of France is Paris."], ["Paris"]) == pytest.approx(2 / 7)


@properties
@given(st.lists(st.tuples(st.text("ab c'.1", max_size=12), st.text("ab c'.1", max_size=12)), min_size=1, max_size=6))
def test_recall_and_f1_agree_with_rouge_score(pairs):
    said, true = zip(*pairs, strict=True)
    for stemmer in (False, True):
        scorer = RougeScorer(["rougeL"], use_stemmer=stemmer)
        theirs = [scorer.score(target=t, prediction=s)["rougeL"] for s, t in pairs]
        if stemmer:
            assert rouge_l_recall(said, true) == pytest.approx(np.mean([t.recall for t in theirs]))
        else:
            assert verbatim_memory(said, true) == pytest.approx(np.mean([t.fmeasure for t in theirs]))


def test_real_answers_keep_their_rouge_against_rouge_score(data_root):
    with (data_root / "tofu" / "forget10_perturbed.jsonl").open() as file:
        rows = [json.loads(line) for line in file][:60]
    said, true = [r["paraphrased_answer"] for r in rows], [r["answer"] for r in rows]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    # Ours keeps letters beyond ASCII, theirs cuts words at them: compare where both read the same.
    plain = [i for i in range(60) if (said[i] + true[i]).isascii()]
    assert len(plain) > 50
    theirs = np.mean([scorer.score(true[i], said[i])["rougeL"].recall for i in plain])
    assert rouge_l_recall([said[i] for i in plain], [true[i] for i in plain]) == pytest.approx(theirs)


def test_stems_are_those_of_the_stemmer_in_rouge_score(data_root):
    porter = pytest.importorskip("nltk.stem.porter").PorterStemmer()
    text = "".join((data_root / "tofu" / f"{name}.jsonl").read_text() for name in ("full", "world_facts_perturbed"))
    words = set(re.findall("[a-z0-9]+", text.lower())) | {
        "y",
        "apologi",
        "formalli",
        "controll",
        "feed",
        "agreed",
        "ties",
    }
    assert len(words) > 10_000
    assert [w for w in words if stem(w) != porter.stem(w)] == []


def test_privacy_leakage_is_zero_for_the_same_leak_and_signed():
    assert privacy_leakage(0.37, 0.37) == 0
    assert privacy_leakage(0.5, 0.4) == pytest.approx(-16.67, abs=5e-3), "looks more like members: under-unlearned"
    assert privacy_leakage(0.4) == pytest.approx(20), "looks less like members than chance: over-unlearned"
    assert privacy_leakage(0.5, 1.0) is None
    with pytest.raises(ValueError, match="auc_unlearned"):
        privacy_leakage(1.2)


def test_what_is_undefined_is_none_never_zero():
    assert probability([]) is None and probability([0.1, math.nan]) is None
    assert choice_probability([], []) is None
    assert rouge_l_recall([], []) is None and verbatim_memory([], []) is None
    assert truth_ratio_forget([]) is None and truth_ratio_retain([]) is None
    assert forget_quality([], LADDER) is None and forget_quality(LADDER, [0.1, math.nan]) is None


def test_inputs_are_never_changed():
    right, wrong = np.array([1.0, 2.0]), np.array([[1.0, 3.0], [0.5, 0.1]])
    before = right.copy(), wrong.copy()
    for form in ("code", "paper", "prob_mean"):
        truth_ratio(right, wrong, form)  # type: ignore[arg-type]
    choice_probability(right, wrong)
    forget_quality(right, wrong[0])
    assert (right == before[0]).all() and (wrong == before[1]).all()
