"""Runs that began with what another run exported: that one may have learned the records before them."""

from __future__ import annotations

from pathlib import Path

from clkit.errors import Problem, RequestError
from clkit.unlearning.case import Case, Source, open_source
from clkit.unlearning.records import Record


def learned_before(case: Case) -> list[Problem]:
    """Why training again from the run's own model would not be training without the records; empty where it is.

    The model is followed back while it is a directory within a run. Exports that were moved elsewhere can't be told
    from other models.
    """
    gone = [r for r in case.source.known if r.place in case.gone]
    ids, contents = {r.id for r in gone}, {r.content for r in gone}
    source = case.source
    while (folder := _made_by(source)) is not None:
        name = f"the run began with a model that {folder} made"
        try:
            source = open_source(folder)
        except RequestError as error:
            return [Problem("model.name", f"{name}, and whether that learned the records can't be told: {error}")]
        learned = sum(r.id in ids or r.content in contents for r in _trained(source))
        if learned:
            what = f"{name}, which learned {learned} of the records. Serve the request there, and begin again from that"
            return [Problem("model.name", what)]
    return []


def _made_by(source: Source) -> Path | None:
    """The run in whose directory the model lies that a run began with."""
    model = Path(source.config.model.name)
    if not model.is_absolute():  # runs keep directories as absolute paths; all else is a name
        return None
    return next((p for p in model.parents if (p / "run.json").is_file() and p != source.path.resolve()), None)


def _trained(source: Source) -> list[Record]:
    learned = {task.name for task in source.tasks}
    return [r for r in source.known if r.place.part == "train" and r.place.task in learned]
