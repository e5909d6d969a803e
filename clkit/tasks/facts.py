"""Invented people and facts about them: for demonstrations of learning, editing and forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from clkit.config import opt
from clkit.errors import DataError, Problem, did_you_mean
from clkit.tasks.base import EditExamples, EditRecord, Task, TaskSequence, TextExamples, TextRecord
from clkit.tasks.facts_words import COMMON_FACTS, FIRST_ENDS, LAST_ENDS, MIDDLES, ONSETS, RELATIONS, VOWELS
from clkit.tasks.sampling import stream
from clkit.tasks.source import TaskSource

MAX_PHRASINGS = min(len(r.trained) for r in RELATIONS.values())


@dataclass
class FactsConfig:
    """By default three tasks, each about one relation of the same twelve people."""

    people: int = opt(12, "invented people", min=2, max=1000)
    relations: list[str] = opt(["city", "job", "instrument"], f"kinds of fact: {', '.join(RELATIONS)}")
    split: str = opt(
        "relation",
        "relation = each task is one relation of all people; people = each task is all relations of some people",
        choices=("relation", "people"),
    )
    num_tasks: int = opt(3, "number of tasks when split is people", min=1)
    phrasings: int = opt(2, "ways in which each fact is asked in training", min=1, max=MAX_PHRASINGS)
    eval_on: str = opt(
        "trained",
        "trained = the questions of the training set; paraphrase = other words; both",
        choices=("trained", "paraphrase", "both"),
    )
    metric: str = opt("exact-match", "score of the answers")
    options: int = opt(0, "answers to choose from, for metrics that need them; 0 = none", min=0)
    holdout: bool = opt(False, "also score real common facts after every task")


@dataclass(frozen=True)
class Fact:
    """One fact of the invented world."""

    person: str
    relation: str
    answer: str

    @property
    def key(self) -> str:
        """A readable, stable id."""
        return f"{self.relation}/{self.person.lower().replace(' ', '-')}"

    def trained(self, count: int) -> list[TextRecord]:
        """The first ``count`` training questions."""
        questions = RELATIONS[self.relation].trained[:count]
        return [self._record(question, str(k)) for k, question in enumerate(questions)]

    def paraphrases(self) -> list[TextRecord]:
        """Questions in other words, never trained on."""
        return [self._record(question, f"p{k}") for k, question in enumerate(RELATIONS[self.relation].paraphrases)]

    def _record(self, question: str, suffix: str) -> TextRecord:
        return TextRecord(question.format(self.person), self.answer, f"{self.key}/{suffix}", subject=self.person)


class FactsSource(TaskSource):
    """Text tasks about invented people; see :func:`edits` for edits of what was learned.

    Each task's metadata has ``paraphrases`` (its facts asked in other words) and ``locality`` (real common facts
    and facts about people or relations of other tasks), as lists of ``{"prompt", "answer", "id"}``.
    """

    config_class: ClassVar[type] = FactsConfig

    @classmethod
    def check(cls, config: FactsConfig) -> list[Problem]:
        """Unknown or repeated relations, more tasks than people, options that do not fit the metric."""
        problems = [
            Problem("tasks.relations", f"unknown relation '{name}'.{did_you_mean(name, RELATIONS)}")
            for name in config.relations
            if name not in RELATIONS
        ]
        if not config.relations:
            problems.append(Problem("tasks.relations", f"is empty; choose from {', '.join(RELATIONS)}"))
        if len(set(config.relations)) < len(config.relations):
            problems.append(Problem("tasks.relations", f"names a relation twice (got {list(config.relations)})"))
        if config.split == "people" and config.num_tasks > config.people:
            what = f"more tasks than people (got {config.num_tasks}, expected at most {config.people})"
            problems.append(Problem("tasks.num_tasks", what))
        if config.options == 1 or (config.metric.startswith("option-") and config.options < 2):
            what = f"a choice needs at least 2 answers (metric '{config.metric}', got {config.options})"
            problems.append(Problem("tasks.options", what))
        most = min((len(RELATIONS[name].answers) for name in config.relations if name in RELATIONS), default=0)
        if most and config.options > most:
            problems.append(Problem("tasks.options", f"the closed lists have {most} answers (got {config.options})"))
        return problems

    @classmethod
    def build(cls, config: FactsConfig, seed: int) -> TaskSequence:
        """Invent the people and ask about them.

        Raises:
            DataError: never for options that passed :meth:`check`.
        """
        facts = invent(config, seed)
        if config.split == "relation":
            groups = [(name, [f for f in facts if f.relation == name]) for name in config.relations]
        else:
            people = list(dict.fromkeys(f.person for f in facts))
            shares = np.array_split(np.arange(len(people)), config.num_tasks)
            names = [{people[i] for i in share.tolist()} for share in shares]
            groups = [(f"people-{k}", [f for f in facts if f.person in some]) for k, some in enumerate(names, start=1)]
        tasks = [_task(name, group, facts, config, seed) for name, group in groups]
        holdout = []
        if config.holdout:
            common = _with_options(_common_facts(), config.options, seed)
            holdout.append(Task("common-facts", TextExamples(()), TextExamples(common), "text", config.metric))
        return TaskSequence(tasks, holdout)


def invent(config: FactsConfig, seed: int) -> list[Fact]:
    """The facts of the invented world: every person with every relation, person by person.

    More people or more relations leave the facts that were there unchanged. Within a relation an answer comes
    back only after all others were used.
    """
    columns = {}
    for name in config.relations:
        answers, rng = RELATIONS[name].answers, stream(seed, f"answers {name}")
        rounds = -(-config.people // len(answers))
        columns[name] = [answers[i] for _ in range(rounds) for i in rng.permutation(len(answers)).tolist()]
    people = _people(config.people, stream(seed, "people"))
    return [Fact(person, name, columns[name][k]) for k, person in enumerate(people) for name in config.relations]


def edits(config: FactsConfig, seed: int, count: int = 0) -> EditExamples:
    """Edits of invented facts: a new answer for a person that the tasks taught.

    The prompt is a trained question and the rephrase a paraphrase; the locality question is, in turn, a real
    common fact and the same question about another person that no edit touches.

    Args:
        config: as given to the source.
        seed: as given to the source.
        count: number of edits; 0 = every second fact.

    Raises:
        DataError: there are not that many facts to edit; one must be left untouched in each relation.
    """
    facts = invent(config, seed)
    order = [facts[i] for i in stream(seed, "edits").permutation(len(facts)).tolist()]
    count = count or len(facts) // 2
    # One fact of each relation stays as it is, so that there is something for locality questions to ask about.
    kept = {name: next(f for f in order if f.relation == name) for name in config.relations}
    editable = [f for f in order if f is not kept[f.relation]]
    if count > len(editable):
        raise DataError(
            f"{count} edits asked for, but only {len(editable)} of {len(facts)} facts can be edited; add people."
        )
    chosen = editable[:count]
    untouched = [f for f in order if f not in set(chosen)]
    records = []
    for k, fact in enumerate(chosen):
        rng = stream(seed, f"edit {fact.key}")
        others = [a for a in RELATIONS[fact.relation].answers if a != fact.answer]
        target = others[int(rng.integers(len(others)))]
        if k % 2 == 0:
            question, answer = COMMON_FACTS[int(rng.integers(len(COMMON_FACTS)))]
        else:
            same = [f for f in untouched if f.relation == fact.relation]
            other = same[int(rng.integers(len(same)))].trained(1)[0]
            question, answer = other.prompt, other.answer
        prompt, rephrase = fact.trained(1)[0].prompt, fact.paraphrases()[0].prompt
        records.append(EditRecord(prompt, target, f"edit/{fact.key}", rephrase, question, answer, fact.person))
    return EditExamples(tuple(records))


def _people(count: int, rng: np.random.Generator) -> list[str]:
    """Names to be read aloud; no first name and no last name comes twice, so that each word points to one person."""
    taken = {a.lower() for r in RELATIONS.values() for a in r.answers}

    def name(ends: Sequence[str]) -> str:
        while True:
            parts = [p[int(rng.integers(len(p)))] for p in (ONSETS, VOWELS, MIDDLES, ends)]
            found = "".join(parts)
            if found not in taken:
                taken.add(found)
                return found.capitalize()

    return [f"{name(FIRST_ENDS)} {name(LAST_ENDS)}" for _ in range(count)]


def _task(name: str, facts: Sequence[Fact], world: Sequence[Fact], config: FactsConfig, seed: int) -> Task:
    trained = [r for f in facts for r in f.trained(config.phrasings)]
    paraphrases = [r for f in facts for r in f.paraphrases()]
    scored = {"trained": trained, "paraphrase": paraphrases, "both": trained + paraphrases}[config.eval_on]
    own = set(facts)
    elsewhere = [f for f in world if f not in own]
    others = [elsewhere[i] for i in stream(seed, f"locality {name}").permutation(len(elsewhere)).tolist()]
    locality = [*_common_facts(), *(f.trained(1)[0] for f in others[: len(COMMON_FACTS)])]
    metadata = {"paraphrases": [_plain(r) for r in paraphrases], "locality": [_plain(r) for r in locality]}
    eval_records = _with_options(scored, config.options, seed)
    train_records = _with_options(trained, config.options, seed)
    return Task(name, TextExamples(train_records), TextExamples(eval_records), "text", config.metric, metadata=metadata)


def _common_facts() -> list[TextRecord]:
    return [TextRecord(q, a, f"common/{k}") for k, (q, a) in enumerate(COMMON_FACTS)]


def _plain(record: TextRecord) -> dict[str, Any]:
    return {"prompt": record.prompt, "answer": record.answer, "id": record.id}


def _with_options(records: Sequence[TextRecord], count: int, seed: int) -> tuple[TextRecord, ...]:
    """Give each record ``count`` answers to choose from: its own and others of the same list, shuffled."""
    if count == 0:
        return tuple(records)
    result = []
    for record in records:
        relation = record.id.partition("/")[0]
        answers = RELATIONS[relation].answers if relation in RELATIONS else tuple(a for _, a in COMMON_FACTS)
        others = [a for a in answers if a != record.answer]
        rng = stream(seed, f"options {record.id}")
        shown = [record.answer, *(others[i] for i in rng.permutation(len(others))[: count - 1].tolist())]
        options = tuple(shown[i] for i in rng.permutation(len(shown)).tolist())
        result.append(TextRecord(**{**asdict(record), "options": options}))
    return tuple(result)
