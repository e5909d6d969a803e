"""Serving a deletion request by fine-tuning the protected base again, and what that guarantees."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from clkit import build
from clkit.checkpoint import digest
from clkit.engine.guarantee import statement
from clkit.errors import ClkitError, Problem, RequestError
from clkit.progress import Progress
from clkit.provenance import fingerprints
from clkit.rundir import RunDirectory
from clkit.strategies.dp2unlearning import rewritten
from clkit.strategies.dp2unlearning.base import ProtectedBase, open_base
from clkit.unlearning.case import Case, Source, open_source
from clkit.unlearning.certificate import run_files
from clkit.unlearning.methods import Cost, Method, training_cost
from clkit.unlearning.records import Place, Record, records, without
from clkit.unlearning.tombstones import in_force

_LEFT = "left_of_base"  # in the run.json of a run that served a request
COMPARED_WITH = (
    "the same two phases run without the forgotten units: protected training, then fine-tuning on the retained "
    "records; not with retraining from the pretrained model, and not with the pretrained model"
)
ASSUMPTIONS = (
    "the fine-tuning read nothing but the protected base and the retained records",
    "the choice of options, of the base and of what is retained does not depend on what the forgotten records say",
)
NOT_CLAIMED = (
    "anything about the superseded model, which was fine-tuned on the forgotten records without noise",
    "protection of a requester who chose records after seeing models trained on them (adaptive requests)",
)


class DP2Unlearning(Method):
    """Restart from the protected base, on the retained records."""

    name = "dp2unlearning"
    what = "the protected base that the run was deployed from, fine-tuned again on the retained records"

    def check(self, case: Case) -> list[Problem]:
        """The run must have been deployed from a protected base that is still there, with data that are known."""
        if case.config.strategy.name != "dp2unlearning":
            what = (
                f"the run's strategy is {case.config.strategy.name}; only a run deployed with dp2unlearning has a base"
            )
            return [Problem("strategy", what)]
        try:
            found = _opened(case)
            found.base.weights()
            _bound(case, found)
        except ClkitError as error:
            return [Problem("", str(error))]
        return []

    def plan(self, case: Case) -> Cost:
        """One fine-tuning; the protected base is there already."""
        return training_cost(case.config, case.retained)

    def guarantee(self, case: Case) -> str:
        """The bound for this request's units, tight and naive."""
        return sentence(self.figures(case))

    def figures(self, case: Case) -> dict[str, Any]:
        """What the protected base's training guarantees about the units that are forgotten of it."""
        opened = _opened(case)
        base, found = opened.base, _bound(case, opened)
        path = os.path.relpath(base.path.absolute(), case.source.path.absolute())
        return found | {
            "compared_with": COMPARED_WITH,
            "assumptions": [*found["assumptions"], *ASSUMPTIONS],
            "not_claimed": [*found["not_claimed"], *NOT_CLAIMED],
            "rests_on": {"path": path, "weights": digest(base.weights()), "files": run_files(base.path)},
        }

    def run(self, case: Case, directory: Path) -> Path:
        """The deployed run once more, without the records; its strategy starts from the base."""
        from clkit import api

        api.run(dataclasses.replace(case.config, output_dir=str(directory)), progress=Progress(enabled=False))
        _remember(case, RunDirectory(directory))
        return directory


class _Opened(NamedTuple):
    """The base, what its files hold of its data, and how many forgotten units were deleted from them already."""

    base: ProtectedBase
    source: Source
    deleted: int


def _opened(case: Case) -> _Opened:
    base = open_base(Path(case.config.strategy.config.base))
    try:
        return _Opened(base, open_source(base.path), 0)
    except RequestError:
        # What earlier requests took out may be gone from the files, and nothing else.
        left = case.source.facts.get(_LEFT)
        if left is None:
            raise
        tasks = in_force(case.source.path, case.source.facts).apply(build.make_tasks(base.config))
        if left["weights"] != digest(base.weights()) or left["data"] != fingerprints(tasks):
            raise
        return _Opened(base, Source(base.path, base.config, tasks, base.facts, list(records(tasks))), left["units"])


def _remember(case: Case, directory: RunDirectory) -> None:
    """Note in the new run's ``run.json`` what is left of a private base's data, and how many units are not.

    So a later request to that run can be served when the forgotten records were deleted from the files.
    """
    base, source, deleted = _opened(case)
    if base.rewriting is not None:
        return
    try:
        rest = without(source.tasks, _gone(case, base, source))
    except RequestError:  # it could not be scored without them; it is not trained again, but then its files must stay
        return
    left = {
        "weights": digest(base.weights()),
        "data": fingerprints(rest),
        "units": deleted + forgotten_units(case, base, source),
    }
    directory.write("run.json", (directory.read("run.json") or {}) | {_LEFT: left})


def _bound(case: Case, opened: _Opened) -> dict[str, Any]:
    """The statement about what is forgotten of the base's data."""
    base, source, deleted = opened
    if base.rewriting is None:
        return statement(base.privacy, deleted + forgotten_units(case, base, source))
    gone = _gone(case, base, source)
    found: dict[str, Any] = rewritten.statement(base.rewriting, [r.id for r in _trained(source) if r.place in gone])
    return found


def _trained(source: Source) -> list[Record]:
    names = {task.name for task in source.tasks}
    return [r for r in source.known if r.place.part == "train" and r.place.task in names]


def forgotten_units(case: Case, base: ProtectedBase, source: Source) -> int:
    """How many units of the base's training data in the files are out, by this request and all before it.

    A subject of which only a part is out was replaced by a smaller one: it counts twice, as one removed and one added.
    """
    gone = _gone(case, base, source)
    trained = _trained(source)
    if base.privacy["unit"] == "record":
        return sum(r.place in gone for r in trained)
    whole = Counter(r.fields.get("subject") for r in trained)
    out = Counter(r.fields.get("subject") for r in trained if r.place in gone)
    return sum(1 if out[subject] == whole[subject] else 2 for subject in out)


def _gone(case: Case, base: ProtectedBase, source: Source) -> set[Place]:
    """Where in the base's data the forgotten records stand: by id or by content, as tombstones have it."""
    forgotten = [r for r in case.source.known if r.place in case.gone]
    ids, contents = {r.id for r in forgotten}, {r.content for r in forgotten}
    named = {r.place for r in source.known if r.id in ids or r.content in contents}
    return named | in_force(case.source.path).places(source.tasks) | in_force(base.path).places(source.tasks)


def sentence(figures: dict[str, Any]) -> str:
    """The guarantee in words."""
    if figures["void"]:
        return f"No guarantee: {figures['void']}."
    group, unit = figures["group"], figures["unit"]
    tight, naive = group["tight"]["epsilon"], group["naive"]
    loose = "delta above 1" if naive["delta"] is None else f"delta {naive['delta']:.1e}"
    bound = "more than any number" if tight is None else f"{tight:.3g}"
    return (
        f"By ({figures['epsilon']:.3g}, {figures['delta']:.1e})-DP of one {unit}, the {group['units']} {unit}s taken "
        f"out change the chance of any outcome by at most a factor e^epsilon with epsilon {bound} at the same delta "
        f"(naively {naive['epsilon']:.3g} at {loose}), compared with {COMPARED_WITH}."
    )


__all__ = ["DP2Unlearning", "forgotten_units", "sentence"]
