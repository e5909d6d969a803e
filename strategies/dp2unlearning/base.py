"""The protected base M0, kept for as long as requests may come: a finished private run, or one on rewritten text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clkit import resolve
from clkit.checkpoint import CheckpointStore
from clkit.config import RunConfig
from clkit.errors import ConfigError
from clkit.rundir import RunDirectory
from clkit.strategies.dp2unlearning.rewritten import rewriting_of


@dataclass(frozen=True)
class ProtectedBase:
    """A protected base.

    Attributes:
        path: its run directory.
        config: its configuration.
        facts: its ``run.json``; ``privacy`` says what its training spent.
        rewriting: what its data were made by, where it was trained without noise on rewritten text; else None.
    """

    path: Path
    config: RunConfig
    facts: dict[str, Any]
    rewriting: dict[str, Any] | None = None

    @property
    def privacy(self) -> dict[str, Any]:
        """What the private engine wrote down."""
        found: dict[str, Any] = self.facts["privacy"]
        return found

    def weights(self) -> dict[str, Tensor]:
        """The trained tensors, by their names in the module.

        Raises:
            ConfigError: its checkpoints are gone.
        """
        saved = CheckpointStore(self.path / "checkpoints").load()
        if saved is None:
            raise ConfigError(f"strategy.base: {self.path} has no checkpoint left. {_RESTORE}")
        model: dict[str, Tensor] = saved["model"]
        return model


_RESTORE = "Restore it from a backup, or train a new protected base and deploy from that."


def open_base(path: Path) -> ProtectedBase:
    """Read a protected base.

    Raises:
        ConfigError: there is no finished run, or it was trained neither by the private engine to its end, nor on
            nothing but rewritten text.
    """
    directory = RunDirectory(path)
    if not (path / "config.yaml").is_file() or not directory.finished:
        raise ConfigError(f"strategy.base: {path} holds no finished run. {_RESTORE}")
    config = resolve.load(path / "config.yaml")
    facts = directory.read("run.json") or {}
    if config.engine.name != "private" or "spent" not in facts.get("privacy", {}):
        rewriting = rewriting_of(facts["files"]) if facts.get("files") else None
        if rewriting is not None:
            return ProtectedBase(path, config, facts, rewriting)
        raise ConfigError(
            f"strategy.base: {path} was not trained by the private engine, nor on rewritten text alone, so forgetting "
            "from it is bounded by nothing. Train the base with engine=private."
        )
    planned = sum(stage["steps"] for stage in facts["privacy"]["planned"])
    if sum(steps for _, _, steps in facts["privacy"]["spent"]) < planned:
        raise ConfigError(f"strategy.base: {path} counts fewer noisy steps than it took. {_RESTORE}")
    return ProtectedBase(path, config, facts)
