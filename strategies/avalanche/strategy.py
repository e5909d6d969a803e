"""Avalanche's plug-ins (EWC, SI, MAS, LwF, GEM, A-GEM, replay, GDumb, ...) inside clkit's trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clkit.config import StrategyConfig, opt
from clkit.errors import CapabilityError, ConfigError, DataError, Problem
from clkit.models.seeding import seeded
from clkit.rng import derive_seed, fresh_generator
from clkit.strategies.avalanche.agent import Agent, Snapshot, without_deprecations
from clkit.strategies.avalanche.plugins import OWN_BATCHES, SUPPORTED, make, problems
from clkit.strategies.avalanche.state import decode, encode, examples_of, numbers
from clkit.strategy import Losses, RunContext, Strategy
from clkit.tasks.base import Task
from clkit.tasks.batch import Batch


@dataclass
class AvalancheConfig(StrategyConfig):
    """A plug-in by its short name, with its own arguments."""

    plugin: str = opt("replay", f"one of {', '.join(sorted(SUPPORTED))}")
    options: dict[str, Any] = opt({}, "its arguments, such as {ewc_lambda: 0.4}; a text is read like a YAML value")


class Avalanche(Strategy):
    """Calls the plug-in where Avalanche's own loop does; model, optimiser and data stay the trainer's.

    What a plug-in draws at the borders of a task depends on the seed and the task alone, what its loader draws on the
    seed, the task and the epoch; so both can be repeated from any step on.
    """

    config_class = AvalancheConfig

    @classmethod
    def check(cls, config: AvalancheConfig) -> list[Problem]:
        """The plug-in exists, can be resumed and takes these arguments, and no second buffer is asked for."""
        found: list[Problem] = problems(config.plugin, config.options)
        if config.plugin in OWN_BATCHES and config.replay.size:
            what = f"{config.plugin} makes its own batches and never reads this buffer; set strategy.options.mem_size"
            found.append(Problem("strategy.replay.size", what))
        return found

    # --- set-up -----------------------------------------------------------------------------------------------------
    def setup(self, run: RunContext) -> None:
        """Make the plug-in.

        Raises:
            CapabilityError: it does not work with language models, or with this schedule.
            DataError: a task has nothing to train on.
            ConfigError: its memory sample is smaller than the number of earlier tasks, the first task is too short, or
                a list has no number for each task.
        """
        super().setup(run)
        name, train = self.config.plugin, run.config.train
        if not SUPPORTED[name].text and any(task.kind == "text" for task in run.tasks):
            able = ", ".join(sorted(n for n, s in SUPPORTED.items() if s.text))
            raise CapabilityError(f"Avalanche's {name} works on classes, not on texts; for language models take {able}")
        if name == "gdumb" and (train.schedule != "constant" or train.warmup) and not train.steps:
            raise CapabilityError(
                "Avalanche's gdumb trains on its memory, so the length of a schedule is not known; set train.steps, or "
                "train.schedule=constant and train.warmup=0."
            )
        if empty := [task.name for task in run.tasks if not len(task.train)]:
            raise DataError(f"Task '{empty[0]}' has no training example, and Avalanche's {name} can't learn from none.")
        self.plugin = make(name, self.config.options)
        weights = self.plugin.lwf.alpha if name == "lwf" else None
        if isinstance(weights, list) and len(weights) < len(run.tasks):
            raise ConfigError(
                f"strategy.options: alpha has {len(weights)} numbers, expected one, or one for each of "
                f"{len(run.tasks)} tasks"
            )
        if name == "agem" and self.plugin.sample_size < len(run.tasks) - 1:
            raise ConfigError(
                f"strategy.options: sample_size is {self.plugin.sample_size}, expected at least {len(run.tasks) - 1} "
                "(one example of each earlier task)"
            )
        if name == "rwalk" and self.stage_steps(0) < self.plugin.delta_t - 1:
            raise ConfigError(
                f"strategy.options: delta_t is {self.plugin.delta_t}, expected at most {self.stage_steps(0) + 1} (the "
                "first task's steps and one): rwalk scores no weight there, and its penalty is not a number"
            )
        self._agent: Agent | None = None
        self._penalises = "before_backward" in vars(type(self.plugin))
        self._gradients: list[Tensor] = []

    @property
    def agent(self) -> Any:
        """What the plug-in takes for its trainer; made when the examples have been checked."""
        if self._agent is None:
            # One head over all classes, as here, is one label space to LwF, whatever the tasks are called.
            self._agent = Agent(self, one_label_space=self.config.plugin == "lwf")
        return self._agent

    def _trigger(self, event: str, *, seed: bool = False) -> None:
        generator = fresh_generator(self.run.config.seed, "avalanche", event, self.run.position.stage)
        with without_deprecations(), seeded(generator) if seed else contextlib.nullcontext():
            getattr(self.plugin, event)(self.agent)

    def _clear_gradients(self) -> None:
        """The plug-in's own passes leave gradients, and some leave the model in evaluation mode."""
        self.run.model.module.zero_grad(set_to_none=True)
        self.run.model.module.train()

    def stage_steps(self, stage: int) -> int:
        """Steps of a stage; replay may cut the new examples of later ones into batches of a size of its own."""
        own, train = self.config.options.get("batch_size"), self.run.config.train
        if self.config.plugin != "replay" or not own or not stage or train.steps:
            return int(super().stage_steps(stage))
        return train.epochs * -(-self._epoch_size(stage) // int(own))

    # --- one task ---------------------------------------------------------------------------------------------------
    def begin_task(self, task: Task) -> None:
        """The experience begins."""
        agent = self.agent
        agent.dataloader = None
        agent.adapted_dataset = agent.experience.dataset
        for event in (
            "before_training",
            "before_train_dataset_adaptation",
            "after_train_dataset_adaptation",
            "before_training_exp",
        ):
            self._trigger(event, seed=True)
        if agent.adapted_dataset is agent.experience.dataset:
            agent.adapted_dataset = None

    def train_loader(self, task: Task) -> Iterator[Batch]:
        """The plug-in's own batches where it has a memory to mix in, else the trainer's."""
        loader = self._loader()
        batches: Iterable[Batch] = super().train_loader(task) if loader is None else self._from(loader)
        for batch in batches:
            self.agent.take(self._numbers(batch))
            self._trigger("before_training_iteration")
            self._clear_gradients()
            yield batch

    def _loader(self) -> Any:
        agent = self.agent
        if agent.adapted_dataset is not None and agent.dataloader is None:
            from avalanche.benchmarks.utils.data_loader import TaskBalancedDataLoader

            return TaskBalancedDataLoader(
                agent.adapted_dataset, batch_size=agent.train_mb_size, shuffle=True, oversample_small_groups=True
            )
        if self.config.plugin == "replay" and agent.dataloader is None:  # a run that resumes within a task
            agent.adapted_dataset = agent.experience.dataset
            self._trigger("before_training_exp", seed=True)
            agent.adapted_dataset = None
        return agent.dataloader

    def _from(self, loader: Any) -> Iterator[Batch]:
        run, per_epoch, epoch = self.run, len(loader), -1
        train = run.config.train
        draws: Draws | None = None
        for step in range(run.position.step, train.steps or train.epochs * per_epoch):
            if draws is None or step // per_epoch != epoch:
                epoch = step // per_epoch
                seed = derive_seed(run.config.seed, "avalanche loader", run.position.stage, epoch)
                draws = Draws(loader, seed, skip=step % per_epoch)
            yield self.agent.pool.batch(next(draws)[0])

    def _numbers(self, batch: Batch) -> Tensor:
        """(B,) the numbers of a batch's examples."""
        source: Any = batch.source
        if source is self.agent.pool:
            return batch.indices
        first = torch.tensor([self.agent.first[id(part)] for part in source.parts])
        starts = torch.from_numpy(source.offsets)
        part = torch.searchsorted(starts, batch.indices, right=True) - 1
        return first[part] + batch.indices - starts[part]

    def loss(self, batch: Batch) -> Losses:
        """The model's loss, and what the plug-in adds to it."""
        agent, model = self.agent, self.run.model
        agent.take(self._numbers(batch), batch)
        agent.mb_output = model.logits(batch)
        data = model.loss(batch, agent.mb_output)
        agent.loss = data + 0
        self._trigger("before_backward")
        losses = {"cross_entropy": data}
        if self._penalises:
            losses["penalty"] = agent.loss - data
        return losses

    def after_backward(self) -> None:
        """The plug-in may project the gradients; what it reads of them after the update is kept."""
        self._trigger("after_backward")
        self._trigger("before_update")
        self._gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters()]

    def after_step(self) -> None:
        """The end of an iteration."""
        for parameter, gradient in zip(self.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        self._trigger("after_update")
        self._trigger("after_training_iteration")
        self._clear_gradients()
        self._gradients = []

    def end_task(self, task: Task) -> None:
        """The experience ends: importances, memories and teachers are renewed."""
        self._trigger("after_training_exp", seed=True)
        self._trigger("after_training", seed=True)
        self._clear_gradients()
        self.agent.dataloader = self.agent.adapted_dataset = None
        self._set_draws(0)

    def exemplars(self) -> set[tuple[int, int]]:
        """Those of the plug-in's memory too."""
        offsets, found = self.agent.pool.offsets, super().exemplars()
        held = examples_of(self._plugin_state())
        held += [n for part in getattr(self.plugin, "memory_x", {}).values() for n in part.tolist()]  # GEM's
        for number in held:
            task = int(offsets.searchsorted(number, side="right")) - 1
            found.add((task, number - int(offsets[task])))
        return found

    # --- state ------------------------------------------------------------------------------------------------------
    def _plugin_state(self) -> dict[str, Any]:
        return {name: encode(value) for name, value in vars(self.plugin).items() if name not in _REBUILT}

    def _set_draws(self, done: int) -> None:
        """A-GEM's endless loader over its memories, put where it was after ``done`` draws."""
        if self.config.plugin == "agem" and self.plugin.buffers:
            seed = derive_seed(self.run.config.seed, "avalanche memory", len(self.plugin.buffers))
            self.plugin.buffer_dliter = Draws(self.plugin.buffer_dataloader, seed, skip=done)

    def state_dict(self) -> dict[str, Any]:
        """The buffer and the plug-in."""
        adapted = self._agent.adapted_dataset if self._agent is not None else None
        state = {
            "plugin": self._plugin_state(),
            "adapted": None if adapted is None else numbers(adapted),
            "draws": getattr(getattr(self.plugin, "buffer_dliter", None), "count", 0),
        }
        return {**super().state_dict(), **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        vars(self.plugin).update({n: decode(v, self.agent, Snapshot) for n, v in state["plugin"].items()})
        if state["adapted"] is not None:
            self.agent.adapted_dataset = self.agent.all_examples().subset(state["adapted"].tolist())
        if self.config.plugin == "agem" and self.plugin.buffers:
            self.plugin.update_memory(self.plugin.buffers.pop())  # makes the loader of all memories anew
            self._set_draws(state["draws"])


_REBUILT = frozenset(
    # loaders, and the hooks that :mod:`plugins` puts on an object
    {"buffer_dataloader", "buffer_dliter", "before_training_exp", "before_training_iteration", "solve_quadprog"}
)


class Draws(Iterator[Any]):
    """Batches of a loader whose random numbers depend on ``seed`` alone, whatever else draws meanwhile.

    Args:
        loader: draws from torch's global generator.
        seed: of this pass over it.
        skip: batches that were drawn before.
    """

    def __init__(self, loader: Iterable[Any], seed: int, skip: int = 0) -> None:
        self._state = torch.Generator().manual_seed(seed).get_state()
        self.count = 0
        with self._apart():
            self._iterator = iter(loader)
        for _ in range(skip):
            next(self)

    def __next__(self) -> Any:
        with self._apart():
            found = next(self._iterator)
        self.count += 1
        return found

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        kept = torch.get_rng_state()
        torch.set_rng_state(self._state)
        try:
            yield
        finally:
            self._state = torch.get_rng_state()
            torch.set_rng_state(kept)
