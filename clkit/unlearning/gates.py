"""Gates: what must hold of the model trained without the forgotten records before a certificate is written.

A gate that can't be evaluated has failed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clkit.errors import ClkitError
from clkit.provenance import collect
from clkit.result import RunResult
from clkit.rundir import RunDirectory
from clkit.tasks.base import TaskSequence
from clkit.unlearning.manifest import Manifest


@dataclass(frozen=True)
class Evidence:
    """What a gate looks at: the superseded run, the new one, what it had to be trained on, and the partition."""

    old_run: Path
    new_run: Path
    retained: TaskSequence
    manifest: Manifest


@dataclass(frozen=True)
class Finding:
    """The outcome of a gate or of a check, with its figures."""

    name: str
    passed: bool
    figures: dict[str, Any] = field(default_factory=dict)


Gate = Callable[[Evidence], Finding]


def partition(evidence: Evidence) -> Finding:
    """Forgotten and retained records are disjoint and together all."""
    problems = evidence.manifest.problems()
    return Finding("partition", not problems, {"problems": problems})


def retained_only(evidence: Evidence) -> Finding:
    """The new run is finished, and the fingerprints of its data are those of the retained records, nothing else."""
    directory = RunDirectory(evidence.new_run)
    facts = directory.read("run.json")
    same = isinstance(facts, dict) and facts.get("data") == collect(evidence.retained)["data"]
    return Finding("retained_only", same and directory.finished, {"same_data": same, "finished": directory.finished})


def utility(max_loss: float) -> Gate:
    """The mean final score of the tasks that both runs have is at most ``max_loss`` worse than before."""

    def gate(evidence: Evidence) -> Finding:
        old, new = (_final(RunResult.load(path)) for path in (evidence.old_run, evidence.new_run))
        shared = [name for name in old if name in new]
        losses = [(old[name][0] - new[name][0]) * (1 if old[name][1] else -1) for name in shared]
        loss = sum(losses) / len(losses) if losses else math.nan
        figures = {"loss": loss if math.isfinite(loss) else None, "limit": max_loss, "tasks": len(shared)}
        return Finding("utility", loss <= max_loss, figures)

    return gate


def _final(result: RunResult) -> dict[str, tuple[float, bool]]:
    names = [*result.tasks, *result.holdout]
    return {
        name: (float(value), higher)
        for name, value, higher in zip(names, result.matrix[-1], result.higher_is_better, strict=True)
    }


def run_gates(gates: Sequence[Gate], evidence: Evidence) -> list[Finding]:
    """All findings; a gate that raises has failed, with the kind of error as its figure."""
    found = []
    for gate in gates:
        try:
            found.append(gate(evidence))
        except (ClkitError, OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
            found.append(Finding(getattr(gate, "__name__", "gate"), False, {"error": type(error).__name__}))
    return found
