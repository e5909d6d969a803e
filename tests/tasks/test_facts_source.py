"""The generator of invented facts."""

from __future__ import annotations

import json

import pytest

from clkit.errors import ConfigError, DataError
from clkit.tasks import build_tasks
from clkit.tasks.facts import FactsConfig, edits, invent
from clkit.tasks.facts_words import COMMON_FACTS, RELATIONS


def test_each_relation_is_a_task_about_the_same_people():
    tasks = build_tasks("facts", seed=0)
    assert [t.name for t in tasks] == ["city", "job", "instrument"]
    assert tasks.scenario == "domain"
    people = [{r.subject for r in t.train.records} for t in tasks]
    assert len(people[0]) == 12 and people[0] == people[1] == people[2]
    assert all(t.metric == "exact-match" and len(t.train) == 24 for t in tasks)
    ids = [i for t in tasks for i in t.train.ids]
    assert len(set(ids)) == len(ids)


def test_groups_of_people_are_tasks_with_all_relations_and_nobody_is_lost():
    tasks = build_tasks("facts", {"split": "people", "people": 10, "num_tasks": 3})
    people = [{r.subject for r in t.train.records} for t in tasks]
    assert [len(p) for p in people] == [4, 3, 3] and len(set.union(*people)) == 10
    assert {r.id.partition("/")[0] for r in tasks[2].train.records} == {"city", "job", "instrument"}


def test_the_seed_decides_everything():
    def prints(seed: int) -> list[str]:
        return [t.train.fingerprint() for t in build_tasks("facts", seed=seed)]

    assert prints(5) == prints(5) and prints(5) != prints(6)


def test_more_people_and_relations_leave_the_facts_as_they_were():
    small = invent(FactsConfig(people=5, relations=["job"]), 3)
    large = invent(FactsConfig(people=60, relations=["city", "job"]), 3)
    assert small == [f for f in large if f.relation == "job"][:5]


def test_names_are_unique_word_by_word_and_answers_come_back_only_when_used_up():
    facts = invent(FactsConfig(people=1000, relations=["city"]), 0)
    words = [w for f in facts for w in f.person.split()]
    assert len(words) == 2000 == len(set(words))
    assert not {w.lower() for w in words} & {a.lower() for r in RELATIONS.values() for a in r.answers}
    cities = RELATIONS["city"].answers
    assert sorted(f.answer for f in facts[: len(cities)]) == sorted(cities)


@pytest.mark.parametrize("name", RELATIONS)
def test_the_words_of_a_relation_are_usable(name):
    relation = RELATIONS[name]
    questions = [*relation.trained, *relation.paraphrases]
    assert len(set(questions)) == len(questions) and all(q.count("{}") == 1 for q in questions)
    assert len(relation.paraphrases) >= 2
    assert len({a.lower() for a in relation.answers}) == len(relation.answers) == 24
    assert all(" " not in a and len(a) <= 12 for a in relation.answers)


def test_evaluation_asks_trained_questions_or_paraphrases():
    def prompts(on: str) -> set[str]:
        return {r.prompt for r in build_tasks("facts", {"eval_on": on, "people": 3})[0].eval.records}

    task = build_tasks("facts", {"people": 3})[0]
    trained = {r.prompt for r in task.train.records}
    assert prompts("trained") == trained
    assert not prompts("paraphrase") & trained
    assert prompts("both") == trained | prompts("paraphrase")
    assert {p["prompt"] for p in task.metadata["paraphrases"]} == prompts("paraphrase")
    answers = {r.subject: r.answer for r in task.train.records}
    in_other_words = build_tasks("facts", {"people": 3, "eval_on": "paraphrase"})[0].eval.records
    assert all(answers[r.subject] == r.answer for r in in_other_words)


def test_metadata_is_json_and_has_locality_questions_from_elsewhere():
    task = build_tasks("facts", {"split": "people"})[0]
    locality = json.loads(json.dumps(task.metadata))["locality"]
    people = {r.subject for r in task.train.records}
    assert {p["prompt"] for p in locality} > {q for q, _ in COMMON_FACTS}
    assert len(locality) > len(COMMON_FACTS)
    assert not any(person in p["prompt"] for p in locality for person in people)


def test_options_contain_the_answer_and_nothing_twice():
    tasks = build_tasks("facts", {"metric": "option-loglik", "options": 4, "holdout": True})
    for task in (*tasks, *tasks.holdout):
        for record in task.eval.records:
            assert len(set(record.options)) == 4 and record.answer in record.options
    assert [t.name for t in tasks.holdout] == ["common-facts"] and len(tasks.holdout[0].train) == 0


def test_edits_change_known_facts_and_ask_about_untouched_ones():
    config = FactsConfig(people=6)
    known = {f.trained(1)[0].prompt: f.answer for f in invent(config, 1)}
    real = dict(COMMON_FACTS)
    records = edits(config, 1, count=15).records
    assert len({r.id for r in records}) == 15
    for record in records:
        assert known[record.prompt] != record.target_new
        assert record.subject in record.prompt and record.subject in record.rephrase_prompt
        assert record.prompt != record.rephrase_prompt
        assert {**known, **real}[record.locality_prompt] == record.locality_answer
        assert record.locality_prompt not in {r.prompt for r in records}
    assert [(r.id, r.target_new) for r in edits(config, 1).records] == [(r.id, r.target_new) for r in records[:9]]
    with pytest.raises(DataError, match="16 edits asked for, but only 15 of 18"):
        edits(config, 1, count=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relations": ["citty"]}, "unknown relation 'citty'. Did you mean 'city'?"),
        ({"relations": []}, "is empty; choose from city"),
        ({"relations": ["job", "job"]}, "names a relation twice"),
        ({"split": "people", "people": 2}, "more tasks than people (got 3, expected at most 2)"),
        ({"metric": "option-loglik"}, "needs at least 2 answers (metric 'option-loglik', got 0)"),
        ({"options": 1}, "a choice needs at least 2 answers"),
        ({"options": 25}, "the closed lists have 24 answers (got 25)"),
    ],
)
def test_wrong_options_are_told(options, message):
    with pytest.raises(ConfigError) as error:
        build_tasks("facts", options)
    assert message in str(error.value)
