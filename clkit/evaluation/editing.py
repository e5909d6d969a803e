"""Scores of edits on the model as it is: teacher-forced tokens and exact match, and what it writes by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from clkit.evaluation.base import Detail, Scorer, Scoring
from clkit.evaluation.generation import Generated
from clkit.metrics.editing import normalised_match, token_accuracy, token_match
from clkit.models.causal_lm import CausalLM
from clkit.models.encoded_text import EncodedText
from clkit.models.routing import marking_prompt


@torch.no_grad()
def forced_tokens(model: CausalLM, encoded: EncodedText, indices: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Per record the most likely token at each position of its answer, given the right ones before, and the right ones.

    The end token is not counted. Whatever routes by the prompt sees the prompt alone, as when it generates.
    """
    batch = encoded.batch(torch.tensor(list(indices))).to(model.device)
    prompt = (batch.labels == -100) & batch.inputs["attention_mask"].bool()
    with marking_prompt(prompt):
        predicted = model.logits(batch).argmax(dim=-1)
    found = []
    for row, wanted in zip(predicted, model.targets(batch), strict=True):
        real = wanted != -100
        found.append((row[real].tolist()[:-1], wanted[real].tolist()[:-1]))
    return found


class Forced(Scorer):
    """A score of the answer's tokens, each predicted with the right ones before it in sight."""

    kinds = frozenset({"edit"})

    def score(self, scoring: Scoring, indices: Sequence[int]) -> list[Detail]:
        """One forward pass."""
        encoded: Any = scoring.encoded
        model: Any = scoring.model
        pairs = forced_tokens(model, encoded, indices)
        return [
            Detail(
                encoded.ids[i], self.judge(*pair), prediction=model.tokenizer.decode(pair[0]), gold=encoded.answer(i)
            )
            for i, pair in zip(indices, pairs, strict=True)
        ]

    @abstractmethod
    def judge(self, predicted: list[int], wanted: list[int]) -> float:
        """Score one record."""


class EditTokens(Forced):
    """Mean share of the target's tokens that are the most likely ones, teacher-forced: the papers' reliability."""

    name = "edit-tokens"

    def judge(self, predicted: list[int], wanted: list[int]) -> float:
        """See :func:`clkit.metrics.editing.token_accuracy`."""
        return token_accuracy(predicted, wanted)


class EditExact(Forced):
    """Share of edits of whose target every token is the most likely one, teacher-forced."""

    name = "edit-exact"

    def judge(self, predicted: list[int], wanted: list[int]) -> float:
        """See :func:`clkit.metrics.editing.token_match`."""
        return float(token_match(predicted, wanted))


class EditGenerated(Generated):
    """Share of edits that the model answers by itself with the target and nothing more (case and articles aside)."""

    name = "edit-generated"
    kinds = frozenset({"edit"})

    def judge(self, record: Any, prediction: str) -> Detail:
        """See :func:`clkit.metrics.editing.normalised_match`."""
        right = normalised_match(prediction, record.target_new)
        return Detail(record.id, float(right), prediction=prediction, gold=record.target_new)
