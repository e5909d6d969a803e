"""MEMIT on one layer as a strategy: a value per edit by gradient steps, one matrix for all of them in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clkit.config import opt
from clkit.editing import rows
from clkit.editing.descent import descend
from clkit.editing.layer_edits import ChangedLayers, LearnedEditConfig
from clkit.editing.losses import target_loss
from clkit.editing.strategy import EditOutcome
from clkit.errors import RequestError
from clkit.models.additions import Additions, LowRankChange
from clkit.models.causal_lm import CausalLM
from clkit.modes import evaluating
from clkit.strategies.memit.covariance import KeyMoment, readers
from clkit.strategies.memit.subject import tokens_after
from clkit.strategies.memit.text import SENTENCES
from clkit.tasks.base import EditRecord

_Pair = tuple[Tensor, Tensor]


@dataclass
class MemitConfig(LearnedEditConfig):
    """Options of the closed-form edit."""

    depth: float = opt(0.25, "auto: how deep its block lies, as a part of the blocks", min=0, max=0.999)
    steps: int = opt(30, "most steps for the value of an edit", min=1)
    learning_rate: float = opt(0.05, "step size of Adam, relative to the size of the hidden states", above=0)
    largest: float = opt(1.0, "largest norm of an edit's value, relative to the hidden state it is added to", above=0)
    weight: float = opt(30.0, "how much a change of ordinary text counts against the edits", above=0)
    ridge: float = opt(0.1, "what directions that the sample text does not use count", above=0)


class Memit(ChangedLayers):
    """Closed-form edits of one down-projection (Meng et al., ICLR 2023, arXiv 2210.07229), all edits in one solution.

    Keys and values are those of the unedited model, so the matrix does not depend on the order of the edits, but for
    several of one prompt, of which the newest holds; and taking one out leaves exactly what there would be without it.
    docs/strategies/editing.md has equations and deviations.
    """

    config_class = MemitConfig
    memory = "update"

    def attach(self, model: CausalLM, seed: int) -> None:
        """Nothing is added before the first edit."""
        super().attach(model, seed)
        self.additions = Additions({self.location.name: self.location.projection}, self.location.decoder)
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self._moment: KeyMoment | None = None

    def learn(self, record: EditRecord) -> EditOutcome:
        """Find key and value of one edit, and solve for all edits again.

        Raises:
            NumericalError: the loss is not finite; nothing has changed.
            RequestError: the edit does not fit the model; nothing has changed.
        """
        key, value, losses = self._pair(record)
        pairs, prompts = {**self.pairs, record.id: (key, value)}, {**self.edits, record.id: record.prompt}
        change = self._solve(_newest(pairs, prompts))
        self.pairs, self.edits = pairs, prompts
        self._put(change)
        return EditOutcome(self.memory, len(losses), {"target": losses[-1]})

    def _pair(self, record: EditRecord) -> tuple[Tensor, Tensor, list[float]]:
        """Key (in,) and value (out,) of an edit: what is read at the subject's last token, and what to add there."""
        config = self.config
        after = tokens_after(self.model.form, record.prompt, record.target_new, record.subject)
        found, prefix = self.prefix(record, lambda r: _subjects(r, after))
        places = found.ends[: found.edits] - after - prefix.start
        each = torch.arange(found.edits, device=places.device)
        at = torch.zeros(prefix.states.shape[:2], dtype=torch.float32, device=places.device)
        at[each, places] = 1.0
        size = float(prefix.states[each, places].float().norm(dim=-1).mean())
        value = torch.zeros(self.location.shape[0], dtype=torch.float32, device=places.device, requires_grad=True)

        def loss() -> Tensor:
            return target_loss(prefix.logits(at[..., None] * value), prefix.targets)

        def constrain() -> None:
            value.mul_(min(1.0, config.largest * size / max(float(value.norm()), 1e-12)))

        with self.unedited(), evaluating(self.model.module):
            losses = descend(
                loss,
                [value],
                steps=config.steps,
                learning_rate=config.learning_rate * size / len(value) ** 0.5,
                stop_loss=config.stop_loss,
                after=constrain,
            )
        return prefix.activations[each, places].mean(dim=0), value.detach(), losses

    @property
    def moment(self) -> KeyMoment:
        """The second moment of the keys on the built-in text; computed once."""
        if self._moment is None:
            tokenizer = self.model.tokenizer
            ids = [tokenizer(text, add_special_tokens=False).input_ids[: self.model.max_length] for text in SENTENCES]
            tokens, mask = (t.to(self.location.device) for t in rows.pad_left(ids, tokenizer.pad_token_id))
            with self.unedited():
                x, _ = self.reader.activations(tokens, mask)
            self._moment = KeyMoment(x[mask.bool()].float(), self.config.ridge)
        return self._moment

    def _solve(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> LowRankChange | None:
        """The change of the matrix that serves these edits; see :func:`readers`."""
        if not pairs:
            return None
        keys = torch.stack([key for key, _ in pairs.values()])
        return LowRankChange(
            readers(keys, self.moment, self.config.weight), torch.stack([value for _, value in pairs.values()], dim=1)
        )

    def _put(self, change: LowRankChange | None) -> None:
        self.additions.put({} if change is None else {self.location.name: change})

    def forget(self, ids: Sequence[str], records: Mapping[str, EditRecord]) -> list[str]:
        """Take edits out and solve for the others again; their keys and values stay as they are."""
        rest = {i: pair for i, pair in self.pairs.items() if i not in set(ids)}
        change = self._solve(_newest(rest, self.edits))
        self.pairs = rest
        for i in ids:
            self.edits.pop(i, None)
        self._put(change)
        return []

    def memory_state(self) -> dict[str, Any]:
        """Keys, values and the solution, float32."""
        down = [change.get_buffer("down") for change in self.additions.changes.values()]
        pairs = {i: list(pair) for i, pair in self.pairs.items()}
        return {**super().memory_state(), "pairs": pairs, "readers": down}

    def load_memory_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`memory_state`."""
        super().load_memory_state(state)
        device = self.location.device
        self.pairs = {i: (key.to(device), value.to(device)) for i, (key, value) in state["pairs"].items()}
        if not self.pairs:
            self._put(None)
            return
        down, used = state["readers"][0].to(device), _newest(self.pairs, self.edits)
        if len(down) != len(used):  # of directories in which all edits of one prompt were served
            used = self.pairs
        self._put(LowRankChange(down, torch.stack([value for _, value in used.values()], dim=1)))


def _newest(pairs: Mapping[str, _Pair], prompts: Mapping[str, str]) -> dict[str, _Pair]:
    """Of several edits of one prompt the newest alone: its key is theirs, and it can have one value."""
    last = {prompts[i]: i for i in pairs}
    return {i: pair for i, pair in pairs.items() if last[prompts[i]] == i}


def _subjects(found: rows.Rows, after: int) -> Tensor:
    """(R,) position of the subject's last token, ``after`` tokens before the prompt's.

    Raises:
        RequestError: it was cut off.
    """
    if bool((found.prompt.sum(dim=1) <= after).any()):
        raise RequestError(
            "An edit does not fit the model: its subject was cut off, because prompt and target are too long together; "
            "raise model.max_length."
        )
    return found.ends - after
