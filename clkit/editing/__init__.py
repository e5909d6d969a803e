"""Edit a language model: requests in, an edited model, a journal and a directory to take away out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clkit.editing.editor import Editor as Editor
    from clkit.editing.editor import Rollback as Rollback
    from clkit.editing.measurement import EditScores as EditScores
    from clkit.editing.measurement import Measure as Measure
    from clkit.editing.measurement import Probe as Probe
    from clkit.editing.measurement import measure as measure
    from clkit.editing.request import EditRequest as EditRequest
    from clkit.editing.store import attach as attach
    from clkit.editing.strategy import EditStrategy as EditStrategy
    from clkit.editing.strategy import Explanation as Explanation

_HOMES = {
    "EditRequest": "request",
    "EditScores": "measurement",
    "EditStrategy": "strategy",
    "Editor": "editor",
    "Explanation": "strategy",
    "Measure": "measurement",
    "Probe": "measurement",
    "Rollback": "editor",
    "attach": "store",
    "measure": "measurement",
}
__all__ = [
    "EditRequest",
    "EditScores",
    "EditStrategy",
    "Editor",
    "Explanation",
    "Measure",
    "Probe",
    "Rollback",
    "attach",
    "measure",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
