"""GRACE as a strategy: prompts near an edit's get another output of one projection, all others are not touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from clkit.config import opt
from clkit.editing.descent import descend
from clkit.editing.layer_edits import LayerEdits, LearnedEditConfig
from clkit.editing.losses import target_loss
from clkit.editing.strategy import EditOutcome, Explanation
from clkit.models.causal_lm import CausalLM
from clkit.models.location import guard
from clkit.models.routing import PromptRouter, at_last_token, uncompiled
from clkit.modes import evaluating
from clkit.strategies.grace.codebook import Codebook, Entry, admit, unit
from clkit.tasks.base import EditRecord

_PLACE = "codebook"


@dataclass
class GraceConfig(LearnedEditConfig):
    """Options of GRACE."""

    radius: float = opt(0.4, "deferral radius of a new key, between activations of length 1", above=0, max=2)
    steps: int = opt(100, "most steps per edit", min=1)
    learning_rate: float = opt(0.1, "step size of Adam, relative to the size of the layer's outputs", above=0)
    contexts: int = opt(0, "texts that the model writes itself, put before the prompt, one row each", min=0, max=10)


class Grace(LayerEdits):
    """A codebook beside one projection (Hartvigsen et al., NeurIPS 2023, arXiv 2211.11031).

    docs/strategies/editing.md has rules, defaults and deviations.
    """

    config_class = GraceConfig

    def attach(self, model: CausalLM, seed: int) -> None:
        """Watch the projection."""
        super().attach(model, seed)
        self.entries: list[Entry] = []
        self._gaps: Tensor | None = None  # (B, N) of the newest pass in which something was decided
        self.router = PromptRouter()
        self.router.install(self.location.lm, self.location.decoder)
        replace_output = uncompiled(self._replace)
        self._hook = self.location.projection.register_forward_hook(replace_output)
        self._unguard = guard(self.location.decoder, {self.location.name: (self.location.projection, replace_output)})

    def detach(self) -> None:
        """Take everything off; the model is what it was, bit for bit."""
        self._hook.remove()
        self._unguard()
        self.router.remove()
        self.location.projection._modules.pop(_PLACE, None)

    def unedited(self) -> AbstractContextManager[None]:
        """Within, no output is replaced."""
        return self.router.switched_off()

    # --- learning ---------------------------------------------------------------------------------------------------
    def learn(self, record: EditRecord) -> EditOutcome:
        """Put one edit into the codebook and learn its value.

        Raises:
            NumericalError: the loss is not finite; nothing has changed.
            RequestError: the edit does not fit the model; nothing has changed.
        """
        entries, place = self._admit(self.entries, record)
        value, losses = self._train(record, entries[place].value)
        entries[place] = replace(entries[place], value=value)
        self.edits[record.id] = record.prompt
        self._put(entries)
        return EditOutcome(entries[place].name, len(losses), {"target": losses[-1]})

    def _admit(self, entries: Sequence[Entry], record: EditRecord) -> tuple[list[Entry], int]:
        key = unit(self.reading(record.prompt))
        found: tuple[list[Entry], int] = admit(entries, record.id, key, record.target_new, self.config.radius)
        return found

    def _train(self, record: EditRecord, value: Tensor | None) -> tuple[Tensor, list[float]]:
        """The value that answers a record, from ``value`` or what the layer gives, and the losses."""
        found, prefix = self.prefix(record, lambda r: r.ends)
        base, last = prefix.base[: found.edits], found.ends[: found.edits] - prefix.start
        answer = torch.arange(base.shape[1], device=base.device) >= last[:, None]
        made = (base[0, last[0]] if value is None else value).clone().requires_grad_()

        def loss() -> Tensor:
            return target_loss(prefix.logits((made - base) * answer[..., None]), prefix.targets)

        size = float(base[answer].square().mean().sqrt())
        with self.unedited(), evaluating(self.model.module):
            losses = descend(
                loss,
                [made],
                steps=self.config.steps,
                learning_rate=self.config.learning_rate * size,
                stop_loss=self.config.stop_loss,
            )
        return made.detach(), losses

    def forget(self, ids: Sequence[str], records: Mapping[str, EditRecord]) -> list[str]:
        """Take edits out: the codebook is made anew of the others, as if these had never been.

        Radii that were split because of them are whole again. Values are kept where an entry still has the same edits;
        only the others are learned again.
        """
        rest = [i for i in self.edits if i not in set(ids)]
        entries: list[Entry] = []
        for i in rest:
            entries, _ = self._admit(entries, records[i])
        known = {e.edits: e.value for e in self.entries}
        again: list[str] = []
        for place, entry in enumerate(entries):
            value = known.get(entry.edits)
            if value is None:
                for i in entry.edits:
                    value, _ = self._train(records[i], value)
                again += entry.edits
            entries[place] = replace(entry, value=value)
        for i in ids:
            self.edits.pop(i, None)
        self._put(entries)
        return again

    # --- answering --------------------------------------------------------------------------------------------------
    def _put(self, entries: Sequence[Entry]) -> None:
        """Make ``entries`` the codebook: buffers below the projection, which move with the model."""
        self.entries = list(entries)
        self._gaps = None
        self.location.projection._modules.pop(_PLACE, None)
        values = [e.value for e in entries if e.value is not None]
        if entries:
            radii = torch.tensor([e.radius for e in entries], dtype=torch.float32)
            book = Codebook(torch.stack([e.key for e in entries]), torch.stack(values), radii)
            self.location.projection.add_module(_PLACE, book.to(self.location.device))

    @property
    def _book(self) -> Codebook | None:
        """The codebook on the projection; None while there is no edit."""
        found = self.location.projection._modules.get(_PLACE)
        return found if isinstance(found, Codebook) else None

    def _replace(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """From the last token of the prompt on, the value of the entry that answers."""
        book = self._book
        if book is None or self.router.off:
            return output
        x = args[0]

        def decide(mask: Tensor | None) -> list[int]:
            self._gaps = book.gaps(at_last_token(x, mask)[:, 0])
            found: list[int] = book.find(self._gaps)
            return found

        decided = self.router.decided(x, decide, [e.name for e in self.entries])
        if all(k < 0 for k, _ in decided):
            return output
        result = output.clone()
        for row, (k, start) in enumerate(decided):
            if k >= 0:
                result[row, start:] = book.values[k].to(output.dtype)
        return result

    def holdings(self) -> dict[str, list[str]]:
        """Edits per entry."""
        return {e.name: list(e.edits) for e in self.entries}

    def explain(self, prompt: str) -> Explanation:
        """Which entry answers; scores are distances and thresholds radii, both negative so that more is nearer."""
        book = self._book
        if book is None:
            return Explanation(None, {}, {})
        reading = self.reading(prompt, keep=False)
        (why,) = self._reasons(book, book.gaps(reading[None]))
        return replace(why, nearest=self.nearest(reading))

    def decisions(self) -> list[Explanation]:
        """Which entry answered each sequence of the newest pass, as in :meth:`explain`."""
        book = self._book
        return [] if book is None or self._gaps is None else self._reasons(book, self._gaps)

    def _reasons(self, book: Codebook, gaps: Tensor) -> list[Explanation]:
        names = [e.name for e in self.entries]
        radii = {e.name: -e.radius for e in self.entries}
        return [
            Explanation(None if k < 0 else names[k], {n: -gap for n, gap in zip(names, row, strict=True)}, radii)
            for k, row in zip(book.find(gaps), gaps.tolist(), strict=True)
        ]

    # --- state ------------------------------------------------------------------------------------------------------
    def memory_state(self) -> dict[str, Any]:
        """The entries."""
        return {**super().memory_state(), "entries": [asdict(e) for e in self.entries]}

    def load_memory_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`memory_state`."""
        super().load_memory_state(state)
        device = self.location.device
        self._put(
            [
                Entry(e["key"].to(device), e["radius"], e["target"], tuple(e["edits"]), e["value"].to(device))
                for e in state["entries"]
            ]
        )
