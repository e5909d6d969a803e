"""What can still be told of the forgotten records from a model: membership inference and extraction, with intervals.

The forgotten training records are compared with records that the run only scored, never learned: what looks no more
like training data than those can't be told from what was never there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from clkit import api, build
from clkit.errors import ClkitError, VerificationError
from clkit.loader import Encodings
from clkit.metrics import privacy
from clkit.metrics.unlearning import probability
from clkit.models.base import Model
from clkit.models.causal_lm import CausalLM
from clkit.models.encoded_text import EncodedText
from clkit.modes import evaluating
from clkit.rng import fresh_generator
from clkit.tasks.base import LabelledExamples, Task
from clkit.tasks.batch import Encoded
from clkit.trainer import SequentialTrainer
from clkit.unlearning.records import task_records

Array = NDArray[np.float64]
_MOST = 512  # records of either side; more make the intervals narrower and the gates slower
_SEED = 0  # of the sample and of the resamples: the same gate gives the same figures
ALPHA = 0.05


@dataclass(frozen=True)
class Answers:
    """What a model makes of the answers of some records.

    Attributes:
        log_probs: of each answer's tokens, without the end token; of the class.
        predicted: the likeliest token at each of these places.
        tokens: the tokens that stand there.
        texts: the answers, empty for classes.
    """

    log_probs: list[Array]
    predicted: list[NDArray[np.int64]]
    tokens: list[NDArray[np.int64]]
    texts: list[str]


def answers(model: Model, parts: Sequence[Encoded], batch_size: int) -> Answers:
    """Score the true answers of encoded records, in evaluation mode and without gradients."""
    found = Answers([], [], [], [])
    with evaluating(model.module), torch.inference_mode():
        for encoded in parts:
            text = isinstance(encoded, EncodedText)
            for chunk in torch.split(torch.arange(len(encoded)), batch_size):
                batch = encoded.batch(chunk).to(model.device)
                targets, logits = model.targets(batch), model.logits(batch).float()
                if logits.dim() == 2:
                    logits, targets = logits[:, None], targets[:, None]
                every = torch.log_softmax(logits, -1)
                for row, index in enumerate(chunk.tolist()):
                    there = (targets[row] != -100).nonzero().squeeze(1)
                    there = there[:-1] if text else there  # the end token is no part of what was said
                    tokens = targets[row, there]
                    found.log_probs.append(every[row, there].gather(1, tokens[:, None])[:, 0].cpu().double().numpy())
                    found.predicted.append(every[row, there].argmax(-1).cpu().numpy())
                    found.tokens.append(tokens.cpu().numpy())
                    found.texts.append(encoded.answer(index) if isinstance(encoded, EncodedText) else "")
    return found


@dataclass(frozen=True)
class Measured:
    """Both sides under the model, and under the base model that never learned any of them.

    ``probability``: mean probability of a token of the true answer (geometric within a record) under the superseded
    run and the new one, of forgotten, never-seen and retained records; empty where the former can't be opened.
    ``unknown_class``: forgotten records whose class went with them, so that the new network can't give it; they are not
    among the others.
    """

    forgotten: Answers
    unseen: Answers
    forgotten_base: Answers
    unseen_base: Answers
    text: bool
    probability: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    unknown_class: int = 0


def measure(run_dir: Path, forgotten: Sequence[Task], before: Path | None = None) -> Measured:
    """Score forgotten training records and scored-only records of a run.

    Args:
        run_dir: the run without the records.
        forgotten: tasks whose ``train`` are the forgotten records that were trained on.
        before: the run that had learned them, to compare with.

    Raises:
        VerificationError: there is nothing to compare with.
    """
    with api.open_run(run_dir) as trainer:
        model, tasks, config = trainer.model, trainer.tasks, trainer.config
        learned = [record for task in (*tasks, *forgotten) for record in task_records(task, "train")]
        ids, contents = {record.id for record in learned}, {record.content for record in learned}
        gone = _sample([(task, i) for task in forgotten for i in range(len(task.train))])
        new = _sample(
            [
                (task, i)
                for task in tasks
                for i, scored in enumerate(task_records(task, "eval"))
                if scored.id not in ids and scored.content not in contents  # a copy under another id was learned too
            ]
        )
        if not gone or not new:
            raise VerificationError(
                "there are no forgotten training records"
                if not gone
                else "there is nothing to compare with: every record that is scored was trained on too"
            )
        every, gone = len(gone), [(task, i) for task, i in gone if _has_class(task, i, build.num_classes(tasks))]
        if not gone:
            nothing = Answers([], [], [], [])
            return Measured(nothing, nothing, nothing, nothing, False, unknown_class=every)
        rows: _Rows = {"forgotten": ("train", gone), "never_seen": ("eval", new)}
        if before is not None:
            rows["retained"] = "train", _sample([(task, i) for task in tasks for i in range(len(task.train))])
        ours = _served_answers(trainer, rows)
        text = isinstance(model, CausalLM)
        base = build.make_model(config.model, tasks, config.seed, lambda text: None, trainer.engine.device)
        base.module.to(trainer.engine.device)
        sides = [_encoded(trainer.run.encodings, *rows[name]) for name in ("forgotten", "never_seen")]
        theirs = [answers(base, side, config.eval.batch_size) for side in sides]
    earlier = _before(before, rows) if before is not None else {}
    known = {name: (mean_probability(found), mean_probability(ours[name])) for name, found in earlier.items()}
    missing = every - len(gone)
    return Measured(ours["forgotten"], ours["never_seen"], theirs[0], theirs[1], text, known, unknown_class=missing)


def _has_class(task: Task, row: int, classes: int | None) -> bool:
    """Whether a network of so many classes can give the record's."""
    return classes is None or not isinstance(task.train, LabelledExamples) or int(task.train.labels[row]) < classes


# Name of a side -> which part of its tasks, and task and row of each record.
_Rows = dict[str, tuple[str, list[tuple[Task, int]]]]


def _served_answers(trainer: SequentialTrainer, rows: _Rows) -> dict[str, Answers]:
    sides = {name: _encoded(trainer.run.encodings, part, chosen) for name, (part, chosen) in rows.items()}
    with trainer.serving():
        return {name: answers(trainer.model, side, trainer.config.eval.batch_size) for name, side in sides.items()}


def _before(run_dir: Path, rows: _Rows) -> dict[str, Answers]:
    """The same records under the superseded run; nothing where it can't be opened any more."""
    try:
        with api.open_run(run_dir) as trainer:
            return _served_answers(trainer, rows)
    except (ClkitError, OSError):
        return {}


def mean_probability(found: Answers) -> float:
    """See :func:`clkit.metrics.unlearning.probability`; 0 where no answer has a token."""
    return probability([-row.mean() for row in found.log_probs if len(row)]) or 0.0


def _sample(rows: list[tuple[Task, int]]) -> list[tuple[Task, int]]:
    order = torch.randperm(len(rows), generator=fresh_generator(_SEED, "attack sample"))[:_MOST]
    return [rows[i] for i in sorted(order.tolist())]


def _encoded(encodings: Encodings, part: str, rows: Sequence[tuple[Task, int]]) -> list[Encoded]:
    """Rows of several tasks, task by task."""
    by_task = {task.name: (task, [i for other, i in rows if other is task]) for task, _ in rows}
    return [encodings.encode(getattr(task, part).subset(mine)) for task, mine in by_task.values()]


def membership(measured: Measured) -> dict[str, Any]:
    """Each attack's AUC with its interval and curve (FPR, TPR), and the chance of such an AUC if nothing were left.

    AUC 0.5 = forgotten records look like never-seen ones, 1 = all of them look like training data.
    """
    a, b = measured.forgotten, measured.unseen
    scores: dict[str, tuple[Array, Array]] = {
        "loss": (privacy.loss_scores(a.log_probs), privacy.loss_scores(b.log_probs)),
        "reference": (
            privacy.reference_scores(a.log_probs, measured.forgotten_base.log_probs),
            privacy.reference_scores(b.log_probs, measured.unseen_base.log_probs),
        ),
    }
    if measured.text:
        scores["zlib"] = (privacy.zlib_scores(a.log_probs, a.texts), privacy.zlib_scores(b.log_probs, b.texts))
        scores["min-k"] = (privacy.min_k_scores(a.log_probs), privacy.min_k_scores(b.log_probs))
    figures: dict[str, Any] = {"n": [len(a.log_probs), len(b.log_probs)], "seed": _SEED, "confidence": 1 - ALPHA}
    if measured.unknown_class:
        figures["of_classes_that_are_gone"] = measured.unknown_class
    if not a.log_probs:
        return figures | {"applies": False}
    for name, (members, others) in scores.items():
        found = privacy.membership(members, others, np.random.default_rng(_SEED), confidence=1 - ALPHA)
        if found is None:
            raise VerificationError(f"the {name} attack has no score for some record")
        p = float(stats.mannwhitneyu(members, others, alternative="less").pvalue)
        curve = [[round(float(v), 4) for v in rates] for rates in privacy.roc(members, others)]
        figures[name] = {"auc": _rounded(found.auc), "p": round(p, 6), "roc": curve}
        if found.tpr_at_fpr is not None:
            figures[name]["tpr_at_1_percent_fpr"] = _rounded(found.tpr_at_fpr)
    if measured.probability:
        figures["probability"] = {k: [round(v, 6) for v in pair] for k, pair in measured.probability.items()}
    return figures


def leaks(figures: dict[str, Any], limit: float) -> bool:
    """Whether an attack finds members: its AUC's interval is above ``limit``, and chance does not explain it.

    The rank test is for small requests, where an interval by resampling is too narrow; its level is shared among the
    attacks.
    """
    attacks = [found for found in figures.values() if isinstance(found, dict) and "auc" in found]
    return any(found["auc"][1] > limit and found["p"] < ALPHA / len(attacks) for found in attacks)


def extraction(measured: Measured) -> dict[str, Any]:
    """Extraction strength of forgotten and never-seen answers, and the interval of the difference of the means."""
    mine = privacy.extraction_strength(measured.forgotten.predicted, measured.forgotten.tokens)
    other = privacy.extraction_strength(measured.unseen.predicted, measured.unseen.tokens)
    mine, other = mine[~np.isnan(mine)], other[~np.isnan(other)]
    if not len(mine) or not len(other):
        raise VerificationError("no answer has a token to extract")
    draws = np.random.default_rng(_SEED)
    gaps = [draws.choice(mine, len(mine)).mean() - draws.choice(other, len(other)).mean() for _ in range(1000)]
    low, high = np.quantile(gaps, (ALPHA / 2, 1 - ALPHA / 2))
    return {
        "n": [len(mine), len(other)],
        "seed": _SEED,
        "confidence": 1 - ALPHA,
        "forgotten": round(float(mine.mean()), 6),
        "never_seen": round(float(other.mean()), 6),
        "difference": [round(float(v), 6) for v in (mine.mean() - other.mean(), low, high)],
    }


def _rounded(estimate: privacy.Estimate) -> list[float]:
    return [round(v, 6) for v in (estimate.value, estimate.low, estimate.high)]
