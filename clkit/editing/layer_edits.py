"""What methods share that edit at one place of a model: the place, an edit as rows, which prompts look alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clkit.config import StrategyConfig, opt
from clkit.editing import contexts, rows
from clkit.editing.prefix import Prefix, Reader
from clkit.editing.strategy import EditOutcome, EditStrategy, Explanation
from clkit.errors import Problem
from clkit.models.additions import Additions, Change
from clkit.models.causal_lm import CausalLM
from clkit.models.location import locate
from clkit.modes import evaluating
from clkit.tasks.base import EditRecord

_NEAREST = 5


@dataclass
class LayerEditConfig(StrategyConfig):
    """Options of a method that reads one projection of the model."""

    layer: str = opt(
        "auto", "projection that is read: auto (by depth), the number of a block (-1 = the last), or a name"
    )
    depth: float = opt(0.85, "auto: how deep its block lies, as a part of the blocks", min=0, max=0.999)


@dataclass
class LearnedEditConfig(LayerEditConfig):
    """Options of a method that learns an edit by gradient steps."""

    steps: int = opt(50, "most steps per edit", min=1)
    learning_rate: float = opt(0.01, "step size of Adam", above=0)
    stop_loss: float = opt(0.05, "an edit is learned when its loss is not above", min=0)
    contexts: int = opt(10, "texts that the model writes itself, put before the prompt, one row each", min=0, max=10)
    eos: bool = opt(True, "teach that the answer ends")


class LayerEdits(EditStrategy):
    """A method that reads one projection.

    Attributes:
        edits: prompt of each edit by its id, in the order in which they were learned.
    """

    config_class = LayerEditConfig

    @classmethod
    def check(cls, config: Any) -> list[Problem]:
        """Edits rehearse nothing."""
        if config.replay.size:
            return [Problem("strategy.replay.size", f"got {config.replay.size}, expected 0: edits rehearse nothing")]
        return []

    def attach(self, model: CausalLM, seed: int) -> None:
        """Find the projection."""
        self.model, self.seed = model, seed
        self.location = locate(model.module, self.config.layer, self.config.depth)
        self.reader = Reader(self.location)
        self.edits: dict[str, str] = {}
        self._contexts: list[str] | None = None
        self._readings: dict[str, Tensor] = {}

    def settle(self) -> None:
        """There is nothing to do after a batch of edits."""

    def prefix(
        self, record: EditRecord, since: Callable[[rows.Rows], Tensor] | None = None
    ) -> tuple[rows.Rows, Prefix]:
        """The edit as token rows, and what of their forward pass the edit can't change; of the unedited model.

        Args:
            record: the edit.
            since: the first token of each row that the edit changes; None: it may change all.
        """
        config, device = self.config, self.location.device
        with self.unedited(), evaluating(self.model.module):
            if self._contexts is None:
                self._contexts = contexts.written(self.location.lm, self.model.tokenizer, device, config.contexts)
            found = rows.build(
                self.model.form,
                record.prompt,
                record.target_new,
                self._contexts,
                [],
                self.model.max_length,
                config.eos,
            ).to(device)
            return found, self.reader.prefix(found, None if since is None else since(found))

    def reading(self, prompt: str, keep: bool = True) -> Tensor:
        """(in,) what the projection reads at the last token of a prompt, in the unedited model.

        Args:
            prompt: one text.
            keep: remember it, since it is an edit's; False for what is only asked about.
        """
        found = self._readings.get(prompt)
        if found is None:
            ids = rows.prompt_ids(self.model.form, [prompt], self.model.max_length)
            tokens = torch.tensor(ids, device=self.location.device)
            with self.unedited():
                x, _ = self.reader.activations(tokens, torch.ones_like(tokens))
            found = x[0, -1].float()
            if keep:
                self._readings[prompt] = found
        return found.to(self.location.device)  # the model may have moved since

    def nearest(self, reading: Tensor) -> list[tuple[str, float]]:
        """The edits whose prompts look most alike to the projection, and their cosine similarity.

        Args:
            reading: (in,) of a prompt, see :meth:`reading`.
        """
        if not self.edits:
            return []
        known = list(self.edits)
        others = torch.stack([self.reading(self.edits[i]) for i in known])
        alike = torch.cosine_similarity(others, reading[None])
        return [(known[i], float(alike[i])) for i in alike.argsort(descending=True)[:_NEAREST].tolist()]

    def memory_state(self) -> dict[str, Any]:
        """The edits' prompts and the contexts; methods add their own."""
        return {"edits": dict(self.edits), "contexts": self._contexts}

    def load_memory_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`memory_state`."""
        self.edits = dict(state["edits"])
        self._contexts = state["contexts"]


class ChangedLayers(LayerEdits):
    """A method whose edits are one change of weights, through which every prompt goes.

    Attributes:
        memory: what the change is called.
        additions: the change on the model.
    """

    memory: str
    additions: Additions

    def detach(self) -> None:
        """Take the change off; the model is what it was, bit for bit."""
        self.additions.remove()

    def unedited(self) -> AbstractContextManager[None]:
        """Within, nothing is added."""
        return self.additions.switched_off()

    def holdings(self) -> dict[str, list[str]]:
        """All edits are in one place."""
        return {self.memory: list(self.edits)} if self.edits else {}

    def explain(self, prompt: str) -> Explanation:
        """Every prompt goes through the change; the nearest edits are those whose prompts look most alike."""
        return Explanation(self.memory if self.edits else None, {}, {}, self.nearest(self.reading(prompt, keep=False)))


class TrainedChange(ChangedLayers):
    """A change of weights that goes on being trained, edit after edit."""

    @abstractmethod
    def start(self) -> dict[str, Change]:
        """The change before the first edit."""

    @abstractmethod
    def train(self, record: EditRecord, changes: Mapping[str, Change]) -> tuple[dict[str, Change], list[float]]:
        """The change with one more edit in it, and the losses; ``changes`` stay as they are."""

    def learn(self, record: EditRecord) -> EditOutcome:
        """Train the change on one edit.

        Raises:
            NumericalError: the loss is not finite; nothing has changed.
            RequestError: the edit does not fit the model; nothing has changed.
        """
        changes, losses = self.train(record, self.additions.changes or self.start())
        self.edits[record.id] = record.prompt
        self.additions.put(changes)
        return EditOutcome(self.memory, len(losses), {"target": losses[-1]})

    def forget(self, ids: Sequence[str], records: Mapping[str, EditRecord]) -> list[str]:
        """Take edits out: all others are learned again, in their order, as if these had never been."""
        rest = [i for i in self.edits if i not in set(ids)]
        changes: dict[str, Change] = self.start() if rest else {}
        for i in rest:
            changes, _ = self.train(records[i], changes)
        for i in ids:
            self.edits.pop(i, None)
        self.additions.put(changes)
        return rest
