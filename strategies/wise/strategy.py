"""WISE as a strategy: each task is a batch of edits, and the model that serves is the one with its side memories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from clkit.editing import rows
from clkit.editing.strategy import EditOutcome, EditStrategy, Explanation
from clkit.errors import Problem
from clkit.models.causal_lm import CausalLM
from clkit.strategies.wise.config import WISEConfig, problems
from clkit.strategies.wise.core import Wise
from clkit.strategies.wise.router import Decision
from clkit.tasks.base import EditRecord

_NEAREST = 5


class WISE(EditStrategy):
    """Lifelong editing with side memories and a router (Wang et al. 2024, arXiv 2405.14768).

    README.md has equations, defaults and deviations. The method itself is :class:`clkit.strategies.wise.core.Wise`.
    """

    config_class = WISEConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.wise: Wise

    @classmethod
    def check(cls, config: WISEConfig) -> list[Problem]:
        """See :func:`clkit.strategies.wise.config.problems`."""
        found: list[Problem] = problems(config)
        return found

    def attach(self, model: CausalLM, seed: int) -> None:
        """Put an empty layer of side memories on the model."""
        self.wise = Wise(model, self.config, seed)

    def detach(self) -> None:
        """Take it off; the model is what it was, bit for bit."""
        self.wise.remove()

    def learn(self, record: EditRecord) -> EditOutcome:
        """Learn one edit into the shard that is being filled."""
        outcome = self.wise.learn(record)
        holder = next(m for m in self.wise.layer.all() if record.id in m.edits)
        answer, margin = outcome.losses[-1]
        return EditOutcome(holder.name, len(outcome.losses), {"target": answer, "margin": margin})

    def settle(self) -> None:
        """Nothing: thresholds are measured after every edit."""

    def consolidate(self) -> bool:
        """Merge the finished shards into one memory, besides what ``merge_every`` does."""
        before = self.holdings()
        self.wise.consolidate()
        return self.holdings() != before

    def forget(self, ids: Sequence[str], records: Mapping[str, EditRecord]) -> list[str]:
        """Take edits out; the other edits of their memories are learned again."""
        again: list[str] = self.wise.forget(ids, records)
        return again

    def holdings(self) -> dict[str, list[str]]:
        """Edits per side memory."""
        return {memory.name: memory.edits for memory in self.wise.layer.all()}

    def explain(self, prompt: str) -> Explanation:
        """Route a prompt and say how; the nearest edits are those whose prompts look most alike to the edited layer."""
        wise = self.wise
        if not len(wise.layer):
            return Explanation(None, {}, {})
        device = wise.location.device
        ids = torch.tensor(rows.prompt_ids(wise.model.form, [prompt], wise.model.max_length), device=device)
        wise.reader.activations(ids, torch.ones_like(ids))
        (decision,) = wise.router.last
        known, read = list(wise.prompts), wise.read(prompt, keep=False)
        if wise.gate.limit:
            alike = wise.gate.alike(read[None], known)[0]
        else:
            others = torch.stack([wise.reading(wise.prompts[i][0]) for i in known])
            alike = torch.cosine_similarity(others, read[:1])
        order = alike.argsort(descending=True)[:_NEAREST].tolist()
        nearest = [(known[i], float(alike[i])) for i in order]
        return self._explained(decision, nearest)

    def decisions(self) -> list[Explanation]:
        """What the router decided on each sequence; empty without a memory."""
        return [self._explained(d) for d in self.wise.router.last] if len(self.wise.layer) else []

    def _explained(self, d: Decision, nearest: Sequence[tuple[str, float]] = ()) -> Explanation:
        return Explanation(d.memory, d.scores, d.thresholds, nearest, d.likeness, self.wise.gate.limit)

    def unedited(self) -> AbstractContextManager[None]:
        """Within, nothing is scored and nothing is added."""
        found: AbstractContextManager[None] = self.wise.unedited()
        return found

    def memory_state(self) -> dict[str, Any]:
        """See :meth:`Wise.state_dict`."""
        state: dict[str, Any] = self.wise.state_dict()
        return state

    def load_memory_state(self, state: dict[str, Any]) -> None:
        """See :meth:`Wise.load_state_dict`."""
        self.wise.load_state_dict(state)
