"""DP2Unlearning: ordinary fine-tuning that starts from a protected base instead of the pretrained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clkit.checkpoint import digest
from clkit.config import StrategyConfig, opt
from clkit.errors import CheckpointError, ConfigError
from clkit.strategies.dp2unlearning.base import ProtectedBase, open_base
from clkit.strategy import Capabilities, RunContext, Strategy, on_deepspeed
from clkit.tasks.base import Task


@dataclass
class DP2UnlearningConfig(StrategyConfig):
    """Options of DP2Unlearning."""

    base: str = opt("", "run directory of the protected base (a finished run with engine=private)", path=True)


class DP2Unlearning(Strategy):
    """Fine-tunes the protected base M0 (after DP2Unlearning, Neural Networks 2025), each task in turn.

    The run that is deployed learns all records; a request is served by the same run again, from M0, on the records
    that are left. Nothing that was trained without noise is ever started from.
    """

    config_class = DP2UnlearningConfig
    capabilities = Capabilities(kinds=frozenset({"text"}), **on_deepspeed())

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._digest = ""
        self._missing: ConfigError | None = None

    def admit(self) -> None:
        """The base must be there, and of the same model.

        Raises:
            ConfigError: it is not.
        """
        self._fitting()

    def _fitting(self) -> ProtectedBase:
        if not self.config.base:
            raise ConfigError("strategy.base: give the run directory of the protected base")
        base = open_base(Path(self.config.base))
        mine, theirs = self.run.config.model, base.config.model
        differ = [k for k in ("name", "lora", "freeze_backbone") if getattr(mine, k) != getattr(theirs, k)]
        if differ:
            listed = ", ".join(f"model.{key}" for key in differ)
            raise ConfigError(f"strategy.base: {base.path} was trained with other values of {listed}; make them equal")
        return base

    def setup(self, run: RunContext) -> None:
        """Put the base's weights into the module.

        Raises:
            ConfigError: they do not fit it.
        """
        super().setup(run)
        try:
            base = self._fitting()
            weights = base.weights()
        except ConfigError as error:
            self._missing = error  # a run that is only opened has its own weights
            return
        ours, theirs = (p.get("weights") for p in (run.model.provenance, base.facts.get("model", {})))
        if ours != theirs:
            raise ConfigError(f"strategy.base: {base.path} was trained on other pretrained weights than this model's")
        try:
            self.load_model_state(weights)
        except CheckpointError as error:
            raise ConfigError(f"strategy.base: {base.path} does not fit the model: {error}") from error
        self._digest = digest(weights)

    def begin_task(self, task: Task) -> None:
        """Nothing is trained without the base.

        Raises:
            ConfigError: it is not there.
        """
        if not self._digest and self._missing is not None:
            raise self._missing

    def state_dict(self) -> dict[str, Any]:
        """The buffer, and which base this run began with."""
        return {**super().state_dict(), "base": self._digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            CheckpointError: the base has changed since the run began.
        """
        super().load_state_dict(state)
        if self._digest and state["base"] != self._digest:
            raise CheckpointError(
                f"strategy.base: {self.config.base} has changed since this run began from it. Restore it, or start "
                "again with --fresh."
            )
        self._digest = state["base"]
