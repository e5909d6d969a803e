"""Continual-learning metrics: pure functions of the score matrix R.

Notation, in every formula of this module: T tasks, **1-based**; ``R[k,i]`` is the score on task ``i`` measured after
training task ``k``, so row ``T`` is the end of the run and the diagonal is "just learned". In the array that is passed
in, ``R[k,i]`` is ``R[k - 1, i - 1]``; NaN (or None) means "not measured".

A metric is defined if every entry that its formula names was measured, and None otherwise: never 0, and never a mean
over the part that happens to be there. Where only the last row was measured (joint training: the tasks were not
learned one after another) the average accuracy is defined and nothing else is. With T = 1 nothing can have been
forgotten or transferred: these metrics are None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Definition:
    """What a metric is: its formula, which direction is better, and its bounds for scores in [0, 1]."""

    formula: str
    direction: Literal["higher", "lower"]
    bounds: tuple[float, float]
    source: str


LEVELS = ("average_accuracy", "average_incremental_accuracy", "learning_accuracy", "worst_case_accuracy")

DEFINITIONS: dict[str, Definition] = {
    "average_accuracy": Definition(
        "mean over i of R[T,i]", "higher", (0, 1), "Lopez-Paz & Ranzato 2017 (ACC); MFN in the O-LoRA logs"
    ),
    "average_incremental_accuracy": Definition(
        "mean over k of the mean over i<=k of R[k,i]", "higher", (0, 1), "Rebuffi et al. 2017; MAA in the O-LoRA logs"
    ),
    "learning_accuracy": Definition(
        "mean over i of R[i,i]", "higher", (0, 1), "Riemer et al. 2019 (LA); MFT in the O-LoRA logs"
    ),
    "bwt": Definition("mean over i<T of R[T,i]-R[i,i]", "higher", (-1, 1), "Lopez-Paz & Ranzato 2017"),
    "bwt_over_T": Definition("sum over i<T of R[T,i]-R[i,i], over T", "higher", (-1, 1), "the scorers of O-LoRA, SAPT"),
    "fwt": Definition(
        "mean over i>1 of R[i-1,i]-b[i], b = scores of the untouched model", "higher", (-1, 1),
        "Lopez-Paz & Ranzato 2017",
    ),
    "forgetting": Definition(
        "mean over i<T of (max over i<=k<T of R[k,i])-R[T,i]", "lower", (-1, 1),
        "Chaudhry et al. 2018, rows before task i was learned left out",
    ),
    "intransigence": Definition(
        "mean over i of s[i]-R[i,i], s = scores of one model per task", "lower", (-1, 1), "Chaudhry et al. 2018"
    ),
    "worst_case_accuracy": Definition(
        "R[T,T]/T + (1-1/T) * mean over i<T of min over i<k<=T of R[k,i]", "higher", (0, 1),
        "De Lange et al. 2023 (WC-ACC), evaluated after tasks, an upper bound of evaluating after steps",
    ),
}  # fmt: skip


def label(key: str) -> str:
    """The name under which a metric is printed: its definition is part of it.

    >>> label("bwt")
    'bwt (mean over i<T of R[T,i]-R[i,i])'
    """
    return f"{key} ({DEFINITIONS[key].formula})"


def summarize(
    R: ArrayLike,
    initial: ArrayLike | None = None,
    single: ArrayLike | None = None,
    higher_is_better: bool | Sequence[bool] = True,
) -> dict[str, Any]:
    """All metrics of one run; ``DEFINITIONS`` has the formula of each key.

    Args:
        R: (T, T) scores, row = after training that task, column = task; NaN or None where not measured.
        initial: (T,) scores of the untouched model, needed by ``fwt``.
        single: (T,) scores of reference models trained on one task each, needed by ``intransigence``.
        higher_is_better: for all tasks, or one per task. Where lower is better (perplexity), ``best`` and the worst
            case swap sides and every difference changes its sign, so that positive ``bwt`` and ``fwt`` always mean
            better and positive ``forgetting`` and ``intransigence`` always mean worse. Levels (the four accuracies and
            the columns ``learned``, ``final``, ``best``, ``first``) stay in the score's own unit. Over tasks of both
            directions a mean has no meaning: all totals are None and the per-task rows remain.

    Returns:
        One value per key of ``DEFINITIONS`` (float, or None where undefined), and ``per_task``: for each task its
        ``task`` (0-based index), ``first`` (the first measured score: ``initial``, else the topmost entry of the
        column), ``learned`` (R[i,i]), ``best`` (over i<=k<=T), ``final`` (R[T,i]), and its terms of ``bwt`` and
        ``forgetting``.

    Raises:
        ValueError: a shape does not fit, or something is not a number.

    >>> found = summarize([[0.9, None], [0.6, 0.8]])
    >>> round(found["bwt"], 6), round(found["forgetting"], 6), found["fwt"]
    (-0.3, 0.3, None)
    """
    scores = _matrix(R)
    n = len(scores)
    sign = np.where(_directions(higher_is_better, n), 1.0, -1.0)
    signed = scores * sign  # from here on higher is better
    mixed = len(set(sign.tolist())) > 1
    before = None if initial is None else _vector(initial, "initial", n) * sign
    alone = None if single is None else _vector(single, "single", n) * sign

    with np.errstate(invalid="ignore"):  # inf - inf is undefined, not a warning
        totals = {} if mixed else _totals(signed, before, alone)
        for key in LEVELS:
            if key in totals:
                totals[key] *= float(sign[0])
        rows = [_row(signed[:, i], i, float(sign[i]), None if before is None else float(before[i])) for i in range(n)]
    return {**{key: _defined(totals.get(key)) for key in DEFINITIONS}, "per_task": rows}


def budget_auc(megabytes: ArrayLike, accuracy_fraction: ArrayLike) -> float:
    """Area under accuracy over memory, by trapezoids, from the smallest budget to the largest.

    With average incremental accuracy this is AUC-A, with the accuracy after the last task AUC-L (Zhou et al. 2023).

    Args:
        megabytes: (P,) budgets, P >= 2, all different, in any order.
        accuracy_fraction: (P,) accuracy under each, in [0, 1].

    Raises:
        ValueError: fewer than two points, unequal lengths, a budget twice, percentages, or something not measured.

    >>> budget_auc([8.0, 12.0, 16.0], [0.5, 0.6, 0.8])
    5.0
    """
    memory = _numbers(megabytes, "megabytes")
    if memory.ndim != 1 or len(memory) < 2:
        raise ValueError(f"`megabytes` must be a list of at least two budgets, got shape {memory.shape}")
    accuracy = _vector(accuracy_fraction, "accuracy_fraction", len(memory), "budget")
    order = np.argsort(memory)
    memory, accuracy = memory[order], accuracy[order]
    width = np.diff(memory)
    if not np.isfinite(memory).all() or (width <= 0).any():
        raise ValueError("`megabytes` must be finite and all different")
    if not ((accuracy >= 0) & (accuracy <= 1)).all():
        raise ValueError("`accuracy_fraction` must be in [0, 1]; divide percentages by 100")
    return float((width * (accuracy[1:] + accuracy[:-1]) / 2).sum())


def _totals(S: Array, before: Array | None, alone: Array | None) -> dict[str, float]:
    """The metrics of a matrix in which higher is better; NaN (an unmeasured entry spreads) or no key = undefined."""
    n = len(S)
    learned, final = S.diagonal(), S[-1]
    if n > 1 and np.isnan(S[:-1]).all():
        return {"average_accuracy": float(final.mean())}
    found = {
        "average_accuracy": float(final.mean()),
        "average_incremental_accuracy": float(np.mean([S[k, : k + 1].mean() for k in range(n)])),
        "learning_accuracy": float(learned.mean()),
        "worst_case_accuracy": float(final[-1]),
    }
    if alone is not None:
        found["intransigence"] = float((alone - learned).mean())
    if n == 1:
        return found
    change = final[:-1] - learned[:-1]
    worst = np.mean([S[i + 1 :, i].min() for i in range(n - 1)])  # np.min and np.max hand NaN on
    found["worst_case_accuracy"] = float(final[-1] / n + (1 - 1 / n) * worst)
    found["bwt"] = float(change.mean())
    found["bwt_over_T"] = float(change.sum() / n)
    found["forgetting"] = float(np.mean([S[i : n - 1, i].max() - S[-1, i] for i in range(n - 1)]))
    if before is not None:
        found["fwt"] = float((S.diagonal(1) - before[1:]).mean())
    return found


def _row(column: Array, i: int, sign: float, before: float | None) -> dict[str, Any]:
    """One task's line of the table, from its signed column; levels go back to the score's own unit."""
    history = column if before is None else np.concatenate([[before], column])
    measured = history[~np.isnan(history)]
    learned, final = float(column[i]), float(column[-1])
    is_last = i == len(column) - 1  # the last task can't have been forgotten yet
    return {
        "task": i,
        "first": _defined(sign * float(measured[0])) if len(measured) else None,
        "learned": _defined(sign * learned),
        "best": _defined(sign * float(column[i:].max())),
        "final": _defined(sign * final),
        "bwt": None if is_last else _defined(final - learned),
        "forgetting": None if is_last else _defined(float(column[i:-1].max()) - final),
    }


def _defined(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else float(value)


def _matrix(R: ArrayLike) -> Array:
    found = _numbers(R, "R")
    if found.ndim != 2 or found.shape[0] != found.shape[1] or not len(found):
        raise ValueError(f"`R` must be a square T x T matrix with T >= 1, got shape {found.shape}")
    return found


def _vector(values: ArrayLike, name: str, n: int, of: str = "task") -> Array:
    found = _numbers(values, name)
    if found.shape != (n,):
        raise ValueError(f"`{name}` must have one score per {of}, shape ({n},), got shape {found.shape}")
    return found


def _numbers(values: ArrayLike, name: str) -> Array:
    try:
        return np.array(values, dtype=np.float64)  # a copy: the input is never changed
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be numbers, with NaN or None where not measured: {error}") from error


def _directions(higher_is_better: bool | Sequence[bool], n: int) -> NDArray[np.bool_]:
    found = np.asarray(higher_is_better, dtype=bool)
    if found.shape not in ((), (n,)):
        raise ValueError(f"`higher_is_better` must be one bool or one per task ({n}), got shape {found.shape}")
    return np.broadcast_to(found, (n,))
