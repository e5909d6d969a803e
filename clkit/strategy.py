"""Strategy: the contract of a continual-learning method, and what a run gives it to work with."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from clkit.checkpoint import tensor_dict
from clkit.config import RunConfig, StrategyConfig
from clkit.engine.base import Engine
from clkit.errors import CheckpointError, Problem
from clkit.loader import Encodings, Pool, StepLoader, steps_in_stage
from clkit.memory import Buffer, make_buffer
from clkit.models.base import Model
from clkit.rng import Streams
from clkit.tasks.base import Kind, Task, TaskSequence
from clkit.tasks.batch import Batch

Losses = dict[str, Tensor]
"""Named loss terms, each a mean over the batch; the trainer sums them and logs each by its name."""


@dataclass(frozen=True)
class Capabilities:
    """What a strategy supports; anything else is a CapabilityError before weights are loaded.

    Attributes:
        kinds: kinds of task.
        engines: names of engines.
        zero_stages: DeepSpeed ZeRO stages.
        needs_task_id: whether the task must be known at test.
        needs_lora: whether the model must carry a LoRA adapter.
    """

    kinds: frozenset[Kind] = frozenset({"classification", "text"})
    engines: frozenset[str] = frozenset({"local"})
    zero_stages: frozenset[int] = frozenset()
    needs_task_id: bool = False
    needs_lora: bool = False


@dataclass
class Position:
    """Where a run is: the stage (task index) and the optimiser steps done in it and in all."""

    stage: int = 0
    step: int = 0
    total_steps: int = 0


@dataclass
class RunContext:
    """What a strategy may use.

    Attributes:
        model: module, tokeniser, loss and generation.
        tasks: the whole sequence.
        engine: executes steps; the only way to devices and processes.
        config: the resolved configuration.
        streams: random generators by purpose.
        encodings: encoded training examples of every task, made once.
        position: where the run is.
        log: ``log(name, value)`` writes one number to events.jsonl.
    """

    model: Model
    tasks: TaskSequence
    engine: Engine
    config: RunConfig
    streams: Streams
    encodings: Encodings
    position: Position = field(default_factory=Position)
    log: Callable[[str, float], None] = lambda name, value: None


class TaskLoop(ABC):
    """The inner loop over one task, as a strategy sees it that overrides :meth:`Strategy.train_task`."""

    @abstractmethod
    def run(self) -> None:
        """Take all steps that are left of this task: load, forward, backward, update, checkpoint."""

    @abstractmethod
    def step(self, batch: Batch) -> dict[str, float]:
        """Take one optimiser step on ``batch``; returns the loss terms."""

    @abstractmethod
    def done(self, losses: dict[str, float]) -> None:
        """Count a step that the strategy took by itself (such as one edit): log it, score and checkpoint if it is time.

        Raises:
            Interrupted: the run was asked to stop; the step is saved.
        """


class Strategy(ABC):
    """A method. The defaults of every hook are plain sequential fine-tuning, with rehearsal if it is configured.

    A strategy never touches the optimiser, the device, the process group or the file system: it asks ``run.engine``.
    """

    config_class: ClassVar[type] = StrategyConfig
    capabilities: ClassVar[Capabilities] = Capabilities()

    def __init__(self, config: Any = None) -> None:
        self.config = self.config_class() if config is None else config
        self.run: RunContext
        self.buffer: Buffer | None = None
        self._trained: set[str] = set()

    @classmethod
    def check(cls, config: Any) -> list[Problem]:
        """Problems between options, found before anything is loaded; ``where`` is ``strategy.<key>``."""
        return []

    # --- set-up -----------------------------------------------------------------------------------------------------
    def setup(self, run: RunContext) -> None:
        """Attach adapters, build heads, declare what is trained. Called once per process, also before a resume."""
        self.run = run
        if self.config.replay.size:
            self.buffer = make_buffer(self.config.replay.policy, self.config.replay.size)
        self._trained = {name for name, p in run.model.module.named_parameters() if p.requires_grad}

    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser updates now, in a stable order."""
        return [p for p in self.run.model.module.parameters() if p.requires_grad]

    # --- one task ---------------------------------------------------------------------------------------------------
    def training_set(self, stage: int) -> Sequence[int]:
        """Which tasks' examples are new at ``stage``; an empty answer skips the stage, its row of R stays empty."""
        return [stage]

    def steps(self, stage: int) -> int:
        """How many steps ``stage`` takes; known before the strategy is set up."""
        return steps_in_stage(
            sum(len(self.run.tasks[i].train) for i in self.training_set(stage)), self.run.config.train
        )

    def begin_task(self, task: Task) -> None:
        """A new task comes. Not called again when a run resumes within the task: what it did must be in the state."""

    def train_loader(self, task: Task) -> Iterable[Batch]:
        """Batches, one per optimiser step, from the current position on; rehearsal is mixed in here."""
        return StepLoader(
            self.run.encodings,
            self.training_set(self.run.position.stage),
            self.run.config.train,
            seed=self.run.config.seed,
            stage=self.run.position.stage,
            start=self.run.position.step,
            buffer=self.buffer,
            ratio=self.config.replay.ratio,
            draws=self.run.streams["replay draw"],
            keeps=self.run.streams["replay keep"],
        )

    def train_task(self, task: Task, loop: TaskLoop) -> None:
        """Learn one task; override to own the inner loop."""
        loop.run()

    def loss(self, batch: Batch) -> Losses:
        """Loss terms on a batch that is on the device, under autocast."""
        return {"cross_entropy": self.run.model.loss(batch)}

    def units(self, batch: Batch) -> dict[str, float]:
        """How many units each term of :meth:`loss` is a mean over, known without a forward pass.

        Terms that are not named count ``batch.num_targets``. With this, a batch that is cut into micro-batches, or
        dealt out to several processes, gives the same total loss as in one piece.
        """
        return {}

    def after_backward(self) -> None:
        """Gradients exist and are unscaled; before clipping and the update."""

    def after_step(self) -> None:
        """After each update: once per optimiser step, never per micro-batch."""

    def end_task(self, task: Task) -> None:
        """The task is learned; its examples can still be read."""

    # --- what serves ------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _serve(self) -> Iterator[nn.Module]:
        yield self.run.model.module

    def inference(self) -> AbstractContextManager[nn.Module]:
        """The weights that serve evaluation and export, within the context."""
        return self._serve()

    def export(self, directory: Path) -> str:
        """Write what a user takes away; returns the snippet that loads it."""
        with self.inference():
            return self.run.model.export(directory)

    # --- state ------------------------------------------------------------------------------------------------------
    def model_state(self) -> dict[str, Tensor]:
        """Tensors of the module that training changes: what was trainable after ``setup``, and all buffers."""
        return tensor_dict(self.run.model.module, self._trained)

    def load_model_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`model_state`.

        Raises:
            CheckpointError: the state has other tensors than this module; nothing is loaded.
        """
        expected = set(self.model_state())
        if set(state) != expected:
            odd = sorted(expected.symmetric_difference(state))
            raise CheckpointError(
                f"the checkpoint's tensors are not those of this model ({len(odd)} differ, such as '{odd[0]}'); it was "
                "made by another version or strategy, so start a new run."
            )
        self.run.model.module.load_state_dict(state, strict=False)

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs beyond the module and the optimiser: nested dicts of JSON and tensors."""
        return {} if self.buffer is None else {"buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, called after :meth:`setup` and before the module's state is loaded."""
        if self.buffer is not None:
            self.buffer.load_state_dict(state["buffer"])


__all__ = ["Capabilities", "Losses", "Pool", "Position", "RunContext", "Strategy", "TaskLoop"]
