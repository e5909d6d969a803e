"""Retraining on the retained records: the reference that every other method is measured against."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clkit.progress import Progress
from clkit.unlearning.case import Case
from clkit.unlearning.methods import Cost, Method, training_cost


class Retrain(Method):
    """The same run again, from the start, without the records."""

    name = "retrain"
    what = "the same configuration, seed and base model, trained from the start on the retained records"

    def plan(self, case: Case) -> Cost:
        """A whole run."""
        return training_cost(case.config, case.retained)

    def guarantee(self, case: Case) -> str:
        """Nothing is left to bound."""
        return "The new model is one that never saw the forgotten records: nothing is left to bound."

    def run(self, case: Case, directory: Path) -> Path:
        """An ordinary run, which can be opened, scored and exported."""
        from clkit import api

        # The tasks are assembled again from the configuration, and the tombstones leave the records out. A gate checks
        # that its data are those of `case.retained`.
        api.run(dataclasses.replace(case.config, output_dir=str(directory)), progress=Progress(enabled=False))
        return directory
