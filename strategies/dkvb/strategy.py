"""The discrete key-value bottleneck: a frozen encoder, frozen keys, and values that change only where they are read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clkit.config import TrainConfig
from clkit.errors import CapabilityError, ConfigError, DataError, Problem
from clkit.features import check_finite, frozen_classifier
from clkit.loader import Pool
from clkit.models.backbones.base import Backbone
from clkit.models.classifier import ClassifierNet
from clkit.resolve import validate
from clkit.strategies.dkvb.bottleneck import Bottleneck
from clkit.strategies.dkvb.config import DKVBConfig
from clkit.strategies.dkvb.keys import place_keys
from clkit.strategies.dkvb.network import BottleneckNet, PairEncodings, owners
from clkit.strategy import Capabilities, Losses, RunContext, Strategy, on_deepspeed, one_pass
from clkit.tasks import build_tasks
from clkit.tasks.base import Task
from clkit.tasks.batch import Batch, Encoded
from clkit.unlearning.tombstones import in_force

_ENCODE = 64  # examples whose vectors are computed at once where they are not cached


class DKVB(Strategy):
    """Träuble et al. 2023 (arXiv 2207.11240); README.md has equations, defaults and deviations.

    Features and the pairs that an example selects never change once the keys are placed, so a batch is made of pairs:
    a training step reads rows of a table and adds to them.
    """

    config_class = DKVBConfig
    capabilities = Capabilities(kinds=frozenset({"classification"}), **on_deepspeed(2))

    @classmethod
    def check(cls, config: DKVBConfig) -> list[Problem]:
        """Options that exclude each other, and the tasks that place the keys."""
        problems = []
        if config.top_k > config.pairs:
            what = f"out of range (got {config.top_k}, expected at most the {config.pairs} pairs of a head)"
            problems.append(Problem("strategy.top_k", what))
        if config.tokens and config.replay.size:
            problems.append(Problem("strategy.replay.size", "does not go together with tokens; set it to 0"))
        if config.compat and config.key_start == "kmeans":
            problems.append(Problem("strategy.key_start", "compat starts from normal draws; remove kmeans, or compat"))
        if (config.key_data == "tasks") != bool(config.key_tasks):
            what = "must be 'tasks' to use key_tasks" if config.key_tasks else "needs a source in key_tasks"
            problems.append(Problem("strategy.key_data", f"{what} (got '{config.key_data}')"))
        elif config.key_tasks:
            try:
                validate({"tasks": dict(config.key_tasks)}, origin="strategy.key_tasks")
            except ConfigError as error:
                problems += [Problem("strategy.key_tasks", p.what) for p in error.problems]
        return problems

    @classmethod
    def trained(cls, sizes: Mapping[str, int]) -> int | None:
        """Its own: values, and not the classifier's own head."""
        return None

    # --- set-up -----------------------------------------------------------------------------------------------------
    def setup(self, run: RunContext) -> None:
        """Put the bottleneck in the place of the classifier's head.

        Raises:
            CapabilityError: see :func:`clkit.features.frozen_classifier`; or the model has no tokens.
            ConfigError: slices do not fit the features.
        """
        super().setup(run)
        config = self.config
        model, net = frozen_classifier("dkvb", run)
        if config.tokens and type(net.backbone).tokens is Backbone.tokens:
            raise CapabilityError(
                f"strategy.tokens: '{model.name}' gives one vector per example and no tokens; set it to false"
            )
        width = net.backbone.out_features
        if config.split == "chunk" and width != config.heads * config.key_dim:
            raise ConfigError(
                f"strategy.key_dim: {config.heads} heads of {config.key_dim} make {config.heads * config.key_dim} "
                f"(expected {width}, the features of '{model.name}'); choose heads and key_dim to fit, or split=random"
            )
        head = Bottleneck(config, width, model.num_classes, run.config.seed)
        self._model, self.head = model, head
        self._net = model.module = BottleneckNet(net.backbone, head).to(run.engine.device)
        self._trained = {name for name, _ in model.module.named_parameters() if name.startswith("head.")}
        herds = self.buffer is not None and self.buffer.by_features
        run.encodings = PairEncodings(model, run.tasks, run.cache, carry=config.compat or herds)
        if head.values.requires_grad:
            _warn_of_drift(run.config.train)

    # --- keys -------------------------------------------------------------------------------------------------------
    def begin_task(self, task: Task) -> None:
        """Place the keys before anything is learned; later tasks find them placed.

        Raises:
            NumericalError: features are not finite. Any key would be the nearest to them, and no loss would show it.
        """
        new: list[Any] = [self.run.encodings.train(i) for i in self.training_set(self.run.position.stage)]
        for examples in new:
            examples.check_finite(task.name)
        if not self.head.placed and any(map(len, new)):  # a task without examples places none
            self.head.place(place_keys(self._key_queries(), self.config, self.run.streams["dkvb keys"]))

    def _key_queries(self) -> Tensor:
        """(N, C, k) of at most ``key_limit`` unlabelled vectors, drawn at random."""
        pool = Pool(self._key_sets())
        if not len(pool):
            raise DataError("strategy.key_data: there are no inputs to place the keys with")
        order = torch.randperm(len(pool), generator=self.run.streams["dkvb keys"])
        found: list[Tensor] = []
        left = self.config.key_limit
        with torch.no_grad(), self.run.engine.autocast():
            for part in torch.split(order, _ENCODE):
                batch = pool.batch(part).to(self.run.engine.device)
                vectors, counts = self._net.vectors(**batch.inputs)
                check_finite(vectors, owners(batch.ids, counts), self._model.name, "the data that place the keys")
                found.append(self.head.queries(vectors)[:left])
                left -= len(found[-1])
                if not left:
                    break
        return torch.cat(found)

    def _key_sets(self) -> list[Encoded]:
        run, config = self.run, self.config
        if config.key_data == "tasks":
            plugin = validate({"tasks": dict(config.key_tasks)}, origin="strategy.key_tasks").tasks
            forgotten = in_force(run.config.output_dir)  # the trainer has seen to the run's own tasks only
            tasks = forgotten.apply(build_tasks(plugin.name, plugin.config, run.config.seed))
            return [run.encodings.encode(task.train) for task in tasks]
        stages = range(len(run.tasks)) if config.key_data == "all" else self.training_set(run.position.stage)
        return [run.encodings.train(i) for i in stages]

    # --- one task ---------------------------------------------------------------------------------------------------
    def train_config(self, stage: int) -> TrainConfig:
        """The run's; votes are counted in the first epoch, and there is nothing to do in a second."""
        train: TrainConfig = super().train_config(stage)
        return one_pass(self, train, stage) if self.config.decoder == "votes" else train

    def train_loader(self, task: Task) -> Iterator[Batch]:
        """Batches of pairs. What a batch reads is recorded as it leaves, so the state is exact at every step."""
        votes = self.config.decoder == "votes"
        for batch in super().train_loader(task):
            pairs = batch.inputs["pairs"].to(self.head.keys.device)
            if not self._published_mask():
                self.head.record(pairs)
            if votes:
                new = slice(None) if batch.replayed is None else ~batch.replayed
                self.head.vote(pairs[new], batch.labels[new].to(pairs.device))
            yield batch

    def loss(self, batch: Batch) -> Losses:
        """Cross entropy over all classes. Votes have no gradient; their loss is only logged."""
        logits = self._net(**batch.inputs, masked=self._published_mask())
        loss = F.cross_entropy(logits.float(), batch.labels, label_smoothing=self.config.label_smoothing)
        return {"cross_entropy": loss}

    def _published_mask(self) -> bool:
        """Whether this step is one that the published code takes with the usage mask on and without counting."""
        position = self.run.position
        return self.config.compat and position.stage > 0 and position.step < self.epoch_steps(position.stage)

    # --- growing, and what stays ------------------------------------------------------------------------------------
    def adapt(self, num_classes: int) -> None:
        """Grow the label space to ``num_classes``, between tasks; what was learned stays exactly as it is.

        Raises:
            ConfigError: fewer classes than there are.
        """
        if num_classes < self.head.num_classes:
            raise ConfigError(
                f"num_classes: got {num_classes}, expected at least the {self.head.num_classes} classes that there are"
            )
        self.head.adapt(num_classes)
        self._model.num_classes = num_classes

    @classmethod
    def rebuild(cls, net: ClassifierNet, description: Mapping[str, Any]) -> BottleneckNet:
        """The network of an export."""
        config = DKVBConfig(**description["options"])
        head = Bottleneck(config, net.backbone.out_features, description["num_classes"], description["seed"])
        return BottleneckNet(net.backbone, head)

    def state_dict(self) -> dict[str, Any]:
        """The buffer and the size of the label space; keys, values and counters are tensors of the module."""
        return {**super().state_dict(), "num_classes": self.head.num_classes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.adapt(state["num_classes"])


def _warn_of_drift(train: TrainConfig) -> None:
    """Say when values would change that no example of a batch reads."""
    causes = {"optimizer": train.optimizer if train.optimizer != "sgd" else None}
    causes["momentum"] = f"{train.momentum}" if train.optimizer == "sgd" and train.momentum else None
    causes["weight_decay"] = f"{train.weight_decay}" if train.weight_decay else None
    found = ", ".join(f"train.{name}={value}" for name, value in causes.items() if value)
    if found:
        warnings.warn(
            f"{found}: changes values that the batch does not read, so that earlier tasks are forgotten sooner. Local "
            "updates need train.optimizer=sgd, train.momentum=0 and train.weight_decay=0.",
            RuntimeWarning,
            stacklevel=2,
        )
