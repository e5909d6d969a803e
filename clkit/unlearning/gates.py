"""Gates: what must hold of the model trained without the forgotten records before a certificate is written.

A gate that can't be evaluated has failed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clkit.errors import ClkitError, VerificationError
from clkit.provenance import collect
from clkit.result import RunResult
from clkit.rundir import RunDirectory
from clkit.unlearning.case import Case
from clkit.unlearning.manifest import Manifest
from clkit.uses import recorded

if TYPE_CHECKING:
    from clkit.unlearning.attacks import Measured


@dataclass(frozen=True)
class Limits:
    """What is passed; see the gates of the same names."""

    utility: float = 0.05
    membership: float = 0.6
    extraction: float = 0.1


@dataclass(frozen=True)
class Evidence:
    """What a gate looks at.

    Attributes:
        old_run: the superseded run.
        new_run: the one without the records.
        case: what had to go, and what it had to be trained on.
        manifest: the partition.
        sees_forgotten: whether the method computes with the forgotten records.
    """

    old_run: Path
    new_run: Path
    case: Case
    manifest: Manifest
    sees_forgotten: bool = False

    @cached_property
    def measured(self) -> Measured:
        """What the new model makes of forgotten and never-seen records; computed once for all gates."""
        from clkit.unlearning.attacks import measure

        rows: dict[str, list[int]] = {}
        for place in self.case.training_places():
            rows.setdefault(place.task, []).append(place.position)
        tasks = [task for task in self.case.source.tasks if task.name in rows]
        return measure(self.new_run, [replace(t, train=t.train.subset(rows[t.name])) for t in tasks], self.old_run)


@dataclass(frozen=True)
class Finding:
    """The outcome of a gate or of a check, with its figures."""

    name: str
    passed: bool
    figures: dict[str, Any] = field(default_factory=dict)


Gate = Callable[[Evidence], Finding]


def brief(figures: dict[str, Any]) -> str:
    """Figures to read: without the points of curves and the scores of each task, which stand in the certificate."""
    rest = {k: v for k, v in figures.items() if k != "scores"}
    parts = {k: {n: x for n, x in v.items() if n != "roc"} if isinstance(v, dict) else v for k, v in rest.items()}
    return json.dumps(parts)


def partition(evidence: Evidence) -> Finding:
    """Forgotten and retained records are disjoint and together all."""
    problems = evidence.manifest.problems()
    return Finding("partition", not problems, {"problems": problems})


def retained_only(evidence: Evidence) -> Finding:
    """The new run is finished, its data are the retained records, and its steps used rows of no others.

    A method that pushes forgotten records down has to use them; how many rows that were stands among the figures.
    """
    directory = RunDirectory(evidence.new_run)
    facts = directory.read("run.json")
    retained = evidence.case.retained
    same = isinstance(facts, dict) and facts.get("data") == collect(retained)["data"]
    state = directory.checkpoints.load()
    uses = None if state is None else recorded(state, retained)
    others = None if uses is None else uses.foreign
    figures = {"same_data": same, "finished": directory.finished, "rows_of_other_records": others}
    only = others == 0 or (others is not None and evidence.sees_forgotten)
    return Finding("retained_only", same and directory.finished and only, figures)


def utility(max_loss: float) -> Gate:
    """The mean final score of the tasks that both runs have is at most ``max_loss`` worse than before.

    Where lower is better (perplexity), the change counts as a part of what was before: scores are at most 1, and a
    perplexity that falls by a few would outweigh the loss of all of them.
    """

    def gate(evidence: Evidence) -> Finding:
        old, new = (_final(RunResult.load(path)) for path in (evidence.old_run, evidence.new_run))
        shared = [name for name in old if name in new]
        losses = [_worse(*old[name], new[name][0]) for name in shared]
        loss = sum(losses) / len(losses) if losses else math.nan
        figures: dict[str, Any] = {"loss": loss if math.isfinite(loss) else None, "limit": max_loss}
        pairs = {name: [old[name][0], new[name][0]] for name in shared}
        figures |= {"tasks": len(shared), "scores": {k: p for k, p in pairs.items() if all(map(math.isfinite, p))}}
        return Finding("utility", loss <= max_loss, figures)

    return _named("utility", gate)


def _worse(before: float, higher_is_better: bool, now: float) -> float:
    if higher_is_better:
        return before - now
    return (now - before) / before if before else math.nan


def membership(limit: float) -> Gate:
    """No membership attack tells forgotten records from never-seen ones with an AUC beyond ``limit``.

    It fails when an attack's confidence interval is above the limit and chance does not explain it: passing says that
    nothing was found, and a small request can't show much.
    """

    def gate(evidence: Evidence) -> Finding:
        from clkit.unlearning import attacks

        figures = attacks.membership(evidence.measured)
        return Finding("membership", not attacks.leaks(figures, limit), {**figures, "limit": limit})

    return _named("membership", gate)


def extraction(limit: float) -> Gate:
    """Forgotten answers are not given away more than never-seen ones, by more than ``limit`` of their tokens.

    It fails when the interval of the difference of mean extraction strengths is above the limit. Classes hold no text.
    """

    def gate(evidence: Evidence) -> Finding:
        from clkit.unlearning import attacks

        if not evidence.measured.text:
            return Finding("extraction", True, {"applies": False})
        figures = attacks.extraction(evidence.measured)
        return Finding("extraction", figures["difference"][1] <= limit, {**figures, "limit": limit})

    return _named("extraction", gate)


def standard(limits: Limits) -> list[Gate]:
    """The gates that a batch of requests has to pass, beside :func:`partition`, which is always one."""
    return [
        retained_only,
        utility(limits.utility),
        membership(limits.membership),
        extraction(limits.extraction),
    ]


def _named(name: str, gate: Gate) -> Gate:
    """The gate under a name of its own, for the finding when it raises."""
    gate.__name__ = name
    return gate


def _final(result: RunResult) -> dict[str, tuple[float, bool]]:
    names = [*result.tasks, *result.holdout]
    return {
        name: (float(value), higher)
        for name, value, higher in zip(names, result.matrix[-1], result.higher_is_better, strict=True)
    }


def run_gates(gates: Sequence[Gate], evidence: Evidence) -> list[Finding]:
    """All findings; a gate that raises has failed, with the kind of error as its figure, or its own words for why."""
    found = []
    for gate in gates:
        try:
            found.append(gate(evidence))
        except VerificationError as error:  # a gate's own, which names no record
            found.append(Finding(getattr(gate, "__name__", "gate"), False, {"error": str(error)}))
        except (ClkitError, OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
            found.append(Finding(getattr(gate, "__name__", "gate"), False, {"error": type(error).__name__}))
    return found
