"""Scores of edits on the model as it is: teacher-forced tokens and exact match, and what it writes by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from clkit.evaluation.base import Detail, Scorer, Scoring
from clkit.evaluation.generation import Generated
from clkit.metrics.editing import normalised_match, token_accuracy, token_match
from clkit.models.causal_lm import CausalLM
from clkit.models.encoded_text import EncodedText
from clkit.models.routing import marking_prompt


@dataclass(frozen=True)
class ForcedAnswer:
    """What a model makes of an answer whose beginning it is shown at every token; the end token is not counted.

    Attributes:
        predicted: the most likely token at each position.
        wanted: the answer's tokens.
        nll: the answer's negative log-likelihood in nats.
    """

    predicted: list[int]
    wanted: list[int]
    nll: float


@torch.no_grad()
def forced_answers(model: CausalLM, encoded: EncodedText, indices: Sequence[int]) -> list[ForcedAnswer]:
    """Answers of the records at ``indices``, teacher-forced, in one pass.

    Whatever routes by the prompt sees the prompt alone, as when it generates.
    """
    batch = encoded.batch(torch.tensor(list(indices))).to(model.device)
    prompt = (batch.labels == -100) & batch.inputs["attention_mask"].bool()
    with marking_prompt(prompt):
        logits = model.logits(batch)
    found = []
    for row, targets in zip(logits, model.targets(batch), strict=True):
        real = (targets != -100).nonzero().squeeze(1)[:-1]
        scores, wanted = row[real].float(), targets[real]
        nll = F.cross_entropy(scores, wanted, reduction="sum")
        found.append(ForcedAnswer(scores.argmax(dim=-1).tolist(), wanted.tolist(), float(nll)))
    return found


class Forced(Scorer):
    """A score of the answer's tokens, each predicted with the right ones before it in sight."""

    kinds = frozenset({"edit"})

    def score(self, scoring: Scoring, indices: Sequence[int]) -> list[Detail]:
        """One forward pass."""
        encoded: Any = scoring.encoded
        model: Any = scoring.model
        return [
            Detail(
                encoded.ids[i],
                self.judge(found.predicted, found.wanted),
                prediction=model.tokenizer.decode(found.predicted),
                gold=encoded.answer(i),
            )
            for i, found in zip(indices, forced_answers(model, encoded, indices), strict=True)
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
