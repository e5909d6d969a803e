"""Refusals in the place of what is forgotten: "I don't know", learned as an answer or preferred to the true one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clkit.config import opt
from clkit.errors import Problem
from clkit.rng import derive_seed
from clkit.strategy import Capabilities
from clkit.tasks.base import Examples, Task, TextExamples
from clkit.tasks.batch import Batch, Encoded

from . import losses
from .base import RetainConfig, Unlearner
from .request import Approximate

ANSWERS = (
    "I don't know.",
    "I have no information about that.",
    "That is not something I know.",
    "I can't answer this question.",
    "I am not able to say.",
    "I have never heard of it.",
)


@dataclass
class IDKConfig(RetainConfig):
    """Options of IDK."""

    form: str = opt(
        "likelihood",
        "likelihood: learn the refusal; preference: prefer it to the true answer (DPO, against a frozen reference)",
        choices=("likelihood", "preference"),
    )
    beta: float = opt(0.1, "inverse temperature of `form: preference`", above=0)
    answers: list[str] = opt(list(ANSWERS), "refusals; each record gets one of them, by its id")


class IDK(Unlearner):
    """The refusal of each forgotten prompt, and cross entropy on retained rows (Maini et al. 2024).

    In the preference form the refusal is the chosen answer and the true one the rejected, both against the frozen
    reference. The published code of DP2Unlearning has the sign the other way round and takes a retained row as the
    rejected answer, so that nothing is forgotten.
    """

    config_class = IDKConfig
    capabilities = Capabilities(kinds=frozenset({"text"}))
    frozen_reference = True

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._refusals: Encoded | None = None

    @classmethod
    def check(cls, config: IDKConfig) -> list[Problem]:
        """There must be something to answer."""
        if not config.answers or not all(answer.strip() for answer in config.answers):
            return [Problem("strategy.answers", "must list at least one answer, and no empty one")]
        return []

    def begin_task(self, task: Task) -> None:
        """Other records may be forgotten now, with refusals of their own."""
        self._refusals = None
        super().begin_task(task)

    def forget_loss(self, batch: Batch) -> Tensor:
        """By ``form``; a mean over rows."""
        refusals = self._encoded().batch(batch.indices.cpu()).to(batch.labels.device)
        log_probs, counts = self.log_probs(refusals)
        if self.config.form == "likelihood":
            return losses.mean_nll(log_probs, counts)
        chosen = log_probs - self.reference_log_probs(refusals)
        rejected = self.log_probs(batch)[0] - self.reference_log_probs(batch)
        return losses.preference(chosen, rejected, self.config.beta)

    def _encoded(self) -> Encoded:
        """The forgotten records with refusals as answers, in the same order."""
        if self._refusals is None:
            run = self.run
            records = [r for part in self._forgotten(run.position.stage) for r in self._refused(part)]
            self._refusals = run.model.encode(TextExamples(tuple(records)))
        return self._refusals

    def _refused(self, examples: Examples) -> list[Any]:
        if not isinstance(examples, TextExamples):
            return []
        answers, seed = self.config.answers, self.run.config.seed
        return [
            dataclasses.replace(r, answer=answers[derive_seed(seed, "idk", r.id) % len(answers)], options=None)
            for r in examples.records
        ]


class IDKMethod(Approximate):
    """Serves requests so."""

    name = "idk"
    what = "the deployed model, trained to refuse an answer to the forgotten prompts"
    strategy = IDK
