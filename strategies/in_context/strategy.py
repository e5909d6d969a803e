"""Retrieval in context as a strategy: the nearest edit is told to the model before the prompt; no weight changes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from clkit.config import opt
from clkit.editing.layer_edits import LayerEditConfig, LayerEdits
from clkit.editing.prefix import position_ids
from clkit.editing.strategy import EditOutcome, Explanation
from clkit.errors import CapabilityError, RequestError
from clkit.evaluation.packing import reads_rows
from clkit.models.causal_lm import CausalLM
from clkit.models.positions import learned_positions
from clkit.models.routing import Pass, PromptRouter, at_last_token, uncompiled
from clkit.strategies.in_context.widening import Insertion, Widening
from clkit.tasks.base import EditRecord

_NOTHING = Insertion(None, 0, ())


@dataclass
class InContextConfig(LayerEditConfig):
    """Options of retrieval in context."""

    similarity: float = opt(0.85, "cosine similarity from which on an edit is told to the model", min=-1, max=1)


class InContext(LayerEdits):
    """The edit whose prompt looks most alike is put before the prompt, as ``New fact: <prompt> <target>``.

    A control in the manner of Zheng et al. 2023 (arXiv 2305.12740), with one fact and without demonstrations. It acts
    inside the decoder's forward pass, so scorers, ``generate`` and pipelines use it without further change.
    """

    config_class = InContextConfig

    def attach(self, model: CausalLM, seed: int) -> None:
        """Watch the decoder."""
        super().attach(model, seed)
        self.targets: dict[str, str] = {}
        self._newest: Tensor | None = None  # (B, N) similarities of the newest pass in which something was decided
        self.router = PromptRouter()
        decoder = self.location.decoder
        self.router.install(self.location.lm, decoder)
        self._own = decoder.__dict__.get("forward")
        self._signature = inspect.signature(type(decoder).forward)
        decoder.forward = MethodType(uncompiled(self._forward), decoder)  # a deep copy of the model runs the copy
        reads_rows(self.location.lm)

    def detach(self) -> None:
        """Take everything off."""
        self.router.remove()
        reads_rows(self.location.lm, False)
        if self._own is None:
            self.location.decoder.__dict__.pop("forward", None)
        else:
            self.location.decoder.forward = self._own

    def unedited(self) -> AbstractContextManager[None]:
        """Within, nothing is told to the model."""
        return self.router.switched_off()

    # --- edits ------------------------------------------------------------------------------------------------------
    def learn(self, record: EditRecord) -> EditOutcome:
        """Remember one edit.

        Raises:
            RequestError: its prompt does not fit the model, or not behind what is told; nothing has changed.
        """
        self.reading(record.prompt)
        self._check_room(record)
        self.edits[record.id], self.targets[record.id] = record.prompt, record.target_new
        self._newest = None
        return EditOutcome(_name(record.id), 0, {})

    def _check_room(self, record: EditRecord) -> None:
        form, positions = self.model.form, learned_positions(self.model.module)
        (asked,) = form.tokenise(form.render([record.prompt]), [record.target_new])
        told, read = len(self._tokens(record.prompt, record.target_new)), min(len(asked.ids) + 1, self.model.max_length)
        if positions is not None and told + read > positions:
            raise RequestError(
                f"An edit does not fit the model: what is told takes {told} tokens, its prompt with the target {read}, "
                f"and the model reads {positions}."
            )

    def forget(self, ids: Sequence[str], records: Mapping[str, EditRecord]) -> list[str]:
        """Take edits out; nothing else changes."""
        for i in ids:
            self.edits.pop(i, None)
            self.targets.pop(i, None)
        self._newest = None
        return []

    def holdings(self) -> dict[str, list[str]]:
        """Each edit is by itself."""
        return {_name(i): [i] for i in self.edits}

    def explain(self, prompt: str) -> Explanation:
        """Which edit is told to the model, and how similar each one is."""
        if not self.edits:
            return Explanation(None, {}, {})
        reading = self.reading(prompt, keep=False)
        (why,) = self._reasons(self._alike(reading[None]))
        return replace(why, nearest=self.nearest(reading))

    def decisions(self) -> list[Explanation]:
        """Which edit was told in each sequence of the newest pass, as in :meth:`explain`."""
        return [] if self._newest is None else self._reasons(self._newest)

    def _reasons(self, alike: Tensor) -> list[Explanation]:
        names, limit = [_name(i) for i in self.edits], self.config.similarity
        found = []
        for row in alike.tolist():
            best = max(range(len(row)), key=lambda k: (row[k], k))
            chosen = names[best] if row[best] >= limit else None
            found.append(Explanation(chosen, dict(zip(names, row, strict=True)), dict.fromkeys(names, limit)))
        return found

    def _alike(self, readings: Tensor) -> Tensor:
        """(B, N) cosine similarity of activations (B, in) with the edits' prompts."""
        keys = torch.stack([self.reading(prompt) for prompt in self.edits.values()])
        normal = torch.nn.functional.normalize
        return normal(readings.float(), dim=-1) @ normal(keys, dim=-1).T

    # --- answering --------------------------------------------------------------------------------------------------
    def _forward(self, decoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward pass, with what is told to the model in it."""
        plain: Any = partial(type(decoder).forward, decoder) if self._own is None else self._own
        if self.router.off or not self.edits:
            return plain(*args, **kwargs)
        given = dict(self._signature.bind_partial(self.location.decoder, *args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        given.pop("self", None)
        call, ids = self.router.current(), given.get("input_ids")
        call.check()
        if not isinstance(ids, Tensor) or (isinstance(call.mask, Tensor) and call.mask.dim() != 2):
            raise CapabilityError(
                "Strategy 'in_context' reads token ids and attention masks (B, T); this pass brings embeddings, or a "
                "mask of another shape (a static cache?)."
            )
        if call.choice is None or len(call.choice) != len(ids):
            if any(row.tokens for row in call.kept.choice or []):
                raise CapabilityError(
                    "Strategy 'in_context' put a statement into this cache, of which generate knows nothing; give "
                    "generate the whole conversation without a cache."
                )
            call.choice = self._insertions(ids, call)
        if not any(row.tokens for row in call.choice):
            return plain(*args, **kwargs)
        wide = Widening(call.choice, ids.device)
        past = max(call.past - wide.extra, 0)
        mask = call.mask if isinstance(call.mask, Tensor) else ids.new_ones(len(ids), past + ids.shape[1])
        mask = wide.mask(mask)
        told = given if call.past else given | {"input_ids": wide.ids(ids, self.model.tokenizer.pad_token_id)}
        new = told["input_ids"].shape[1]
        told = told | {"attention_mask": mask, "position_ids": position_ids(mask)[:, -new:]}
        output = plain(**told)
        if not call.past:
            output.last_hidden_state = wide.narrowed(output.last_hidden_state)
        return output

    @torch.no_grad()
    def _insertions(self, ids: Tensor, call: Pass) -> list[Insertion]:
        """What is told before each sequence, decided on its prompt; a cache that was begun without it stays without.

        So nothing is told where ``generate`` computes its input in pieces, or continues a cache of its beginning.
        """
        if call.past or call.incomplete(ids.shape[1]):
            return [_NOTHING] * len(ids)
        prompt = self.router.prompt_mask(call, ids)
        prompt = torch.ones_like(ids) if prompt is None else prompt.long()
        with self.unedited():
            x, _ = self.reader.activations(ids, prompt)
        self._newest = self._alike(at_last_token(x, prompt)[:, 0])
        last = self._newest.shape[1] - 1 - self._newest.flip(1).argmax(dim=1)  # of equal ones the newest edit
        best = self._newest.amax(dim=1), last
        opening, names = self.model.form.opening, list(self.edits)
        rows = []
        for row, mask, score, k in zip(ids.tolist(), prompt.tolist(), *map(Tensor.tolist, best), strict=True):
            if score < self.config.similarity:
                rows.append(_NOTHING)
                continue
            first = mask.index(1)
            shown = row[first : first + len(opening)] == opening
            at = first + len(opening) if shown else first
            rows.append(Insertion(names[k], at, self._tokens(self.edits[names[k]], self.targets[names[k]])))
        return rows

    def _tokens(self, prompt: str, target: str) -> tuple[int, ...]:
        """What is told of an edit."""
        text = f"New fact: {prompt} {target}\nPrompt: "
        return tuple(self.model.tokenizer(text, add_special_tokens=False).input_ids)

    # --- state ------------------------------------------------------------------------------------------------------
    def memory_state(self) -> dict[str, Any]:
        """Prompts, targets and what the projection read at the prompts."""
        readings = [self.reading(prompt) for prompt in self.edits.values()]
        return {**super().memory_state(), "targets": dict(self.targets), "readings": readings}

    def load_memory_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`memory_state`."""
        super().load_memory_state(state)
        self.targets = dict(state["targets"])
        device = self.location.device
        self._readings = {p: r.to(device) for p, r in zip(self.edits.values(), state["readings"], strict=True)}


def _name(edit: str) -> str:
    return f"statement-{edit}"
