"""Strategy: the contract of a continual-learning method, and what a run gives it to work with."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clkit.cache import RowCache
from clkit.config import RunConfig, StrategyConfig, TrainConfig
from clkit.engine.base import Engine
from clkit.errors import CapabilityError, CheckpointError, ModelError, Problem
from clkit.evaluation.features import extract
from clkit.loader import Encodings, Pool, StepLoader, steps_in_stage, training_classes
from clkit.memory import Buffer, HerdingBuffer, Ref, make_buffer
from clkit.memory.budget import held_bytes
from clkit.memory.herding import group_name, held_after
from clkit.models.base import Model
from clkit.models.lora import true_shape
from clkit.models.lora_sum import carries_updates
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
        causal: whether its state depends on nothing of a stage's records, not even on how many there are, before that
            stage begins, and on no record of it but in batches until it ends; ``exact_replay`` needs that.
    """

    kinds: frozenset[Kind] = frozenset({"classification", "text"})
    engines: frozenset[str] = frozenset({"local"})
    zero_stages: frozenset[int] = frozenset()
    needs_task_id: bool = False
    needs_lora: bool = False
    causal: bool = False


def on_deepspeed(last_stage: int = 3, also: Collection[str] = ()) -> dict[str, Any]:
    """What the capabilities of a strategy say that also runs on DeepSpeed, up to a ZeRO stage, and on other engines.

    Stage 3 is for those that read and write parameters only where the engine has gathered them.
    """
    return {"engines": frozenset({"local", "deepspeed", *also}), "zero_stages": frozenset(range(last_stage + 1))}


@dataclass
class Position:
    """Where a run is: the stage (task index) and the optimiser steps done in it and in all."""

    stage: int = 0
    step: int = 0
    total_steps: int = 0

    def advance(self) -> None:
        """One more step is done."""
        self.step += 1
        self.total_steps += 1


@dataclass
class RunContext:
    """What a strategy may use.

    Attributes:
        model: module, tokeniser, loss and generation.
        tasks: the whole sequence.
        engine: executes steps; the only way to devices and processes.
        config: the resolved configuration.
        streams: random generators by purpose.
        encodings: encoded examples of every task, made once.
        position: where the run is.
        log: ``log(name, value)`` writes one number to events.jsonl.
        note: ``note(kind, **fields)`` writes an event of another kind; plain JSON.
        cache: keeps what is computed once and never changes; on disk when the run keeps anything there.
    """

    model: Model
    tasks: TaskSequence
    engine: Engine
    config: RunConfig
    streams: Streams
    encodings: Encodings
    position: Position = field(default_factory=Position)
    log: Callable[[str, float], None] = lambda name, value: None
    cache: RowCache = field(default_factory=lambda: RowCache(None))
    note: Callable[..., None] = lambda kind, **fields: None


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
    Outside a forward pass it reads and writes parameters within ``run.engine.gathered`` (ZeRO-3 keeps pieces of them).
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

    def admit(self) -> None:
        """Refuse a run before weights are loaded; of :attr:`run` there are only ``tasks`` and ``config`` yet.

        Raises:
            ConfigError: something outside the configuration is missing, such as a run to start from.
        """

    @classmethod
    def kept_bytes(cls, config: Any, sizes: Mapping[str, int], tasks: int) -> int:
        """What it keeps on every device beside model and optimiser, at most, for ``clkit plan``.

        Args:
            config: its options.
            sizes: numbers in all (``parameters``) and in training (``trainable``).
            tasks: how many tasks there are.
        """
        return 0

    @classmethod
    def trained(cls, sizes: Mapping[str, int]) -> int | None:
        """How many parameters are trained at once, for ``clkit validate``; None where only its set-up can tell.

        Args:
            sizes: of the model as it is loaded: ``parameters``, and ``trainable`` of them.
        """
        return sizes["trainable"]

    # --- set-up -----------------------------------------------------------------------------------------------------
    def setup(self, run: RunContext) -> None:
        """Attach adapters, build heads, declare what is trained. Called once per process, also before a resume.

        Raises:
            CapabilityError: the buffer chooses by features, and the model has none.
            ModelError: an earlier run in this process left updates in the model that are not in its adapter.
        """
        self.run = run
        if carries_updates(run.model.module):
            raise carried(run.model)
        if size := self.exemplar_limit(0):
            self.buffer = make_buffer(self.config.replay.policy, size)
            if self.buffer.by_features and not run.model.has_features:
                raise CapabilityError(
                    f"strategy.replay.policy: '{self.buffer.policy}' chooses by features, and model '{run.model.name}' "
                    "has none; take reservoir or class-balanced"
                )
        self._trained = {name for name, p in run.model.module.named_parameters() if p.requires_grad}

    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser updates now, in a stable order."""
        return [p for p in self.run.model.module.parameters() if p.requires_grad]

    def holds(self) -> dict[str, int]:
        """What the method carries along now: parameters that are trained, exemplars, and their raw bytes."""
        by_task: dict[int, list[int]] = {}
        for task, index in sorted(self.exemplars()):
            by_task.setdefault(task, []).append(index)
        return {
            "trained_parameters": sum(true_shape(p).numel() for p in self.parameters()),
            "exemplars": sum(map(len, by_task.values())),
            "exemplar_bytes": sum(held_bytes(self.run.tasks[t].train, some) for t, some in by_task.items()),
        }

    def exemplars(self) -> set[tuple[int, int]]:
        """The training examples that it keeps, each as the index of its task and its own there: the buffer's."""
        return {(ref.task, ref.index) for ref in (() if self.buffer is None else self.buffer.refs)}

    # --- one task ---------------------------------------------------------------------------------------------------
    def training_set(self, stage: int) -> Sequence[int]:
        """Which tasks' examples are new at ``stage``; an empty answer skips the stage, its row of R stays empty."""
        return [stage]

    def train_config(self, stage: int) -> TrainConfig:
        """How ``stage`` is trained: epochs, schedule, weight decay. Micro-batches and the optimiser stay the run's."""
        return self.run.config.train

    def exemplar_limit(self, stage: int) -> int:
        """How many examples the buffer may hold from the end of ``stage`` on."""
        return int(self.config.replay.size)

    def stage_steps(self, stage: int) -> int:
        """Optimiser steps of ``stage``; asked for before a run too, when only tasks and configuration are known."""
        count = self._epoch_size(stage)
        return steps_in_stage(count, self.train_config(stage)) if count else 0

    def epoch_steps(self, stage: int) -> int:
        """Optimiser steps of one pass over ``stage``, exemplars included where they are part of it."""
        return -(-self._epoch_size(stage) // self.run.config.train.batch_size)

    def _epoch_size(self, stage: int) -> int:
        new = sum(len(self.run.tasks[t].train) for t in self.training_set(stage))
        return new + self._shuffled_in(stage) if new else 0

    @property
    def _union(self) -> bool:
        """Whether exemplars are part of the epochs: only where they stay the same while a task is learned."""
        replay = self.config.replay
        return bool(replay.policy == HerdingBuffer.policy and replay.mix == "auto")

    def _shuffled_in(self, stage: int) -> int:
        """How many exemplars are part of an epoch of ``stage``."""
        if not self._union or stage == 0:
            return 0
        counts: Counter[str] = Counter()
        for task in sorted({t for s in range(stage) for t in self.training_set(s)} - {*self.training_set(stage)}):
            labels = training_classes(self.run.tasks[task], task).tolist()
            counts.update(group_name(task, label) for label in sorted(labels))
        return held_after(counts, self.exemplar_limit(stage - 1))

    def begin_task(self, task: Task) -> None:
        """A new task comes. Not called again when a run resumes within the task: what it did must be in the state."""

    def train_loader(self, task: Task) -> Iterable[Batch]:
        """Batches, one per optimiser step, from the current position on; rehearsal is mixed in here."""
        return self.run.engine.batches(self)

    def step_loader(self) -> StepLoader:
        """The default loader of the current stage."""
        stage = self.run.position.stage
        return StepLoader(
            self.run.encodings,
            self.training_set(stage),
            self.train_config(stage),
            seed=self.run.config.seed,
            stage=stage,
            start=self.run.position.step,
            buffer=self.buffer,
            ratio=self.config.replay.ratio,
            draws=self.run.streams["replay draw"],
            keeps=self.run.streams["replay keep"],
            union=self._union,
        )

    def train_task(self, task: Task, loop: TaskLoop) -> None:
        """Learn one task; override to own the inner loop."""
        loop.run()

    def loss(self, batch: Batch) -> Losses:
        """Loss terms on a batch that is on the device, under autocast."""
        return {"cross_entropy": self.run.model.loss(batch)}

    def example_losses(self, batch: Batch) -> Tensor:
        """(B,) the loss of each example by itself, for an engine that clips the gradient of each.

        No example's may depend on another's, not even through a count; a strategy whose loss does can't run there.
        """
        return self.run.model.example_losses(batch)

    def units(self, batch: Batch) -> dict[str, float]:
        """How many units each term of :meth:`loss` is a mean over, known without a forward pass.

        Terms that are not named count ``batch.num_targets``. With this, a batch that is cut into micro-batches, or
        dealt out to several processes, gives the same total loss as in one piece.
        """
        return {}

    def after_backward(self) -> None:
        """Gradients exist and are unscaled; before clipping and the update. Add to them by ``engine.add_gradient``."""

    def after_step(self) -> None:
        """After each update: once per optimiser step, never per micro-batch."""

    def end_task(self, task: Task) -> None:
        """The task is learned; its examples can still be read."""

    def select_exemplars(self) -> None:
        """Let a buffer that chooses by features take the stage's records; called after :meth:`end_task`."""
        if not isinstance(self.buffer, HerdingBuffer):
            return
        run, stage = self.run, self.run.position.stage
        for t in self.training_set(stage):
            encoded, classes = run.encodings.train(t), run.encodings.classes(t).tolist()
            refs = [Ref(t, i, c, id) for i, (c, id) in enumerate(zip(classes, encoded.ids, strict=True))]
            features = extract(run.model, encoded, run.config.eval.batch_size)
            self.buffer.select(refs, features, self.exemplar_limit(stage))

    # --- what serves ------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _serve(self) -> Iterator[nn.Module]:
        yield self.run.model.module

    def inference(self) -> AbstractContextManager[nn.Module]:
        """The weights that serve evaluation and export, within the context."""
        return self._serve()

    def alternatives(self) -> Mapping[str, Callable[[], AbstractContextManager[nn.Module]]]:
        """Other weights of interest, by name, each as in :meth:`inference`: scored beside those that serve.

        After each task every one of them gets its row in a matrix of its own (``RunResult.further``). Names and number
        never change during a run.
        """
        return {}

    def export(self, directory: Path) -> str:
        """Write what a user takes away; returns the snippet that loads it."""
        with self.inference():
            return self.run.model.export(directory)

    @classmethod
    def rebuild(cls, net: Any, description: Mapping[str, Any]) -> Any:
        """Turn a newly made classifier's network into the one that an export holds; its weights are loaded after that.

        Args:
            net: backbone and linear head (``ClassifierNet``).
            description: what the exported network's ``description()`` gave.
        """
        raise CapabilityError(f"{cls.__name__} changes no network, so it can't rebuild one.")

    # --- state ------------------------------------------------------------------------------------------------------
    def model_state(self) -> dict[str, Tensor]:
        """Tensors of the module that training changes: what was trainable after ``setup``, and all buffers."""
        return self.run.engine.tensors(self.run.model.module, self._trained)

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
        module = self.run.model.module
        written = [p for n, p in module.named_parameters(remove_duplicate=False) if n in state]
        with self.run.engine.gathered(written, write=True):
            module.load_state_dict(state, strict=False)

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs beyond the module and the optimiser: nested dicts of JSON and tensors."""
        return {} if self.buffer is None else {"buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, called after :meth:`setup` and before the module's state is loaded."""
        if self.buffer is not None:
            self.buffer.load_state_dict(state["buffer"])


def total_loss(losses: Losses) -> Tensor:
    """The sum of the terms."""
    values = list(losses.values())
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def carried(model: Model) -> ModelError:
    """What to say of a model that computes with updates of an earlier run which are in no adapter of it."""
    return ModelError(
        f"Model '{model.name}' still has the updates of an earlier run in this process in it, beside its adapter, and "
        "what is exported now would lack them. Load the model again."
    )


def one_pass(strategy: Strategy, train: TrainConfig, stage: int) -> TrainConfig:
    """``train`` cut to one pass over ``stage``; a method that only counts has nothing to do in a second."""
    return replace(train, epochs=1, steps=min(train.steps, strategy.epoch_steps(stage)))


__all__ = ["Capabilities", "Losses", "Pool", "Position", "RunContext", "Strategy", "TaskLoop"]
