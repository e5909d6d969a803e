"""iCaRL: distillation, herded exemplars, and the nearest class mean as the classifier."""

from __future__ import annotations

from dataclasses import dataclass

from clkit.config import ReplayConfig, opt
from clkit.errors import CapabilityError, Problem
from clkit.exemplar_means import ExemplarMeans
from clkit.models.classifier import Classifier
from clkit.strategies.lwf import LwF, LwFConfig
from clkit.strategy import Capabilities, RunContext


# mypy reads strategies/ under its own name, so that what comes from clkit.strategies has no type for it.
@dataclass
class ICaRLConfig(LwFConfig):  # type: ignore[misc]
    """Distillation as in LwF, and exemplars."""

    serve: str = opt(
        "nearest-mean",
        "which classifier is scored and exported; the other is logged",
        choices=("linear", "nearest-mean"),
    )
    replay: ReplayConfig = opt(lambda: ReplayConfig(size=2000, policy="herding"), "exemplars")


class ICaRL(ExemplarMeans, LwF):  # type: ignore[misc]
    """Rebuffi, Kolesnikov, Sperl, Lampert, CVPR 2017.

    Cross entropy over new examples and exemplars plus distillation at a temperature, as the code that the
    class-incremental literature compares with has it (PyCIL); the paper has sigmoids and binary cross entropy.
    """

    config_class = ICaRLConfig
    capabilities = Capabilities(kinds=frozenset({"classification"}))

    @classmethod
    def check(cls, config: ICaRLConfig) -> list[Problem]:
        """Options that contradict each other."""
        return cls.check_serving(config, config.replay.size)

    def setup(self, run: RunContext) -> None:
        """See the contract.

        Raises:
            CapabilityError: the model has no features and head to take means of.
        """
        if not isinstance(run.model, Classifier):
            raise CapabilityError(
                f"Strategy 'icarl' needs a classifier that clkit builds; model '{run.model.name}' is a module of your "
                "own. Register its backbone under clkit.models."
            )
        super().setup(run)
