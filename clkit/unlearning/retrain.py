"""Retraining on the retained records: the reference that every other method is measured against."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from clkit.config import RunConfig, opt
from clkit.progress import Progress
from clkit.unlearning.case import Case
from clkit.unlearning.methods import Cost, Method, MethodConfig, training_cost


class Retrain(Method):
    """The same run again, from the start, without the records."""

    name = "retrain"
    what = "the same configuration, seed and base model, trained from the start on the retained records"

    def plan(self, case: Case) -> Cost:
        """A whole run."""
        return training_cost(self.changed(case.config), case.retained)

    def guarantee(self, case: Case) -> str:
        """Nothing is left to bound."""
        return "The new model is one that never saw the forgotten records: nothing is left to bound."

    def run(self, case: Case, directory: Path) -> Path:
        """An ordinary run, which can be opened, scored and exported."""
        from clkit import api

        # The tasks are assembled again from the configuration, and the tombstones leave the records out. A gate checks
        # that its data are those of `case.retained`.
        config = dataclasses.replace(self.changed(case.config), output_dir=str(directory), name=directory.name)
        api.run(config, progress=Progress(enabled=False))
        return directory

    def changed(self, config: RunConfig) -> RunConfig:
        """The configuration that is trained: the run's own."""
        return config


@dataclass
class SameEpochsConfig(MethodConfig):
    """Options of the control."""

    epochs: int = opt(0, "passes over each task's retained records; 0 = half of the run's, rounded up", min=0)


class RetrainSameEpochs(Retrain):
    """The control of every method that trains for fewer epochs: fewer epochs, and nothing else."""

    name = "retrain_same_epochs"
    what = "the base model, trained on the retained records for fewer epochs than the run"
    config_class = SameEpochsConfig

    def guarantee(self, case: Case) -> str:
        """That of retraining; the model may only be less trained."""
        return (
            "The new model never saw the forgotten records. It is trained for less long than the old one: look at its "
            "utility."
        )

    def changed(self, config: RunConfig) -> RunConfig:
        """Fewer epochs, or as many steps fewer."""
        train = config.train
        epochs = self.config.epochs or -(-train.epochs // 2)
        steps = -(-train.steps * epochs // train.epochs) if self.config.epochs else -(-train.steps // 2)
        return dataclasses.replace(config, train=dataclasses.replace(train, epochs=epochs, steps=steps))
