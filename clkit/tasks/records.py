"""Rows of a file checked and turned into records, every problem kept, every record with a unique stable id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from clkit.config import opt
from clkit.errors import Problem, did_you_mean
from clkit.tasks.base import EditRecord, TextRecord, content_id
from clkit.tasks.readers import Row, json_reason
from clkit.tasks.splits import SplitConfig, split_problems

MAX_LABELS = 20


@dataclass
class RecordsConfig(SplitConfig):
    """How rows become records. The options of a split matter only to ``kind: classification``."""

    kind: str = opt("text", "what a record is", choices=("text", "classification", "edit"))
    metric: str = opt(
        "auto",
        "score of text and edits; auto = option-loglik for text with options, edit-exact for edits, else exact-match "
        "(classification always uses accuracy)",
    )
    options: str = opt(
        "auto",
        "answers to choose from; none = drop them; auto = as given, or the task's labels where there are at most "
        f"{MAX_LABELS} and each answer is its label; labels = like auto, and a record without options is an error",
        choices=("auto", "none", "labels"),
    )
    prompt_field: str = opt("prompt", "column of the prompt, or of the text to classify")
    answer_field: str = opt("answer", "column of the answer")
    options_field: str = opt("options", "column of the answers to choose from; '' = do not read")
    label_field: str = opt("label", "column of the class; '' = do not read")
    subject_field: str = opt("subject", "column of what a fact is about; '' = do not read")
    id_field: str = opt("id", "column of the record's id; '' = ids are made from the content")
    target_field: str = opt("target_new", "column of an edit's new answer")
    rephrase_field: str = opt("rephrase_prompt", "column of an edit's prompt in other words; '' = do not read")
    locality_prompt_field: str = opt(
        "locality_prompt", "column of a prompt that an edit must not touch; '' = do not read"
    )
    locality_answer_field: str = opt("locality_answer", "column of that prompt's answer; '' = do not read")
    eval_fraction: float = opt(0.1, "part held out for evaluation where no evaluation file is given", above=0, max=0.9)
    train_limit: int = opt(0, "training records per task (classification: per class); 0 = all", min=0)
    eval_limit: int = opt(0, "evaluation records per task (classification: per class); 0 = all", min=0)
    max_chars: int = opt(100_000, "longest text of a record in characters", min=1)
    asd: float = opt(
        0.0,
        "part of each text task's training records that is asked in other answer styles (yes/no, multiple choice, "
        "short; brief and detailed explanations where the records have some); 0 = none, published: 0.2",
        min=0,
        max=1,
    )
    explanation_field: str = opt("explanation", "column of the explanation of an answer, for asd; '' = do not read")
    explanation_after: str = opt(
        "",
        "text (such as a line break) that ends a text task's answer where its explanation follows in the same column, "
        "in training and evaluation; '' = the whole column is the answer",
    )


def record_problems(config: RecordsConfig, single: bool) -> list[Problem]:
    """Options that exclude each other.

    Args:
        config: the options.
        single: there is one data set, which a classification splits by class; else each is a task.
    """
    problems = []
    classification = config.kind == "classification"
    if classification and config.metric not in ("auto", "accuracy"):
        problems.append(Problem("tasks.metric", f"classification is scored by accuracy (got '{config.metric}')"))
    if config.asd and config.kind != "text":
        problems.append(Problem("tasks.asd", f"converts answers of text tasks (got kind '{config.kind}'); set it to 0"))
    if config.explanation_after and config.kind != "text":
        what = f"splits answers of text tasks (got kind '{config.kind}'); set it to ''"
        problems.append(Problem("tasks.explanation_after", what))
    needed = ["prompt_field", *({"text": ["answer_field"], "edit": ["target_field"]}.get(config.kind, []))]
    problems += [Problem(f"tasks.{key}", "must name a column (got '')") for key in needed if not getattr(config, key)]
    if classification and single:
        return problems + split_problems(config)
    why = "with several of them each is a task" if classification else f"kind '{config.kind}' has no classes"
    for key in ("num_tasks", "classes_per_task", "class_order", "order_seed", "domain"):
        if getattr(config, key) != SplitConfig.__dataclass_fields__[key].default and getattr(config, key) != []:
            problems.append(Problem(f"tasks.{key}", f"splits a single data set by class; {why}. Remove it"))
    return problems


@dataclass(frozen=True, slots=True)
class Parsed:
    """A record with the place it was read from and, for later checks, the hash of what it says."""

    where: str
    record: TextRecord | EditRecord
    content: str
    label: str = ""
    explanation: str | None = None


class Ids:
    """Gives every record of a sequence its id and finds ids that are used twice.

    Given ids must be unique over all files. An id made from the content is shared by a training and an evaluation
    record that say the same; inside one set the second one gets the suffix ``-2``.
    """

    def __init__(self) -> None:
        self._given: dict[str, str] = {}
        self._used: dict[str, set[str]] = {}
        self._counts: dict[tuple[str, str], int] = {}  # how many records of a set say the same

    def give(self, given: str | None, content: str, pool: str, where: str, problems: list[Problem]) -> str:
        """The record's id, unique within ``pool``."""
        used = self._used.setdefault(pool, set())
        if given is None:
            found, count = content, self._counts.get((pool, content), 1)
            while found in used:
                count += 1
                found = f"{content}-{count}"
            self._counts[pool, content] = count
            used.add(found)
            return found
        if given in self._given or given in used:
            first = self._given.get(given, "another record")
            what = f"duplicate id '{given}', first used at {first}; with id_field '' ids are made from the content"
            problems.append(Problem(where, what))
        self._given.setdefault(given, where)
        used.add(given)
        return given


class RowParser:
    """Reads typed values out of rows; what is wrong goes to ``problems`` and the row yields nothing."""

    def __init__(self, config: RecordsConfig, ids: Ids, problems: list[Problem]) -> None:
        self.config = config
        self.ids = ids
        self.problems = problems

    def parse(self, rows: Sequence[Row], pool: str) -> list[Parsed]:
        """Records of all good rows, in order. ``pool`` names the set in which ids must be unique."""
        one = {"text": self._text, "edit": self._edit, "classification": self._labelled}[self.config.kind]
        return [found for row in rows if (found := one(row, pool)) is not None]

    def _text(self, row: Row, pool: str) -> Parsed | None:
        config, before = self.config, len(self.problems)
        prompt = self._string(row, config.prompt_field)
        answer, explanation = self._answer(row)
        subject = self._string(row, config.subject_field, required=False)
        label = self._name(row, config.label_field)
        options = self._options(row, answer)
        given = self._name(row, config.id_field)
        if len(self.problems) > before:
            return None
        content = content_id({"prompt": prompt, "answer": answer})
        record_id = self.ids.give(given, content, pool, row.where, self.problems)
        record = TextRecord(prompt or "", answer or "", record_id, options, subject, label)
        return Parsed(row.where, record, content, explanation=explanation)

    def _answer(self, row: Row) -> tuple[str | None, str | None]:
        """The answer, and its explanation where there is one and `asd` will use it."""
        config = self.config
        answer = self._string(row, config.answer_field)
        explanation = self._string(row, config.explanation_field, required=False) if config.asd else None
        if answer is not None and config.explanation_after and config.explanation_after in answer:
            answer, _, rest = (part.strip() for part in answer.partition(config.explanation_after))
            explanation = explanation or rest or None
            if not answer:
                self._problem(row, f"'{config.answer_field}' is empty before its explanation")
        return answer, explanation

    def _edit(self, row: Row, pool: str) -> Parsed | None:
        config, before = self.config, len(self.problems)
        prompt = self._string(row, config.prompt_field)
        target = self._string(row, config.target_field)
        rephrase = self._string(row, config.rephrase_field, required=False)
        locality_prompt = self._string(row, config.locality_prompt_field, required=False)
        locality_answer = self._string(row, config.locality_answer_field, required=False)
        subject = self._string(row, config.subject_field, required=False)
        given = self._name(row, config.id_field)
        if len(self.problems) > before:
            return None
        content = content_id({"prompt": prompt, "target_new": target})
        record_id = self.ids.give(given, content, pool, row.where, self.problems)
        record = EditRecord(prompt or "", target or "", record_id, rephrase, locality_prompt, locality_answer, subject)
        return Parsed(row.where, record, content)

    def _labelled(self, row: Row, pool: str) -> Parsed | None:
        config, before = self.config, len(self.problems)
        prompt = self._string(row, config.prompt_field)
        column = config.answer_field if row.values.get(config.label_field) is None else config.label_field
        label = self._name(row, column)
        if label is None and len(self.problems) == before:
            self._problem(row, f"has neither '{config.label_field}' nor '{config.answer_field}'")
        given = self._name(row, config.id_field)
        if len(self.problems) > before:
            return None
        content = content_id({"prompt": prompt, "label": label})
        record_id = self.ids.give(given, content, pool, row.where, self.problems)
        return Parsed(row.where, TextRecord(prompt or "", label or "", record_id), content, label or "")

    def _problem(self, row: Row, what: str) -> None:
        self.problems.append(Problem(row.where, what))

    def _string(self, row: Row, column: str, required: bool = True) -> str | None:
        value = row.values.get(column) if column else None
        if value == "" and not required:
            return None
        if value is None:
            if required and column in row.values:
                self._problem(row, f"'{column}' is empty")
            elif required:
                self._problem(row, f"field '{column}' is missing.{did_you_mean(column, row.values)}")
            return None
        return self._checked(row, column, value)

    def _checked(self, row: Row, column: str, value: Any) -> str | None:
        if not isinstance(value, str):
            self._problem(row, f"'{column}' must be text (got {type(value).__name__})")
        elif not value.strip():
            self._problem(row, f"'{column}' is empty")
        elif len(value) > self.config.max_chars:
            self._problem(row, f"'{column}' has {len(value)} characters (max_chars is {self.config.max_chars})")
        else:
            try:
                value.encode()
            except UnicodeEncodeError:
                self._problem(row, f"'{column}' has half of a surrogate pair, which is not a character")
            else:
                return value
        return None

    def _name(self, row: Row, column: str) -> str | None:
        """An id or a label: text, or a number or truth value as data sets often have."""
        value = row.values.get(column) if column else None
        if isinstance(value, int):
            return str(value)
        return None if value is None else self._checked(row, column, value)

    def _options(self, row: Row, answer: str | None) -> tuple[str, ...] | None:
        column = self.config.options_field
        value = row.values.get(column) if column and self.config.options != "none" else None
        if isinstance(value, str):  # a cell of a CSV file
            try:
                value = json.loads(value) if value.startswith("[") else [part.strip() for part in value.split("|")]
            except (ValueError, RecursionError) as error:
                self._problem(row, f"'{column}' starts like a JSON array but is none: {json_reason(error)}")
                return None
        if value is None:
            return None
        if not isinstance(value, list):
            self._problem(row, f"'{column}' must be a list of texts (got {type(value).__name__})")
            return None
        before = len(self.problems)
        options = tuple(self._checked(row, column, part) or "" for part in value)
        if len(self.problems) > before:
            return None
        if len(options) < 2 or len(set(options)) < len(options):
            self._problem(row, f"'{column}' must have at least two different texts, each once (got {list(options)})")
        elif answer is not None and answer not in options:
            self._problem(row, f"the answer '{answer[:40]}' is not among '{column}'")
        return options


def options_from_labels(
    config: RecordsConfig, parts: Sequence[list[Parsed]], problems: list[Problem]
) -> list[list[Parsed]]:
    """Give records without options the labels of their task to choose from, where ``config.options`` says so."""
    every = [p.record for part in parts for p in part if isinstance(p.record, TextRecord)]
    labels = tuple(sorted({r.label for r in every if r.label is not None}))
    if config.options == "none":
        return list(parts)
    few = 2 <= len(labels) <= MAX_LABELS

    def filled(parsed: Parsed) -> Parsed:
        record = parsed.record
        if not isinstance(record, TextRecord) or record.options is not None:
            return parsed
        if few and record.label == record.answer:
            return replace(parsed, record=replace(record, options=labels))
        if config.options == "labels":
            if record.label is None:
                why = f"there is no '{config.label_field}'"
            elif record.label != record.answer:
                why = f"its answer is not its label '{record.label}'"
            else:
                why = f"the task has {len(labels)} labels (expected 2 to {MAX_LABELS})"
            problems.append(Problem(parsed.where, f"has no options and can't get them from the labels: {why}"))
        return parsed

    return [[filled(p) for p in part] for part in parts]
