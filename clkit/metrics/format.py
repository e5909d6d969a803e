"""Forgetting split in two: the form of an answer (superficial) and what it says (essential).

After Chen et al. 2025 (SEFE), for text tasks. R is scored twice: strictly (the answer must be right to the letter) and
with tolerance for its form. What the strict score loses is forgotten somehow; what the tolerant score loses too is
forgotten in essence; the difference is superficial.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike

from clkit.metrics.continual import summarize

STRICT = "exact-match"
TOLERANT = ("tolerant-match", "option-loglik")

FORMAT_DEFINITIONS = {
    "strict": "forgetting of the strict scores = superficial + essential",
    "superficial": "forgetting of the strict scores - forgetting of the tolerant scores",
    "essential": "forgetting of the tolerant scores",
}


def split_forgetting(strict: ArrayLike, tolerant: ArrayLike) -> dict[str, Any]:
    """Forgetting as the sum of a superficial and an essential part.

    Both follow ``forgetting`` in :mod:`clkit.metrics.continual`: per task the best score since it was learned minus the
    final one, then the mean over all tasks but the last. A part is negative where the model got better in it:
    superficial is, when answers come back into the form that the task asks for.

    Args:
        strict: (T, T) strict scores, row = after training that task; higher is better; NaN or None = not measured.
        tolerant: (T, T) format-tolerant scores of the same answers.

    Returns:
        ``strict``, ``superficial``, ``essential`` (None where a score that is needed was not measured, and with one
        task), and ``per_task`` with the same keys and ``task`` (0-based index).

    Raises:
        ValueError: a shape does not fit, or something is not a number.

    >>> found = split_forgetting([[0.9, None], [0.2, 0.8]], [[0.9, None], [0.8, 0.9]])
    >>> [round(found[key], 6) for key in ("strict", "superficial", "essential")]
    [0.7, 0.6, 0.1]
    """
    whole, essence = summarize(strict), summarize(tolerant)
    if len(whole["per_task"]) != len(essence["per_task"]):
        sizes = f"{len(whole['per_task'])} and {len(essence['per_task'])}"
        raise ValueError(f"`strict` and `tolerant` must be scores of the same tasks, got {sizes} tasks")
    rows = [
        {"task": i, **_parts(ours["forgetting"], theirs["forgetting"])}
        for i, (ours, theirs) in enumerate(zip(whole["per_task"], essence["per_task"], strict=True))
    ]
    return {**_parts(whole["forgetting"], essence["forgetting"]), "per_task": rows}


def _parts(strict: float | None, essential: float | None) -> dict[str, float | None]:
    known = strict is not None and essential is not None
    return {"strict": strict, "superficial": strict - essential if known else None, "essential": essential}  # type: ignore[operator]
