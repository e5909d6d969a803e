"""Measure an edited model as it is now: four aspects of its edits, each in four readings, against the unedited model.

``clkit.metrics.editing`` says what aspects and readings are. Measured on the model that holds all edits made so far, as
in "WISE" (arXiv 2405.14768, eq. 9), not on the one right after each edit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clkit.config import EvalConfig
from clkit.errors import RequestError
from clkit.evaluation.base import evaluation_mode, plan_batches
from clkit.evaluation.editing import ForcedAnswer, forced_answers
from clkit.evaluation.packing import packed_logliks, rowwise_logliks, why_not_packed
from clkit.metrics.editing import (
    ASPECTS,
    READINGS,
    Estimate,
    normalised_match,
    perplexity,
    prefers,
    summarize_edits,
    token_accuracy,
    token_match,
)
from clkit.models.encoded_text import EncodedText
from clkit.tasks.base import EditRecord, TextRecord

if TYPE_CHECKING:
    from clkit.editing.editor import Editor


@dataclass(frozen=True)
class Probe:
    """One question to an edited model.

    Attributes:
        aspect: one of ``clkit.metrics.editing.ASPECTS``.
        prompt: the question.
        answer: the right answer; for locality what teacher forcing shows (None = the unedited model's own answer).
        edit: id of the edit it is about.
        others: wrong answers, for option likelihood.
    """

    aspect: str
    prompt: str
    answer: str | None
    edit: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """What came of one probe.

    Attributes:
        probe: the question.
        scores: the value of each reading.
        said: what the model wrote by itself; None where generation was not asked for.
        memory: what answered; None = the unedited model, or it was not asked for.
        nll: negative log-likelihood of the answer in nats, teacher-forced, without the end token.
        tokens: of the answer.
    """

    probe: Probe
    scores: Mapping[str, float]
    said: str | None
    memory: str | None
    nll: float
    tokens: int


@dataclass(frozen=True)
class EditScores:
    """Everything that was measured on one state of a model; ``edits`` says how many it held."""

    edits: int
    rows: tuple[Row, ...]

    @property
    def cases(self) -> dict[str, dict[str, list[float]]]:
        """Aspect -> reading -> one value per probe that has it."""
        found: dict[str, dict[str, list[float]]] = {}
        for row in self.rows:
            for reading, value in row.scores.items():
                found.setdefault(row.probe.aspect, {}).setdefault(reading, []).append(value)
        return found

    def estimates(self, confidence: float = 0.95) -> dict[str, dict[str, Estimate]]:
        """Mean and confidence interval per aspect and reading."""
        return summarize_edits(self.cases, confidence)

    def perplexity(self, aspect: str = "reliability") -> float | None:
        """Of the answers of an aspect, over all their tokens together; None where there are none."""
        rows = [r for r in self.rows if r.probe.aspect == aspect and r.tokens]
        return perplexity([r.nll for r in rows], [r.tokens for r in rows]) if rows else None

    def routes(self) -> dict[str, dict[str, int]]:
        """Aspect -> what answered ("none" = the unedited model) -> how often."""
        found: dict[str, Counter[str]] = {}
        for row in self.rows:
            found.setdefault(row.probe.aspect, Counter())[row.memory or "none"] += 1
        return {aspect: dict(counts) for aspect, counts in found.items()}


def probes_of(records: Iterable[EditRecord]) -> list[Probe]:
    """The probes that edit records bring along: prompt, rephrase and locality prompt."""
    found = []
    for r in records:
        found.append(Probe("reliability", r.prompt, r.target_new, r.id))
        if r.rephrase_prompt:
            found.append(Probe("generalisation", r.rephrase_prompt, r.target_new, r.id))
        if r.locality_prompt:
            found.append(Probe("locality", r.locality_prompt, r.locality_answer, r.id))
    return found


def measure(
    editor: Editor,
    probes: Iterable[Probe | EditRecord],
    *,
    readings: Sequence[str] = tuple(READINGS),
    routes: bool = False,
    options: EvalConfig | None = None,
) -> EditScores:
    """Ask the edited model and score what it answers; see :class:`Measure`.

    Example:
        >>> scores = clkit.editing.measure(editor, editor.records.values())  # doctest: +SKIP
        >>> scores.estimates()["reliability"]["generated-normalised"].mean  # doctest: +SKIP
        0.8
    """
    return Measure(editor, probes, readings=readings, routes=routes, options=options).scores()


class Measure:
    """Asks the same probes again and again as edits are made; what the unedited model answers is computed once.

    Args:
        editor: the edited model.
        probes: what to ask; of a record its :func:`probes_of`.
        readings: which of ``clkit.metrics.editing.READINGS``.
        routes: also ask the method what answered each probe, which takes one more pass per probe.
        options: sizes of batches, and how long an answer may be (``max_new_tokens``); one that is cut there matches
            only what is cut at the same place.

    Raises:
        RequestError: an aspect or a reading is not known, or a probe that needs an answer has none.
    """

    def __init__(
        self,
        editor: Editor,
        probes: Iterable[Probe | EditRecord],
        *,
        readings: Sequence[str] = tuple(READINGS),
        routes: bool = False,
        options: EvalConfig | None = None,
    ) -> None:
        self.editor, self.routes = editor, routes
        self.readings, self.options = frozenset(readings), options or EvalConfig(max_new_tokens=32)
        self.probes = [p for given in probes for p in ([given] if isinstance(given, Probe) else probes_of([given]))]
        self._check()
        self._before: dict[int, _Answer] = {}

    def _check(self) -> None:
        unknown = sorted(self.readings - set(READINGS))
        if unknown:
            raise RequestError(f"unknown readings: {', '.join(unknown)}; there are: {', '.join(READINGS)}")
        for probe in self.probes:
            if probe.aspect not in ASPECTS:
                raise RequestError(f"unknown aspect '{probe.aspect}'; there are: {', '.join(ASPECTS)}")
            if probe.answer is None and probe.aspect != "locality":
                raise RequestError(f"edit '{probe.edit}': a probe of {probe.aspect} needs an answer")

    def scores(self, edits: Iterable[str] | None = None) -> EditScores:
        """Score the probes of these edits (None = all probes) on the model as it is now."""
        wanted = None if edits is None else set(edits)
        chosen = [i for i, p in enumerate(self.probes) if wanted is None or p.edit in wanted]
        local = [i for i in chosen if self.probes[i].aspect == "locality"]
        new = [i for i in local if i not in self._before]
        if new:
            with self.editor.strategy.unedited():
                self._before |= self._answers(new, {})
        found = self._answers(chosen, self._before)
        rows = [self._row(self.probes[i], found[i], self._before.get(i)) for i in chosen]
        return EditScores(len(self.editor.records), tuple(rows))

    def _row(self, probe: Probe, now: _Answer, before: _Answer | None) -> Row:
        values: dict[str, float] = {}
        if now.forced is not None:
            predicted = now.forced.predicted
            wanted = now.forced.wanted if before is None or before.forced is None else before.forced.predicted
            values["tokens"], values["exact"] = token_accuracy(predicted, wanted), float(token_match(predicted, wanted))
        if now.said is not None:
            wanted_text = (probe.answer if before is None else before.said) or ""
            values["generated"] = float(now.said.strip() == wanted_text.strip())
            values["generated-normalised"] = float(normalised_match(now.said, wanted_text))
        if now.logliks is not None:
            right = 0 if before is None or before.logliks is None else _best(before.logliks)
            values["options"] = float(prefers(now.logliks, right))
        scores = {name: value for name, value in values.items() if name in self.readings}
        memory = self.editor.explain(probe.prompt).memory if self.routes else None
        forced = now.forced or ForcedAnswer([], [], 0.0)
        return Row(probe, scores, now.said, memory, forced.nll, len(forced.wanted))

    # --- asking -----------------------------------------------------------------------------------------------------
    def _answers(self, chosen: Sequence[int], before: Mapping[int, _Answer]) -> dict[int, _Answer]:
        """What the model, as it is, makes of the probes ``chosen``."""
        found = {i: _Answer() for i in chosen}
        written = self.readings & {"generated", "generated-normalised"}
        asked = {i: a for i, a in found.items() if written or (self.probes[i].answer is None and i not in before)}
        if asked:
            self._generate(asked)
        self._force(found, before)
        if "options" in self.readings:
            self._prefer(found)
        return found

    def _generate(self, found: dict[int, _Answer]) -> None:
        encoded, order, batches = self._batches({i: self.probes[i].answer or "the" for i in found}, generated=True)
        with evaluation_mode(self.editor.model):
            for batch in batches:
                texts = self.editor.model.generate(encoded, batch, self.options.max_new_tokens)
                for k, text in zip(batch, texts, strict=True):
                    found[order[k]].said = text

    def _force(self, found: dict[int, _Answer], before: Mapping[int, _Answer]) -> None:
        answers = {i: self.probes[i].answer or before.get(i, answer).said for i, answer in found.items()}
        shown = {i: text for i, text in answers.items() if text}  # the unedited model may answer nothing
        if not shown:
            return
        encoded, order, batches = self._batches(shown)
        with evaluation_mode(self.editor.model):
            for batch in batches:
                for k, forced in zip(batch, forced_answers(self.editor.model, encoded, batch), strict=True):
                    found[order[k]].forced = forced

    def _prefer(self, found: dict[int, _Answer]) -> None:
        answers = {i: self.probes[i].answer for i in found if self.probes[i].others}
        shown = {i: text for i, text in answers.items() if text}
        if not shown:
            return
        encoded, order, batches = self._batches(shown)
        module = self.editor.model.module
        prompts = [encoded.prompt_ids(k) for k in range(len(order))]
        options = [encoded.option_ids(k) for k in range(len(order))]
        longest = max(len(p) + sum(map(len, o)) for p, o in zip(prompts, options, strict=True))
        logliks = rowwise_logliks if why_not_packed(module, longest) else packed_logliks
        with evaluation_mode(self.editor.model):
            for batch in batches:
                totals = logliks(module, [prompts[k] for k in batch], [options[k] for k in batch])
                for k, sums in zip(batch, totals, strict=True):
                    found[order[k]].logliks = [s / len(o) for s, o in zip(sums, options[k], strict=True)]

    def _batches(
        self, answers: Mapping[int, str], generated: bool = False
    ) -> tuple[EncodedText, list[int], list[list[int]]]:
        """The probes as tokens, the probe of each record, and batches of records of similar length."""
        order = list(answers)
        records = [
            TextRecord(self.probes[i].prompt, answers[i], str(i), options=(answers[i], *self.probes[i].others))
            for i in order
        ]
        encoded = EncodedText(records, self.editor.model.form, self.editor.model.max_length)
        cost = np.asarray(encoded.lengths, dtype=np.int64)
        if generated:
            lengths = [len(encoded.prompt_ids(k)) for k in range(len(order))]
            cost = np.array(lengths, dtype=np.int64) + self.options.max_new_tokens
        return encoded, order, plan_batches(cost, self.options)


@dataclass
class _Answer:
    """What a model made of one probe."""

    forced: ForcedAnswer | None = None
    said: str | None = None
    logliks: list[float] | None = None


def _best(logliks: Sequence[float]) -> int:
    return max(range(len(logliks)), key=logliks.__getitem__)
