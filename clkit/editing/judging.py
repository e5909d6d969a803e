"""Learn an edit and say how it went: its scores before and after, and what answers its queries."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from clkit.editing.journal import QUERIES
from clkit.evaluation.base import evaluation_mode
from clkit.evaluation.editing import forced_answers
from clkit.metrics.editing import token_accuracy
from clkit.models.causal_lm import CausalLM
from clkit.models.encoded_text import EncodedText
from clkit.tasks.base import EditRecord, TextRecord

if TYPE_CHECKING:
    from clkit.editing.strategy import EditStrategy, Explanation


def learn(strategy: EditStrategy, model: CausalLM, record: EditRecord) -> dict[str, Any]:
    """Learn one edit; returns its entry for a journal, plain JSON.

    Scores are those of :func:`judge` right before and right after; ``seconds`` is what learning alone took.
    """
    before, _ = judge(strategy, model, record)
    since = time.perf_counter()
    outcome = strategy.learn(record)
    seconds = round(time.perf_counter() - since, 3)
    asked = {f.name: value for f in fields(record) if (value := getattr(record, f.name)) is not None}
    return {
        "id": record.id,
        "request": asked,
        "before": before,
        **_now(strategy, model, record),
        "memory": outcome.memory,
        "steps": outcome.steps,
        "losses": dict(outcome.losses),
        "seconds": seconds,
    }


def standing(strategy: EditStrategy, model: CausalLM, records: Iterable[EditRecord]) -> list[dict[str, Any]]:
    """How edits stand on the model as it is now: id, scores and, where the method routes, routes of each."""
    return [{"id": record.id, **_now(strategy, model, record)} for record in records]


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Aspect -> mean over those rows of :func:`standing` that have it.

    >>> means([{"after": {"prompt": 1.0}}, {"after": {"prompt": 0.5, "locality": 0.0}}])
    {'reliability': 0.75, 'locality': 0.0}
    """
    found = {name: [r["after"][query] for r in rows if query in r["after"]] for query, name in QUERIES.items()}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def queries(record: EditRecord) -> dict[str, tuple[str, str]]:
    """What is asked of an edit, and the answer that is wanted."""
    asked = {"prompt": (record.prompt, record.target_new)}
    if record.rephrase_prompt:
        asked["rephrase"] = (record.rephrase_prompt, record.target_new)
    if record.locality_prompt:  # without an answer it is routed and not scored
        asked["locality"] = (record.locality_prompt, record.locality_answer or "the")
    return asked


def judge(
    strategy: EditStrategy, model: CausalLM, record: EditRecord
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Teacher-forced token accuracy of prompt, rephrase and locality answer, and how each query was routed.

    Returns:
        Token accuracies; and per query the memory that answered (None = the model itself) with score and threshold
        of the memory that comes nearest to answering. The second is empty where the method routes nothing.
    """
    asked = queries(record)
    rows = [TextRecord(prompt, answer, name) for name, (prompt, answer) in asked.items()]
    encoded = EncodedText(rows, model.form, model.max_length)
    with evaluation_mode(model):
        found = forced_answers(model, encoded, range(len(rows)))
    routes = {name: _route(why) for name, why in zip(asked, strategy.decisions(), strict=False)}
    scores = {name: token_accuracy(f.predicted, f.wanted) for name, f in zip(asked, found, strict=True)}
    if not record.locality_answer:
        scores.pop("locality", None)
    return scores, routes


def _now(strategy: EditStrategy, model: CausalLM, record: EditRecord) -> dict[str, Any]:
    after, routes = judge(strategy, model, record)
    return {"after": after, **({"routes": routes} if routes else {})}


def _route(why: Explanation) -> dict[str, Any]:
    """The memory that answers, and how strongly the one responds that comes nearest to answering; plain JSON."""
    nearest = max(
        why.scores,
        key=lambda n: (n == why.memory, why.likeness.get(n, 0.0), why.scores[n] - why.thresholds[n], why.scores[n]),
    )
    limit = why.thresholds[nearest]
    found = {
        "memory": why.memory,
        "score": why.scores[nearest],
        "threshold": limit if math.isfinite(limit) else None,
    }
    return found | ({"likeness": why.likeness[nearest], "least": why.least} if why.likeness else {})
