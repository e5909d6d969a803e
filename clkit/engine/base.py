"""The contract of an engine: how one optimisation step is executed."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clkit.checkpoint import tensor_dict
from clkit.config import EngineConfig, RunConfig, TrainConfig
from clkit.dealing import cut
from clkit.engine.group import Group
from clkit.errors import ClkitError
from clkit.models.base import Model
from clkit.modes import swapped
from clkit.tasks.batch import Batch

if TYPE_CHECKING:
    from clkit.rundir import RunDirectory
    from clkit.strategy import Strategy


class Engine(ABC):
    """Executes steps; a strategy asks it for everything that touches devices, optimisers and processes.

    Attributes:
        group: the processes of this run.
        device: where the module lives.
        several: whether a run may have several processes.
    """

    config_class: ClassVar[type] = EngineConfig
    several: ClassVar[bool] = False
    group: Group
    device: torch.device

    def __init__(self, config: EngineConfig) -> None:
        self.config = config

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files."""
        return self.group.rank == 0

    # --- the run ----------------------------------------------------------------------------------------------------
    def admit(self, strategy: Strategy) -> None:
        """Refuse a run that this engine can't do; of ``strategy.run`` there are only ``tasks`` and ``config`` yet.

        Raises:
            CapabilityError, ConfigError: with everything that is in the way, before weights are loaded.
        """

    def notes(self) -> list[str]:
        """What to know about the run that was admitted, a line each."""
        return []

    @classmethod
    def elsewhere(cls, options: Iterable[str]) -> dict[str, str]:
        """Which of ``options`` only another engine has, and what to do instead."""
        return {}

    @classmethod
    def refuse(cls, config: RunConfig, capabilities: Any) -> list[ClkitError]:
        """Why this engine can't execute the run, found before weights are loaded."""
        return []

    def loading(self) -> AbstractContextManager[Any]:
        """Context in which the model's weights are loaded."""
        return contextlib.nullcontext()

    @abstractmethod
    def prepare(self, model: Model) -> None:
        """Put the model where it will run."""

    def record_in(self, directory: RunDirectory) -> None:
        """Where the engine may write what it has to; called on the main process, before a checkpoint is restored."""

    def finish(self) -> None:
        """All tasks are learned; nothing is trained any more."""

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

    # --- one step ---------------------------------------------------------------------------------------------------
    def batches(self, strategy: Strategy) -> Iterable[Batch]:
        """The batches of the current stage from the current position on, one per optimiser step."""
        return strategy.step_loader()

    def rows(self, batch: Batch, size: int) -> list[Tensor]:
        """The rows of the pieces that go through the module together; ``size`` is the most, 0 = all at once.

        The processes take the pieces in turn.
        """
        return cut(len(batch), batch.replayed, size, self.group.world)

    def losses(self, strategy: Strategy, part: Batch) -> dict[str, Tensor]:
        """The loss terms of a piece, by name."""
        return strategy.loss(part)

    def units(self, strategy: Strategy, part: Batch) -> dict[str, float]:
        """How many units each term of :meth:`losses` is a mean over; ``*`` stands for the terms not named."""
        return {"*": float(part.num_targets), **strategy.units(part)}

    @abstractmethod
    def autocast(self) -> AbstractContextManager[Any]:
        """Context of a forward pass in the model's compute type."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradient of ``loss``; after the ``last`` of a step gradients are sums over the processes."""

    def add_gradient(self, parameter: nn.Parameter, gradient: Tensor, factor: float = 1.0) -> None:
        """Add ``factor * gradient`` to a parameter's gradient; for ``Strategy.after_backward``.

        A penalty that depends on no data belongs there: once per step, whatever the micro-batches. ``gradient`` is
        whole and the same on every process.
        """
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.add_(gradient, alpha=factor)

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
        """Within the context ``parameters`` are whole; with ``write`` changes last on every process.

        Every process must enter it.
        """
        yield

    @contextlib.contextmanager
    def swapped(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """``clkit.modes.swapped``, also where parameters are split over processes."""
        own = dict(module.named_parameters())
        with self.gathered([own[n] for n in tensors if n in own]), swapped(module, tensors):
            yield module

    def tensors(self, module: nn.Module, names: set[str]) -> dict[str, Tensor]:
        """The parameters called ``names``, whole, and all persistent buffers of a module; every process must call."""
        return tensor_dict(module, names)

    @property
    def scoring_group(self) -> Group:
        """The processes that share the work of scoring."""
        return self.group

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds on some process; every process must call this."""
        if self.group.world == 1:
            return flag
        found = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)

    def total(self, terms: Mapping[str, float]) -> dict[str, float]:
        """Each term's sum over the processes; every process must call this."""
        if self.group.world == 1:
            return dict(terms)
        found = self.group.all_gather(dict(terms))
        names = dict.fromkeys(name for part in found for name in part)
        return {name: math.fsum(part.get(name, 0.0) for part in found) for name in names}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Optimiser, schedule and scaler."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, after :meth:`start` with the same parameters."""
