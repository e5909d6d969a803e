"""EditStrategy: what a method of model editing has to offer to a run and to the Editor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from clkit.editing import judging
from clkit.errors import CapabilityError
from clkit.models.base import Model
from clkit.models.causal_lm import CausalLM
from clkit.strategy import Capabilities, RunContext, Strategy, TaskLoop, on_deepspeed
from clkit.tasks.base import EditExamples, EditRecord, Task


@dataclass(frozen=True)
class EditOutcome:
    """What came of one edit.

    Attributes:
        memory: where the edit was put; None where a method has no such places.
        steps: optimisation steps taken.
        losses: the last value of each loss term.
    """

    memory: str | None
    steps: int
    losses: Mapping[str, float]


@dataclass(frozen=True)
class Explanation:
    """Why an edited model answers a prompt as it does.

    Attributes:
        memory: what answers; None = the unedited model.
        scores: per memory, how strongly it responds.
        thresholds: per memory, what a score has to exceed.
        nearest: ids of the most similar edits and their similarity, the most similar first.
        likeness: per memory, how alike the prompt is to the nearest of its edits; empty where that does not count.
        least: what a likeness must be at least.
    """

    memory: str | None
    scores: Mapping[str, float]
    thresholds: Mapping[str, float]
    nearest: Sequence[tuple[str, float]] = field(default=())
    likeness: Mapping[str, float] = field(default_factory=dict)
    least: float = 0.0


class EditStrategy(Strategy):
    """A method that learns edits one after another and can take them out again.

    It works under the trainer (each task is a batch of edits, one step per edit) and, through :meth:`attach`, alone.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(kinds=frozenset({"edit"}), **on_deepspeed(2))

    # --- the method -------------------------------------------------------------------------------------------------
    @abstractmethod
    def attach(self, model: CausalLM, seed: int) -> None:
        """Prepare ``model`` for edits; its own weights stay as they are."""

    @abstractmethod
    def detach(self) -> None:
        """Take everything off the model again."""

    @abstractmethod
    def learn(self, record: EditRecord) -> EditOutcome:
        """Learn one edit; on an error nothing has changed."""

    @abstractmethod
    def settle(self) -> None:
        """What is done once after a batch of edits.

        The model serves before it too: a run scores it amid a batch (``eval.every_steps``), the Editor after each edit.
        """

    def consolidate(self) -> bool:
        """Merge memories, where the method can; returns whether there were any to merge."""
        return False

    @abstractmethod
    def forget(self, ids: Sequence[str], records: Mapping[str, EditRecord]) -> list[str]:
        """Take edits out.

        Args:
            ids: of edits that were learned.
            records: all edits that were learned and not taken out, by id.

        Returns:
            The ids of other edits that had to be learned again.
        """

    @abstractmethod
    def holdings(self) -> dict[str, list[str]]:
        """The ids of the edits in each memory, by its name."""

    @abstractmethod
    def explain(self, prompt: str) -> Explanation:
        """Which memory answers a prompt, and why."""

    def decisions(self) -> list[Explanation]:
        """How the newest forward pass was routed, one per sequence; empty where a method routes nothing."""
        return []

    @abstractmethod
    def unedited(self) -> AbstractContextManager[None]:
        """Within, the model answers as if there were no edits."""

    @abstractmethod
    def memory_state(self) -> dict[str, Any]:
        """All that the edited model and further edits need: JSON and tensors, without the base weights."""

    @abstractmethod
    def load_memory_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`memory_state`, after :meth:`attach`."""

    # --- in a run ---------------------------------------------------------------------------------------------------
    def setup(self, run: RunContext) -> None:
        """Attach to the run's model; none of its parameters is trained by an optimiser."""
        super().setup(run)
        self.attach(language_model(run.model), run.config.seed)
        self._trained = set()

    def parameters(self) -> list[Any]:
        """None: an edit is not a step of the run's optimiser."""
        return []

    def holds(self) -> dict[str, int]:
        """Trained is what the edits keep: the floating-point numbers in their memories."""
        return super().holds() | {"trained_parameters": _numbers(self.memory_state())}

    def stage_steps(self, stage: int) -> int:
        """One per edit."""
        return sum(len(self.run.tasks[i].train) for i in self.training_set(stage))

    def train_task(self, task: Task, loop: TaskLoop) -> None:
        """Learn the edits that are left of this task, in their order, and write down how each went."""
        model = language_model(self.run.model)
        for record in edit_records(task)[self.run.position.step :]:
            entry = judging.learn(self, model, record)
            self.run.note("edit", **entry)
            loop.done(entry["losses"])

    def end_task(self, task: Task) -> None:
        """See :meth:`settle`; then all edits so far are scored on the model that holds them."""
        self.settle()
        rows = judging.standing(self, language_model(self.run.model), self._records().values())
        last = {"rows": rows} if self.run.position.stage == len(self.run.tasks) - 1 else {}
        self.run.note("edits", edits=len(rows), means=judging.means(rows), **last)

    def model_state(self) -> dict[str, Tensor]:
        """Nothing: the base is not trained, and the memories are in :meth:`state_dict`."""
        return {}

    def load_model_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`model_state`."""

    def state_dict(self) -> dict[str, Any]:
        """The memories."""
        return {"memory": self.memory_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.load_memory_state(state["memory"])

    def export(self, directory: Path) -> str:
        """Write the edits without the base weights; returns the snippet that puts them on the base."""
        from clkit.editing.store import write_edits

        config, model = self.run.config, language_model(self.run.model)
        return write_edits(directory, self, model, config.strategy, config.seed, self._records())

    def _records(self) -> dict[str, EditRecord]:
        """The edits that the model holds, by id."""
        known = {r.id: r for task in self.run.tasks for r in edit_records(task)}
        return {i: known[i] for ids in self.holdings().values() for i in ids}


def language_model(model: Model) -> CausalLM:
    """The model, if it writes text.

    Raises:
        CapabilityError: it is a classifier.
    """
    if not isinstance(model, CausalLM):
        raise CapabilityError(f"Model '{model.name}' is no language model, so it has no facts to edit.")
    return model


def edit_records(task: Task) -> tuple[EditRecord, ...]:
    """The edits of a task.

    Raises:
        CapabilityError: the task is of another kind.
    """
    if not isinstance(task.train, EditExamples):
        raise CapabilityError(f"Task '{task.name}' holds no edits; set tasks.kind=edit.")
    return task.train.records


def _numbers(state: Any) -> int:
    """Floating-point numbers in the tensors of a nested state."""
    if isinstance(state, Tensor):
        return state.numel() * state.is_floating_point()
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return sum(_numbers(part) for part in parts)
