"""MEMO (Zhou, Wang, Ye, Zhan, ICLR 2023): grow the deep blocks only, and count model and exemplars together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.config import TrainConfig
from clkit.errors import CapabilityError, DataError, Problem
from clkit.evaluation.base import evaluation_mode
from clkit.exemplar_means import ExemplarMeans
from clkit.loader import training_classes
from clkit.memory import Footprint, HerdingBuffer, bytes_per_exemplar
from clkit.models.classifier import Classifier, ClassifierNet
from clkit.models.expandable import Expandable, channels_last, expand, grow_head, restructure, structure_of
from clkit.models.heads import GrowingHead, align_new_rows, fill_linear
from clkit.models.precision import at_least_float32
from clkit.strategies.memo.cache import CachedMaps
from clkit.strategies.memo.config import GrowingConfig, MemoConfig
from clkit.strategies.memo.costs import Costs
from clkit.strategies.memo.folding import folded, in_pieces
from clkit.strategy import Capabilities, Losses, RunContext, on_deepspeed
from clkit.tasks.base import Task, TaskSequence
from clkit.tasks.batch import Batch


def auxiliary_targets(rows: Tensor, known: int) -> Tensor:
    """What the auxiliary head shall say: 0 for every old class, 1, 2, ... for the new ones.

    Args:
        rows: (B,) the row of each label in the classifier; old classes have the first ``known`` rows.
        known: how many classes are old.

    >>> auxiliary_targets(torch.tensor([3, 9, 10, 19]), known=10).tolist()
    [0, 0, 1, 10]
    """
    return (rows - known + 1).clamp(min=0)


class Memo(ExemplarMeans):
    """Shared shallow blocks and one copy of the deep blocks per task; README.md has equations and deviations.

    The module's structure grows when a task begins. It is part of the state, so that a resume rebuilds it before
    tensors are loaded. The auxiliary head belongs to the strategy: it is never exported.
    """

    config_class = MemoConfig
    capabilities = Capabilities(kinds=frozenset({"classification"}), **on_deepspeed(2))

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.aux: nn.Linear | None = None
        self.costs: Costs
        self._general: nn.Module | None = None  # faster doubles of what is frozen, made when first needed
        self._stand_ins: list[nn.Module] = []

    @classmethod
    def check(cls, config: MemoConfig) -> list[Problem]:
        """Options that contradict each other."""
        problems = cls.check_serving(config, config.replay.size or config.budget)
        problems += cls.check_budget(config)
        if config.stop_old_gradient and not config.train_base:
            problems.append(
                Problem(
                    "strategy.stop_old_gradient", "with train_base=false no gradient reaches the shared part; drop one"
                )
            )
        return problems

    @staticmethod
    def check_budget(config: GrowingConfig) -> list[Problem]:
        """Only herding gives up exemplars when the model grows."""
        policy = config.replay.policy
        if not config.budget or config.budget_at == "end" or policy == HerdingBuffer.policy:
            return []
        what = f"a buffer that shrinks as the model grows (budget_at=stage) needs herding (got '{policy}')"
        return [Problem("strategy.replay.policy", what)]

    @classmethod
    def kept_bytes(cls, config: Any, sizes: Mapping[str, int], tasks: int) -> int:
        """A block for every task after the first, at most as large as the whole network."""
        return (tasks - 1) * sizes["weight_bytes"]

    @classmethod
    def trained(cls, sizes: Mapping[str, int]) -> int | None:
        """Its own: the network grows."""
        return None

    # --- set-up -----------------------------------------------------------------------------------------------------
    def setup(self, run: RunContext) -> None:
        """Cut the backbone and empty the head.

        Raises:
            CapabilityError: the model is no classifier that can be grown.
            ModelError: the backbone can't be cut there.
            DataError: a task without a class of its own.
            ConfigError: the budget is smaller than the model.
        """
        self.run = run
        net = self._classifier_net(run)
        self.new_classes = classes_by_task(run.tasks)
        backbone = expand(net, self._cut(net))
        grow_head(net)
        self.costs = self._costs(run, backbone)
        if self.config.budget:
            self.costs.check()
        super().setup(run)

    @staticmethod
    def _classifier_net(run: RunContext) -> ClassifierNet:
        if not isinstance(run.model, Classifier):
            raise CapabilityError(
                f"Strategy '{run.config.strategy.name}' grows the classifiers that clkit builds; model "
                f"'{run.model.name}' is a module of your own. Register its backbone under clkit.models."
            )
        if run.model.config.freeze_backbone or run.model.config.lora.r:
            option = "model.freeze_backbone" if run.model.config.freeze_backbone else "model.lora.r"
            raise CapabilityError(
                f"{option}: strategy '{run.config.strategy.name}' trains copies of the backbone itself; switch it off."
            )
        return run.model.module

    def _cut(self, net: ClassifierNet) -> str:
        return self.config.cut or net.backbone.default_cut

    def _costs(self, run: RunContext, backbone: Expandable) -> Costs:
        cached = 0
        if self.config.counting == "strict" and self._caches:
            first = next((t for t, task in enumerate(run.tasks) if len(task.train)), 0)
            batch = run.encodings.train(first).batch(torch.tensor([0])).to(run.engine.device)
            with evaluation_mode(run.model):
                cached = self._maps_and_old(batch)[0].nbytes
        return Costs(
            general=Footprint.of(backbone.general),
            block=Footprint.of(backbone.blocks[0]),
            width=backbone.width,
            classes=[len(new) for new in self.new_classes],
            per_exemplar=bytes_per_exemplar(task.train for task in run.tasks),
            cached_per_exemplar=cached,
            budget=round(self.config.budget * 2**20),
            counting=self.config.counting,
            at=self.config.budget_at,
        )

    @property
    def backbone(self) -> Expandable:
        """Its shared part and blocks."""
        backbone: Expandable = self.net.backbone  # type: ignore[assignment]
        return backbone

    @property
    def head(self) -> GrowingHead:
        """Its linear head."""
        head: GrowingHead = self.net.head
        return head

    def parameters(self) -> list[nn.Parameter]:
        """What is trained of the classifier, and the auxiliary head."""
        return super().parameters() + ([] if self.aux is None else list(self.aux.parameters()))

    def train_config(self, stage: int) -> TrainConfig:
        """The run's, with the exceptions of the first task."""
        train, first = self.run.config.train, self.config.first
        if stage > 0:
            return train
        decay = train.weight_decay if first.weight_decay is None else first.weight_decay
        return dataclasses.replace(
            train,
            epochs=first.epochs or train.epochs,
            weight_decay=decay,
            milestones=first.milestones or train.milestones,
        )

    def exemplar_limit(self, stage: int) -> int:
        """What the budget leaves, or ``replay.size``; before a run the model's size is not known, so the latter."""
        known = self.config.budget and hasattr(self, "costs")
        return self.costs.exemplars(stage) if known else super().exemplar_limit(stage)

    # --- one task ---------------------------------------------------------------------------------------------------
    def begin_task(self, task: Task) -> None:
        """Append a block and rows for the new classes; freeze what is old; start a new auxiliary head."""
        stage, generator = self.run.position.stage, self.run.streams["memo heads"]
        if stage > 0:
            self.backbone.grow()
        new = self.new_classes[stage]
        self.head.grow(new, self.backbone.out_features, generator, self.config.zero_columns)
        self.aux = None
        if stage > 0:
            self.aux = self._aux_head(len(new))
            fill_linear(self.aux, generator)
        self._settle()

    def _aux_head(self, new: int) -> nn.Linear:
        return nn.utils.skip_init(  # type: ignore[no-any-return, no-untyped-call]
            nn.Linear, self.backbone.width, new + 1, device=self.run.engine.device
        )

    def _settle(self) -> None:
        """Freeze what the number of blocks says is old, and note what the module consists of now."""
        old = len(self.backbone.blocks) - 1
        self.backbone.freeze(general=old > 0 and not self.config.train_base, blocks=old)
        self._general, self._stand_ins = None, []
        self._trained = {name for name, _ in self.net.named_parameters()}

    def train_loader(self, task: Task) -> Iterable[Batch]:
        """New examples and exemplars; as cached features where nothing that changes comes before the new block."""
        loader = self.step_loader()
        if self._caches and self.run.position.stage > 0:
            source, batch_size = loader.source, self.run.config.eval.batch_size
            first = self._compute(source.batch(loader.positions[:1]))
            size = sum(value.nbytes for value in first) * len(loader.positions)
            if size <= self.config.cache * 2**20:
                loader.source = CachedMaps(source, loader.positions, self._compute, batch_size)
        return loader

    @property
    def _caches(self) -> bool:
        """Whether features of later tasks may be kept.

        Nothing before the new block changes, all have one shape, and a step reads no example but those of the epoch
        (exemplars that are drawn beside the new examples are none of them).
        """
        changes = self.config.train_base or self.run.config.train.augment != "none" or not self._union
        return bool(self.config.cache) and not changes and self.run.model.tokenizer is None  # type: ignore[attr-defined]

    def _compute(self, batch: Batch) -> tuple[Tensor, Tensor]:
        batch = batch.to(self.run.engine.device)
        with torch.no_grad(), self.run.engine.autocast():
            return self._maps_and_old(batch)

    def _maps_and_old(self, batch: Batch) -> tuple[Any, Tensor]:
        """The shared part's output, and the features of the old blocks (B, width * old)."""
        inputs = batch.inputs
        if "maps" in inputs:
            return inputs["maps"], inputs["old"]
        x = inputs.get("x")
        maps = self._shared(**inputs) if x is None else self._shared(self.net.scaled(x))
        return maps, self._old_features(maps, len(batch))

    def _shared(self, *inputs: Tensor, **named: Tensor) -> Any:
        """The shared part's output; frozen, by its faster double."""
        backbone = self.backbone
        if not backbone.frozen_general:
            return backbone.maps(*inputs, **named)
        if self._general is None:
            self._general = folded(backbone.general, backbone.foldable)
        if not inputs:
            return self._general(**named)
        return in_pieces(self._general, channels_last(inputs[0]))

    def _old_features(self, maps: Any, count: int) -> Tensor:
        blocks = self.backbone.blocks[:-1]
        if not len(blocks):
            return self.head.weight.new_empty(count, 0)
        if not self._stand_ins:
            self._stand_ins = [folded(block, self.backbone.foldable) for block in blocks]
        if self.config.stop_old_gradient:
            with torch.no_grad():
                return torch.cat([block(maps) for block in self._stand_ins], dim=1)
        return torch.cat([block(maps) for block in self._stand_ins], dim=1)

    def loss(self, batch: Batch) -> Losses:
        """Cross entropy over all classes seen; from the second task on also the auxiliary one."""
        maps, old = self._maps_and_old(batch)
        new = self.backbone.blocks[-1](maps)
        logits = self.head(torch.cat([old, new], dim=1))
        losses = {"cross_entropy": self.run.model.loss(batch, logits)}
        if self.aux is not None and self.config.alpha_aux:
            known = len(self.head.classes) - self.aux.out_features + 1
            targets = auxiliary_targets(self.head.rows_of(batch.labels), known)
            losses["auxiliary"] = self.config.alpha_aux * F.cross_entropy(at_least_float32(self.aux(new)), targets)
        return losses

    def end_task(self, task: Task) -> None:
        """Bring the weights of new classes to the norm of the old ones'."""
        if self.aux is not None and self.config.align:
            with self.run.engine.gathered([self.head.weight], write=True):
                self.run.log("weight_alignment", align_new_rows(self.head, self.aux.out_features - 1))

    # --- exemplars --------------------------------------------------------------------------------------------------
    def select_exemplars(self) -> None:
        """Herding and class means, with the network as it is now; then what all of it occupies."""
        super().select_exemplars()
        self._log_memory()

    def _log_memory(self) -> None:
        """What model and exemplars occupy now, and would with the model as it is after the last task."""
        held = 0 if self.buffer is None else len(self.buffer)
        for when, stage in (("stage", self.run.position.stage), ("end", len(self.run.tasks) - 1)):
            self.run.log(f"memory_{when}_aligned_mib", self.costs.spent(stage, held) / 2**20)

    # --- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The buffer, the class means, the structure of the module and the auxiliary head."""
        return {
            **super().state_dict(),
            "structure": structure_of(self.net),
            "aux": None if self.aux is None else dict(self.aux.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`: rebuilds the module, whose tensors are loaded next."""
        super().load_state_dict(state)
        restructure(self.net, state["structure"])
        self.aux = None
        if state["aux"] is not None:
            self.aux = self._aux_head(len(state["aux"]["bias"]) - 1)
            self.aux.load_state_dict(state["aux"])
        self._settle()


def classes_by_task(tasks: TaskSequence) -> list[list[int]]:
    """The classes of each task, sorted.

    Raises:
        DataError: a task without classes, or one that brings a class back.
    """
    owner: dict[int, str] = {}
    found: list[list[int]] = []
    problems: list[Problem] = []
    for index, task in enumerate(tasks):
        classes = sorted(set(training_classes(task, index).tolist()) | set(task.classes or ()))
        if not classes:
            problems.append(Problem(f"task '{task.name}'", "has no class; a block per task needs new classes in each"))
        problems += [
            Problem(f"task '{task.name}'", f"brings class {c} back, which task '{owner[c]}' had")
            for c in classes
            if c in owner
        ]
        owner.update(dict.fromkeys(classes, task.name))
        found.append(classes)
    if problems:
        raise DataError.collect("A network that grows with its classes can't learn these tasks:", problems)
    return found
