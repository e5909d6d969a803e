"""Exact match, tolerant match and ROUGE-L of single texts."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit.metrics.text import exact_match, first_option, rouge_l, tolerant_match

properties = settings(derandomize=True, deadline=None)
LETTERS = ("A", "B", "C")
TOPICS = ("World", "Sports", "Business", "Science or Technology")
NLI = ("entailment", "neutral", "contradiction")
MOODS = ("very negative", "negative", "neutral", "positive", "very positive")
LABELLED = ("A. dovish", "B. hawkish", "C. neutral")


def test_exact_match_forgives_white_space_at_the_ends_and_nothing_else():
    assert exact_match("  New York\n", "New York")
    assert not exact_match("New  York", "New York")
    assert not exact_match("new york", "New York")
    assert not exact_match("New York.", "New York")


@pytest.mark.parametrize(
    ("word", "other"),
    [("दिन", "दान"), ("பாடு", "பேடு"), ("น้า", "นา"), ("عَلِم", "عُلِم"), ("x\u0302", "x\u0304")],
    ids=["Hindi", "Tamil", "Thai", "Arabic", "accents"],
)
def test_words_that_differ_in_vowel_signs_or_tones_are_different(word, other):
    assert not tolerant_match(word, other) and tolerant_match(f"{word}.", word)
    assert first_option(other, [word, other]) == 1
    assert rouge_l(word, other).f1 < 1 == rouge_l(word, word).f1


def test_text_without_spaces_is_compared_by_its_characters():
    assert tolerant_match("คำตอบคือกรุงเทพ", "กรุงเทพ")
    assert rouge_l("日本。", "日・本") == (1, 1, 1)


@pytest.mark.parametrize(
    ("prediction", "gold", "options", "right"),
    [
        # letters
        ("B", "B", LETTERS, True),
        ("(B)", "B", LETTERS, True),
        ("B.", "B", LETTERS, True),
        (" b\n", "B", LETTERS, True),
        ("Answer: B", "B", LETTERS, True),
        ("answer: b", "B", LETTERS, True),
        ("**Answer:** (B) hawkish", "B", LETTERS, True),
        ("The answer is B because rates rise.", "B", LETTERS, True),
        ("The correct option is (b).", "B", LETTERS, True),
        ("A good question. Answer: B", "B", LETTERS, True),
        ("A good question. Answer: B", "A", LETTERS, False),
        ("A is wrong, the answer is C", "C", LETTERS, True),
        ("A is right", "A", LETTERS, True),
        ("A dovish view", "A", LETTERS, False),
        ("Answer: A dovish", "A", LETTERS, True),
        ("A, not B", "A", LETTERS, True),
        ("B or C", "B", LETTERS, True),
        ("B or C", "C", LETTERS, False),
        ("C", "B", LETTERS, False),
        ("Because of inflation", "B", LETTERS, False),
        ("B2B sales", "B", LETTERS, False),
        ("a lot of bread", "A", LETTERS, False),
        ("\uff22", "B", LETTERS, True),  # full-width letter
        ("Let me see.\nB", "B", LETTERS, True),
        ("", "B", LETTERS, False),
        ("D", "B", LETTERS, False),
        ("A or B? Answer: B", "B", LETTERS, True),
        ("A or B? Answer: B", "A", LETTERS, False),
        # options as words
        ("Sports", "Sports", TOPICS, True),
        ("sports.", "Sports", TOPICS, True),
        ("It is about SPORTS, not Business", "Sports", TOPICS, True),
        ("It is about SPORTS, not Business", "Business", TOPICS, False),
        ("The topic is not World. Answer: the Sports", "Sports", TOPICS, True),
        ("science or technology", "Science or Technology", TOPICS, True),
        ("Science and Technology", "Science or Technology", TOPICS, False),
        ("Worldwide sports events", "World", TOPICS, False),
        ("Worldwide sports events", "Sports", TOPICS, True),
        ("contradiction\n\nneutral", "contradiction", NLI, True),
        ("contradict", "contradiction", NLI, False),
        ("very positive", "very positive", MOODS, True),
        ("very positive", "positive", MOODS, False),
        ("positive", "very positive", MOODS, False),
        ("very  Negative!", "very negative", MOODS, True),
        # options with a letter and words
        ("B", "B. hawkish", LABELLED, True),
        ("hawkish", "B. hawkish", LABELLED, True),
        ("(B) hawkish", "B. hawkish", LABELLED, True),
        ("The stance is hawkish", "C. neutral", LABELLED, False),
        # no options: phrases of the first line
        ("Paris", "Paris", None, True),
        ("paris.", "Paris", None, True),
        ("The Paris", "Paris", None, True),
        ("It is Paris, the capital of France.", "Paris", None, True),
        ("Parisian", "Paris", None, False),
        ("I do not know.\nParis", "Paris", None, False),
        ("\n\n  Paris\nRome", "Paris", None, True),
        ("New York City", "New York", None, True),
        ("York, new", "New York", None, False),
        ("United States", "the United States", None, True),
        ("the", "the", None, True),
        ("of the", "the", None, False),
        ("1,000 people", "1000", None, True),
        ("10000", "1000", None, False),
        ("It is .5", "5", None, False),
        ("It is -.5.", "-0.5", None, True),
        ("$0.50", ".50", None, True),
        ("It was ...5", "5", None, True),
        (".25", "25", ("25", "0.25"), False),
        ("3.5", "3", None, False),
        ("-3", "3", None, False),
        ("x = -3.", "-3", None, True),
        ("covid 19", "COVID-19", None, True),
        ("C++", "C", None, False),
        ("Stra\u00dfe", "STRASSE", None, True),
        ("\ufb01rst", "first", None, True),  # ligature
        ("don\u2019t", "don't", None, True),
        ("\u7b54\u6848\u662f\u5df4\u9ece\u3002", "\u5df4\u9ece", None, True),
        ("", "Paris", None, False),
        ("Paris", "", None, False),
        ("...", "!", None, False),
        (" >= ", ">=", None, True),
        (">", ">", ("<", ">"), True),
        ("<", ">", ("<", ">"), False),
        # no options, a letter with an explanation
        ("B\nBecause of the scar.", "B\nOrganisms have traits.", None, True),
        ("A dog", "A", None, False),
        ("(A)", "A", None, True),
        ("B, then A", "A", None, False),
    ],
)
def test_tolerant_match_decides_as_a_reader_would(prediction, gold, options, right):
    assert tolerant_match(prediction, gold, options) is right


def test_tolerant_match_does_not_understand_negation_or_hedging():
    assert tolerant_match("not Paris", "Paris")
    assert tolerant_match("Paris or Rome", "Rome")


def test_a_gold_answer_that_is_no_option_is_an_error():
    with pytest.raises(ValueError, match=r"'Politics' is not among the options"):
        tolerant_match("World", "Politics", TOPICS)


def test_the_first_option_named_is_found_by_its_index():
    assert first_option("neutral, or a contradiction", NLI) == 1
    assert first_option("no idea", NLI) is None


@properties
@given(st.sampled_from(TOPICS + NLI + MOODS), st.sampled_from(["{}", " {}. ", "Answer: {}", "({})", "It is {}!"]))
def test_an_answer_in_any_usual_frame_matches_itself(answer, frame):
    assert tolerant_match(frame.format(answer), answer)
    assert tolerant_match(frame.format(answer.upper()), answer.lower())


@properties
@given(st.text(max_size=60), st.text(max_size=20))
def test_no_text_makes_tolerant_match_fail(prediction, gold):
    assert tolerant_match(prediction, gold) in (True, False)
    assert first_option(prediction, LABELLED) in (None, 0, 1, 2)


def test_rouge_l_is_the_longest_common_subsequence_over_the_lengths():
    found = rouge_l("the cat sat on mats", "The cat, on the mat")
    assert found.precision == 3 / 5 and found.recall == 3 / 5 and found.f1 == pytest.approx(3 / 5)
    assert rouge_l("a b c d", "b d").recall == 1.0
    assert rouge_l("same words here", "same words here").f1 == 1.0


def test_rouge_l_of_an_empty_text_is_zero():
    assert rouge_l("", "word") == rouge_l("word", "") == rouge_l("", "") == (0.0, 0.0, 0.0)
    assert rouge_l("x", "y") == (0.0, 0.0, 0.0)


def test_rouge_l_reads_scripts_that_the_rouge_score_package_drops():
    assert rouge_l("\u5df4\u9ece\u5f88\u7f8e", "\u5df4\u9ece\u7f8e").recall == 1.0
    assert rouge_l("\u00fcber Nacht", "\u00dcBER Nacht").f1 == 1.0
    assert rouge_l("\u043c\u043e\u0441\u043a\u0432\u0430", "\u043c\u043e\u0441\u043a\u0432\u0430").f1 == 1.0


def test_rouge_l_agrees_with_the_rouge_score_package_on_ascii_text():
    from rouge_score.rouge_scorer import RougeScorer

    scorer, rng = RougeScorer(["rougeL"], use_stemmer=False), random.Random(0)
    words = ["the", "cat", "The", "dog's", "on", "2024", "mat,", "a-b", "it.", "under_score", "x"]
    for _ in range(200):
        prediction = " ".join(rng.choices(words, k=rng.randint(0, 30)))
        reference = " ".join(rng.choices(words, k=rng.randint(0, 30)))
        theirs = scorer.score(reference, prediction)["rougeL"]
        assert tuple(rouge_l(prediction, reference)) == pytest.approx(tuple(theirs), abs=1e-12)
