"""Option log-likelihood: is the right option the one that the language model finds most likely after the prompt?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from clkit.errors import DataError, Problem
from clkit.evaluation.base import Detail, Scorer, Scoring
from clkit.evaluation.packing import packed_logliks, rowwise_logliks, say_not_packed, why_not_packed
from clkit.tasks.base import TextRecord


def gold_option(record: TextRecord) -> int | None:
    """Which option is right: the answer, else the label, else the answer's first line; None if none of them is one."""
    for text in (record.answer, record.label, record.answer.strip().partition("\n")[0].strip()):
        if record.options and text in record.options:
            return record.options.index(text)
    return None


class OptionLogLikelihood(Scorer):
    """Share of records whose right option has the largest mean log-probability **per token** given the prompt.

    Ties go to the option listed first. Log-probabilities are float32 log-softmax of the model's logits. All options of
    a record share one computation of the prompt where the model allows it (``clkit.evaluation.packing``).
    """

    name = "option-loglik"
    kinds = frozenset({"text"})
    per_token: ClassVar[bool] = True

    def check(self, scoring: Scoring) -> None:
        """Every record needs options, one of them right, none without tokens."""
        encoded: Any = scoring.encoded
        problems = []
        for i, record in enumerate(encoded.records):
            where = f"record '{record.id}'"
            if not record.options:
                problems.append(Problem(where, "it has no `options`; give some, or use another metric"))
            elif gold_option(record) is None:
                problems.append(Problem(where, f"the answer {record.answer!r} is none of its options {record.options}"))
            elif not all(encoded.option_ids(i)):
                problems.append(Problem(where, f"an option has no tokens: {record.options}"))
        if problems:
            raise DataError.collect(f"Task '{scoring.task.name}' can't be scored with '{self.name}':", problems)

    def cost(self, scoring: Scoring) -> NDArray[np.int64]:
        """Tokens of the prompt with all options in one row, or with each option in a row of its own."""
        tokens = [_tokens(scoring, i) for i in range(len(scoring.encoded))]
        reason = _why_not_packed(scoring, tokens)
        if reason is not None:
            say_not_packed(reason)
            return np.array([len(opts) * _longest(prompt, opts) for prompt, opts in tokens], dtype=np.int64)
        return np.array([len(prompt) + sum(len(o) - 1 for o in opts) for prompt, opts in tokens], dtype=np.int64)

    def score(self, scoring: Scoring, indices: Sequence[int]) -> list[Detail]:
        """One forward pass."""
        tokens = [_tokens(scoring, i) for i in indices]
        prompts, options = [prompt for prompt, _ in tokens], [opts for _, opts in tokens]
        logliks = rowwise_logliks if _why_not_packed(scoring, tokens) else packed_logliks
        totals = scoring.once("logliks", indices, lambda: logliks(scoring.model.module, prompts, options))
        found = []
        for i, sums, opts in zip(indices, totals, options, strict=True):
            record = scoring.encoded.records[i]  # type: ignore[attr-defined]
            values = [s / len(o) for s, o in zip(sums, opts, strict=True)] if self.per_token else sums
            best, gold = values.index(max(values)), gold_option(record)
            found.append(Detail(record.id, float(best == gold), 1.0, record.options[best], record.options[gold]))
        return found


class RawOptionLogLikelihood(OptionLogLikelihood):
    """Share of records whose right option has the largest summed log-probability; short options have an advantage."""

    name = "option-loglik-raw"
    per_token = False


def _tokens(scoring: Scoring, i: int) -> tuple[list[int], list[list[int]]]:
    """Prompt and options of one record; an empty prompt becomes the end-of-text token, which precedes any text."""
    encoded: Any = scoring.encoded
    return encoded.prompt_ids(i) or [encoded.form.eos], encoded.option_ids(i)


def _longest(prompt: list[int], options: list[list[int]]) -> int:
    return len(prompt) + max(map(len, options)) - 1


def _why_not_packed(scoring: Scoring, tokens: list[tuple[list[int], list[list[int]]]]) -> str | None:
    return why_not_packed(scoring.model.module, max(_longest(prompt, opts) for prompt, opts in tokens))
