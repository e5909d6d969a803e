"""The contract of an engine: how one optimisation step is executed."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clkit.config import EngineConfig, TrainConfig
from clkit.engine.group import Group
from clkit.models.base import Model


class Engine(ABC):
    """Executes steps; a strategy asks it for everything that touches devices, optimisers and processes.

    Attributes:
        group: the processes of this run.
        device: where the module lives.
    """

    config_class: ClassVar[type] = EngineConfig
    group: Group
    device: torch.device

    def __init__(self, config: EngineConfig) -> None:
        self.config = config

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files."""
        return self.group.rank == 0

    @abstractmethod
    def prepare(self, model: Model) -> None:
        """Put the model where it will run."""

    @abstractmethod
    def start(
        self,
        parameters: Sequence[nn.Parameter],
        train: TrainConfig,
        total_steps: int,
        *,
        keep_moments: bool = False,
        keep_schedule: bool = False,
    ) -> None:
        """Make an optimiser for ``parameters`` and a schedule over ``total_steps``.

        With ``keep_moments`` parameters that were trained before keep their moments; with ``keep_schedule`` the
        schedule goes on from the step it has reached.
        """

    @abstractmethod
    def autocast(self) -> AbstractContextManager[Any]:
        """Context of a forward pass in the model's compute type."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to the parameters'."""

    @abstractmethod
    def unscale(self) -> None:
        """Make gradients true gradients; called once per step, after the last backward."""

    @abstractmethod
    def step(self) -> float | None:
        """Clip, update, advance the schedule, clear gradients; returns the norm before clipping (None: no update)."""

    @property
    @abstractmethod
    def learning_rate(self) -> float:
        """The rate of the next step."""

    @contextlib.contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter], write: bool = False) -> Iterator[None]:
        """Within the context ``parameters`` are whole; with ``write`` changes last on every process."""
        yield

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Optimiser, schedule and scaler."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, after :meth:`start` with the same parameters."""
