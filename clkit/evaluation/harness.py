"""Scores of lm-evaluation-harness: its own requests, tokenisation and arithmetic on the model as it stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from clkit.errors import CapabilityError
from clkit.evaluation.base import Detail, Scorer, Scoring
from clkit.models.causal_lm import CausalLM
from clkit.models.lora import base_model
from clkit.tasks.harness import HarnessExamples, quiet


class HarnessAcc(Scorer):
    """lm-evaluation-harness's ``acc``: is the right option the likeliest? (tasks of ``eval.lm_eval``)."""

    name = "lm-eval-acc"
    kinds = frozenset({"text"})
    of_harness: ClassVar[str] = "acc"

    def check(self, scoring: Scoring) -> None:
        """Only tasks of the harness, on language models."""
        if not isinstance(scoring.task.eval, HarnessExamples):
            raise CapabilityError(
                f"task '{scoring.task.name}': metric '{self.name}' scores tasks of eval.lm_eval, and this is none"
            )

    def cost(self, scoring: Scoring) -> NDArray[np.int64]:
        """Tokens of all that is asked about an example, each request as long as the longest."""
        lm = _language_model(scoring)
        return np.array(
            [
                len(asked) * max(len(lm.tok_encode("".join(map(str, _texts(i))))) for i in asked)
                for asked in _requests(scoring)
            ],
            dtype=np.int64,
        )

    def score(self, scoring: Scoring, indices: Sequence[int]) -> list[Detail]:
        """Ask, filter the answers as the task file says (its first filter), and let the harness judge."""
        examples: Any = scoring.task.eval
        harness, lm = examples.harness, _language_model(scoring)
        # A request keeps its answers, and each scoring needs fresh ones.
        asked = [[dataclasses.replace(r, resps=[], filtered_resps={}) for r in examples.requests[i]] for i in indices]
        flat = [request for group in asked for request in group]
        with quiet():
            repeated = [request for request in flat for _ in range(request.repeats)]
            answers = getattr(lm, flat[0].request_type)(repeated, disable_tqdm=True)
            for request, answer in zip(repeated, answers, strict=True):
                request.resps.append(answer)
            first = harness._filters[0]
            first.apply(flat)
            found = []
            for i, group in zip(indices, asked, strict=True):
                results = [request.filtered_resps[first.name] for request in group]
                value = float(harness.process_results(group[0].doc, results)[self.of_harness])
                record = examples.records[i]
                found.append(Detail(record.id, value, 1.0, _said(record, results), record.answer))
        return found


class HarnessAccNorm(HarnessAcc):
    """lm-evaluation-harness's ``acc_norm``: likelihood over the option's characters (tasks of ``eval.lm_eval``)."""

    name = "lm-eval-acc-norm"
    of_harness = "acc_norm"


class HarnessExactMatch(HarnessAcc):
    """lm-evaluation-harness's ``exact_match`` of the filtered answer (tasks of ``eval.lm_eval``)."""

    name = "lm-eval-exact-match"
    of_harness = "exact_match"


def _requests(scoring: Scoring) -> Any:
    examples: Any = scoring.task.eval
    return examples.requests


def _texts(request: Any) -> list[Any]:
    """Context and continuation of a request; of one that generates only the context."""
    return [part for part in request.args if isinstance(part, str)]


def _said(record: Any, results: list[Any]) -> str | None:
    """The likeliest option, or the text that was written."""
    if isinstance(results[0], str):
        return results[0]
    if record.options and len(record.options) == len(results):
        return str(record.options[int(np.argmax([loglik for loglik, _ in results]))])
    return None


class _Served:
    """The module that serves, as the harness calls a model; no nn.Module, so that it changes nothing about it."""

    def __init__(self, model: CausalLM) -> None:
        lm: Any = base_model(model.module)
        self.device, self.config = model.device, lm.config
        self._module, self._lm = model.module, lm

    def __call__(self, ids: torch.Tensor) -> Any:
        return self._module(input_ids=ids, use_cache=False)

    def generate(self, **options: Any) -> Any:
        return self._lm.generate(**options)


def _language_model(scoring: Scoring) -> Any:
    """The harness's view of the model."""
    model = scoring.model
    if not isinstance(model, CausalLM):
        raise CapabilityError(f"task '{scoring.task.name}': lm-evaluation-harness scores language models only")

    def make() -> Any:
        from lm_eval.models.huggingface import HFLM

        with quiet():
            served: Any = _Served(model)
            return HFLM(
                pretrained=served,
                backend="causal",
                tokenizer=model.tokenizer,
                max_length=model.max_length,
                batch_size=scoring.options.batch_size,
                softmax_dtype=torch.float32,
                mixed_precision_dtype=model.autocast_dtype,
            )

    return scoring.once("lm-eval", (), make)
