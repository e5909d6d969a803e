"""How a model is trained without the forgotten records. A method is a name, what it promises, and a function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clkit.config import RunConfig
from clkit.errors import RequestError, did_you_mean
from clkit.progress import Progress
from clkit.tasks.base import TaskSequence

Train = Callable[[RunConfig, TaskSequence, Path], Path]
"""``train(config, retained, directory)``: trains on the retained tasks and returns the run directory.

It is called again after a crash with the same arguments, and must then go on."""


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        name: what ``--method`` names.
        what: what it does.
        guarantee: what follows from it.
        train: does it.
    """

    name: str
    what: str
    guarantee: str
    train: Train


def _retrain(config: RunConfig, retained: TaskSequence, directory: Path) -> Path:
    from clkit import api

    # The tasks are assembled again from the configuration, and the tombstones leave the records out: so the new run is
    # an ordinary one that can be opened, scored and exported. A gate checks that its data are those of `retained`.
    api.run(dataclasses.replace(config, output_dir=str(directory)), progress=Progress(enabled=False))
    return directory


METHODS = {
    "retrain": Method(
        "retrain",
        "the same configuration, seed and base model, trained from the start on the retained records",
        "The new model is one that never saw the forgotten records: nothing is left to bound.",
        _retrain,
    )
}


def get(name: str) -> Method:
    """The method called so.

    Raises:
        RequestError: there is none.
    """
    if name not in METHODS:
        raise RequestError(
            f"--method: no method '{name}'.{did_you_mean(name, METHODS)} There are: {', '.join(METHODS)}"
        )
    return METHODS[name]
