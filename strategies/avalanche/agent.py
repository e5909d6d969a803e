"""What a plug-in takes for Avalanche's trainer: examples by number, trained parameters only, no optimiser."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from clkit.checkpoint import clone_state
from clkit.loader import Pool
from clkit.modes import evaluating, swapped
from clkit.strategy import Strategy
from clkit.tasks.avalanche import to_benchmark
from clkit.tasks.base import LabelledExamples, Task, TaskSequence
from clkit.tasks.batch import Batch


class Snapshot(nn.Module):
    """A copy of the model as it was: its trained tensors only, computed through the model itself.

    Teachers are run in evaluation mode; Avalanche's stay in training mode and keep changing their batch statistics.
    """

    def __init__(self, agent: Agent, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "_agent", agent)  # not a part of this module
        self.tensors = dict(tensors)

    def forward(self, numbers: Tensor) -> Tensor:
        """Logits of examples (B,)."""
        agent: Any = self._agent
        module = agent.run.model.module
        with torch.no_grad(), evaluating(module), swapped(module, self.tensors):
            logits: Tensor = agent.logits(numbers)
        return logits

    def __deepcopy__(self, memo: Any) -> Snapshot:
        agent: Any = self._agent
        return Snapshot(agent, clone_state(self.tensors))


class NumberedModel(nn.Module):
    """The model: numbers of examples (B,) in, logits out. Its parameters are those that are trained, no others."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.net = agent.run.model.module
        object.__setattr__(self, "_agent", agent)

    def forward(self, numbers: Tensor) -> Tensor:
        """Logits of examples (B,)."""
        agent: Any = self._agent
        logits: Tensor = agent.logits(numbers)
        return logits

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Only those that own a trained parameter; Avalanche walks through them again for each of their parents."""
        for name, module in super().named_modules(*args, **kwargs):
            if module is self or any(p.requires_grad for p in module.parameters(recurse=False)):
                yield name, module

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Without the frozen ones."""
        return ((n, p) for n, p in super().named_parameters(*args, **kwargs) if p.requires_grad)

    def __deepcopy__(self, memo: Any) -> Snapshot:
        agent: Any = self._agent
        return Snapshot(agent, clone_state(agent.owner.model_state()))


class Agent:
    """The attributes of Avalanche's ``SupervisedTemplate`` that plug-ins use.

    An example is its number in the pool of all tasks' training examples; so plug-ins never hold inputs, memories can be
    saved as lists of numbers, and texts, images and cached features are all alike to them. With a language model a
    target is that number too, and ``_criterion`` finds the answer's tokens by it.

    Args:
        owner: the strategy that runs the plug-in.
        one_label_space: task label 0 everywhere, whatever the scenario.
    """

    def __init__(self, owner: Strategy, *, one_label_space: bool) -> None:
        run = owner.run
        self.owner, self.run = owner, run
        parts = [run.encodings.train(i) for i in range(len(run.tasks))]
        self.pool = Pool(parts)
        self.first = {id(part): int(start) for part, start in zip(parts, self.pool.offsets, strict=False)}
        self._texts = any(task.kind == "text" for task in run.tasks)
        self.experiences = self._experiences(one_label_space)
        self.targets = torch.cat([self._targets(i) for i in range(len(parts))])
        self.device = run.engine.device
        self.optimizer = SimpleNamespace(zero_grad=lambda: run.model.module.zero_grad(set_to_none=True))
        self.train_mb_size = run.config.train.batch_size
        self.is_training = True
        self._model = NumberedModel(self)
        self.loss = torch.zeros(())
        self.mb_output: Any = None
        self.mbatch: list[Tensor] = []
        self.batch: Any = None  # the current mini-batch as it is trained on: images may be augmented
        self.dataloader: Any = None
        self.adapted_dataset: Any = None

    def _targets(self, index: int) -> Tensor:
        start, end = int(self.pool.offsets[index]), int(self.pool.offsets[index + 1])
        if self._texts:
            return torch.arange(start, end)
        labels: Any = self.run.encodings.train(index)
        return torch.as_tensor(labels.labels)

    def _experiences(self, one_label_space: bool) -> list[Any]:
        tasks = []
        for index, task in enumerate(self.run.tasks):
            start, end = int(self.pool.offsets[index]), int(self.pool.offsets[index + 1])
            examples = LabelledExamples(torch.arange(start, end), self._targets(index), list(task.train.ids))
            tasks.append(Task(task.name, examples, examples, "classification", "accuracy"))
        scenario = "domain" if one_label_space else self.run.tasks.scenario
        return list(to_benchmark(TaskSequence(tasks, scenario=scenario)).train_stream)

    def all_examples(self) -> Any:
        """One data set of all experiences; position and number are the same."""
        from avalanche.benchmarks.utils.utils import concat_datasets

        return concat_datasets([experience.dataset for experience in self.experiences])

    # --- what plug-ins read -----------------------------------------------------------------------------------------
    @property
    def experience(self) -> Any:
        """The current one."""
        return self.experiences[self.run.position.stage]

    @property
    def clock(self) -> Any:
        """Counters of the run."""
        position = self.run.position
        return SimpleNamespace(
            train_exp_counter=position.stage,
            train_iterations=position.total_steps,
            train_exp_iterations=position.step,
            total_iterations=position.total_steps,
        )

    @property
    def model(self) -> nn.Module:
        """The model; a copy that is assigned to it gives it its weights."""
        return self._model

    @model.setter
    def model(self, other: Snapshot) -> None:
        self.owner.load_model_state(other.tensors)

    def model_adaptation(self, model: Any = None) -> Any:
        """Nothing grows here."""
        return model

    @property
    def mb_x(self) -> Tensor:
        """Numbers (B,)."""
        return self.mbatch[0]

    @property
    def mb_y(self) -> Tensor:
        """Targets (B,)."""
        return self.mbatch[1]

    @property
    def mb_task_id(self) -> Tensor:
        """Task labels (B,)."""
        return self.mbatch[-1]

    def _criterion(self, output: Tensor, targets: Tensor) -> Tensor:
        if self._texts:
            return self.run.model.loss(self.pool.batch(targets.cpu()).to(self.device), output)
        return nn.functional.cross_entropy(output.float(), targets)

    def logits(self, numbers: Tensor) -> Tensor:
        """Of examples (B,), under the engine's autocast; those of the current mini-batch as the model saw them."""
        same = self.batch is not None and numbers is self.mbatch[0]
        batch = self.batch if same else self.pool.batch(numbers.cpu()).to(self.device)
        with self.run.engine.autocast():
            return self.run.model.logits(batch)

    # --- what the strategy does -------------------------------------------------------------------------------------
    def take(self, numbers: Tensor, batch: Batch | None = None) -> None:
        """Make examples (B,) the current mini-batch; ``batch`` holds them on the device."""
        self.batch = batch
        labels = torch.full_like(numbers, next(iter(self.experience.task_labels)))
        self.mbatch = [t.to(self.device) for t in (numbers, self.targets[numbers], labels)]


@contextlib.contextmanager
def without_deprecations() -> Iterator[None]:
    """Within, Avalanche may call what is deprecated, its own and numpy's, and not change the process's filters."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore", message="__array_wrap__ must accept", category=DeprecationWarning)
        yield
    for warning in caught:
        if not str(warning.message).startswith("Call to deprecated function"):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
