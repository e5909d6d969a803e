"""Scores of a generated answer: exact match, format-tolerant match and ROUGE-L. Decoding is greedy."""

from __future__ import annotations

import functools
import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from clkit.errors import CapabilityError, DataError, Problem
from clkit.evaluation.base import Detail, Scorer, Scoring
from clkit.evaluation.options import gold_option
from clkit.metrics.text import exact_match, rouge_l, tolerant_match
from clkit.models.encoded_text import EncodedText
from clkit.tasks.base import TextRecord


class Generated(Scorer):
    """A score of the text that the model writes after the prompt, up to ``max_new_tokens`` tokens."""

    kinds = frozenset({"text"})
    whole: ClassVar[bool] = True  # whether all of the reference counts, to its end

    def check(self, scoring: Scoring) -> None:
        """The model must be able to write; that it may not write enough for some of the answers is said."""
        if not hasattr(scoring.model, "generate"):
            raise CapabilityError(f"metric '{self.name}' needs a language model; '{scoring.model.name}' writes no text")
        if self.whole and isinstance(scoring.encoded, EncodedText):
            lengths, limit = scoring.encoded.answer_lengths, scoring.options.max_new_tokens
            if cut := int((lengths > limit).sum()):
                say_cut(scoring.task.name, f"{cut} of {len(lengths)}", limit, int(lengths.max()))

    def cost(self, scoring: Scoring) -> NDArray[np.int64]:
        """Tokens of the prompt and of the longest answer allowed."""
        encoded: Any = scoring.encoded
        lengths = [len(encoded.prompt_ids(i)) for i in range(len(encoded))]
        return np.array(lengths, dtype=np.int64) + scoring.options.max_new_tokens

    def score(self, scoring: Scoring, indices: Sequence[int]) -> list[Detail]:
        """One call of ``generate``, whose answers all metrics of this kind judge."""
        model, encoded = scoring.model, scoring.encoded
        texts = scoring.once(
            "generated",
            indices,
            lambda: model.generate(encoded, indices, scoring.options.max_new_tokens),  # type: ignore[attr-defined]
        )
        return [self.judge(encoded.records[i], text) for i, text in zip(indices, texts, strict=True)]  # type: ignore[attr-defined]

    @abstractmethod
    def judge(self, record: TextRecord, prediction: str) -> Detail:
        """Score one answer."""


@functools.cache
def say_cut(task: str, how_many: str, limit: int, longest: int) -> None:
    """Say once that answers are cut before the reference ends, so that they can't equal it."""
    logging.getLogger(__name__).warning(
        "Task '%s': %s answers are longer than `eval.max_new_tokens` (%d), so what the model writes is cut before they "
        "end; set it to %d for the longest.",
        task,
        how_many,
        limit,
        longest,
    )


class ExactMatch(Generated):
    """Share of answers that equal the reference character by character, white space at the ends aside."""

    name = "exact-match"

    def judge(self, record: TextRecord, prediction: str) -> Detail:
        """See :func:`clkit.metrics.text.exact_match`."""
        right = exact_match(prediction, record.answer)
        return Detail(record.id, float(right), prediction=prediction, gold=record.answer)


class TolerantMatch(Generated):
    """Share of answers that give the reference, format aside; of a record with options, that name the right one."""

    name = "tolerant-match"
    whole = False

    def check(self, scoring: Scoring) -> None:
        """Where there are options, one of them must be right."""
        super().check(scoring)
        problems = [
            Problem(f"record '{r.id}'", f"the answer {r.answer!r} is none of its options {r.options}")
            for r in scoring.encoded.records  # type: ignore[attr-defined]
            if r.options and gold_option(r) is None
        ]
        if problems:
            raise DataError.collect(f"Task '{scoring.task.name}' can't be scored with '{self.name}':", problems)

    def judge(self, record: TextRecord, prediction: str) -> Detail:
        """See :func:`clkit.metrics.text.tolerant_match`."""
        right = gold_option(record)
        gold = record.answer if record.options is None or right is None else record.options[right]
        found = tolerant_match(prediction, gold, record.options or None)
        return Detail(record.id, float(found), prediction=prediction, gold=gold)


class RougeL(Generated):
    """Mean ROUGE-L F1 of answers against references; ``extra`` has precision and recall."""

    name = "rouge-l"

    def judge(self, record: TextRecord, prediction: str) -> Detail:
        """See :func:`clkit.metrics.text.rouge_l`."""
        found = rouge_l(prediction, record.answer)
        extra = {"precision": found.precision, "recall": found.recall}
        return Detail(record.id, found.f1, prediction=prediction, gold=record.answer, extra=extra)
