"""What an edit can not change is computed once: the activations below the edited layer; only what is above runs."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from clkit.editing.rows import Rows
from clkit.errors import CapabilityError
from clkit.models.location import Location
from clkit.models.routing import CACHES, cache_of
from clkit.modes import evaluating


def position_ids(mask: Tensor) -> Tensor:
    """(R, T) places of the tokens within their rows, as ``generate`` numbers them."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


class Reader:
    """Runs the model up to the edited projection, and from there on.

    Args:
        location: the projection.
        positions: number the tokens of each row from its first one (the published code numbers the padding too).
    """

    def __init__(self, location: Location, positions: bool = True) -> None:
        self.location = location
        self.positions = positions
        accepted = inspect.signature(type(location.lm).forward).parameters
        self._takes = frozenset(accepted)
        self._direct: bool | None = None
        self._tuples = False

    def activations(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Input (R, T, in) and output (R, T, out) of the projection, in the types in which the model computes."""
        found: dict[str, Tensor] = {}
        with self._watching(found):
            self._decoder(input_ids, attention_mask)
        return found["in"], found["out"]

    def prefix(self, rows: Rows, since: Tensor | None = None) -> Prefix:
        """Everything that no step of an edit changes, computed once: what is below the edited projection.

        Args:
            rows: the edit.
            since: (R,) the first token of each row that the edit may change; None: all. What is above the edited
                projection is constant before it too: it is kept as keys and values, and steps run on what is left.
        """
        head = None if since is None else self._head(rows, int(since.min()))
        found: dict[str, Tensor] = {}
        block = self.location.blocks[self.location.block]

        def keep(module: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
            self._tuples = isinstance(out, tuple)
            found["block in"], found["block out"] = args[0].detach(), _first(out).detach()

        hook = block.register_forward_hook(keep)
        try:
            with self._watching(found):
                self._decoder(rows.input_ids, rows.attention_mask, head)
        finally:
            hook.remove()
        if self._direct is None:
            self._direct = self._adds_directly(rows, found, head)
        return Prefix(self, rows, found, self._direct, head)

    def _head(self, rows: Rows, start: int) -> Head | None:
        """The first ``start`` tokens; None: there are none, or the model can't keep them."""
        if start == 0 or "use_cache" not in self._takes:
            return None
        inputs = self._inputs(rows.input_ids[:, :start], rows.attention_mask[:, :start])
        with torch.no_grad(), evaluating(self.location.lm):
            made = self.location.decoder(**(inputs | {"use_cache": True}))
        _, cache = cache_of(made)
        # Layers whose update makes new tensors, so that a copy of the list is a copy of the state.
        plain = all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in getattr(cache, "layers", [None])
        )
        return Head(start, cache) if plain else None

    def _adds_directly(self, rows: Rows, found: dict[str, Tensor], head: Head | None) -> bool:
        """Whether what is added to the projection's output comes out of its block unchanged.

        True for all but the architectures that normalise the feed-forward part's output (Gemma 2 and 3, OLMo 2), where
        the projection is the one that closes its block (not up_proj, or c_fc of GPT-2).
        """
        if found["out"].shape != found["block out"].shape:
            return False
        size = found["out"].float().norm(dim=-1, keepdim=True) / found["out"].shape[-1] ** 0.5
        probe = torch.linspace(-1, 1, found["out"].shape[-1], device=size.device) * size
        with self.entering(self.location.block, found["block in"]), adding(self.location.projection, probe):
            shown: dict[str, Tensor] = {}
            block = self.location.blocks[self.location.block]
            hook = block.register_forward_hook(lambda m, args, out: shown.__setitem__("out", _first(out)))
            try:
                self._decoder(rows.input_ids, rows.attention_mask, head)
            finally:
                hook.remove()
        tokens = rows.attention_mask[:, -probe.shape[1] :].bool()
        out = found["block out"]
        gap = (shown["out"].float() - out.float() - probe)[tokens].norm() / probe[tokens].norm()
        rounding = 2 * torch.finfo(out.dtype).eps * out[tokens].float().norm() / probe[tokens].norm()
        return bool(gap < min(1e-3 + float(rounding), 0.05))

    # --- running parts of the model ---------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _watching(self, found: dict[str, Tensor]) -> Iterator[None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if args[0].dim() != 3:
                raise CapabilityError(
                    f"'{self.location.name}' reads {tuple(args[0].shape)} instead of (rows, tokens, numbers), so there "
                    "is no telling what belongs to which prompt; set strategy.layer to another layer"
                )
            found["in"], found["out"] = args[0].detach(), out.detach()

        hook = self.location.projection.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def _decoder(self, input_ids: Tensor, attention_mask: Tensor, head: Head | None = None) -> None:
        with evaluating(self.location.lm):
            self.location.decoder(**self._inputs(input_ids, attention_mask, head))

    def _inputs(self, input_ids: Tensor, attention_mask: Tensor, head: Head | None = None) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self.positions and "position_ids" in self._takes:
            inputs["position_ids"] = position_ids(attention_mask)
        if head is not None:
            for name in ("input_ids", "position_ids"):
                if name in inputs:
                    inputs[name] = inputs[name][:, head.length :]
            cache = next(name for name in CACHES if name in self._takes)
            inputs |= {cache: head.copy(len(input_ids)), "use_cache": True}
        return inputs

    @contextlib.contextmanager
    def entering(self, block: int, states: Tensor) -> Iterator[None]:
        """Within, the blocks below ``block`` compute nothing; ``block``, or what follows the last, reads ``states``."""
        below = [self.location.blocks[i] for i in range(block)]
        own = [b.__dict__.get("forward") for b in below]
        hook = None
        try:
            for i, module in enumerate(below):
                module.forward = self._stub(states if i == block - 1 else None)
            if block == 0:
                first = self.location.blocks[0]
                hook = first.register_forward_pre_hook(lambda m, args: (states, *args[1:]))
            yield
        finally:
            for module, forward in zip(below, own, strict=True):
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.forward = forward
            if hook is not None:
                hook.remove()

    def _stub(self, states: Tensor | None) -> Any:
        """The forward of a block that gives ``states``, or what it reads."""

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = hidden_states if states is None else states
            return (out,) if self._tuples else out

        return forward

    def logits(self, rows: Rows, at: Tensor, head: Head | None = None) -> Tensor:
        """(E, P, vocabulary) of the edit rows at the positions ``at``; evaluation mode is the caller's."""
        inputs = self._inputs(rows.input_ids[: rows.edits], rows.attention_mask[: rows.edits], head)
        at = at if head is None else at - head.length
        if "logits_to_keep" in self._takes:
            scores: Tensor = self.location.lm(**inputs, logits_to_keep=at).logits
            return scores
        return self.location.lm(**inputs).logits[:, at]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Head:
    """The first tokens of all rows as keys and values.

    Attributes:
        length: how many tokens (padding counts).
        cache: of transformers, of all R rows.
    """

    length: int
    cache: Any

    def copy(self, rows: int) -> Any:
        """A cache of the first ``rows`` rows to go on from; this one stays as it is."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:rows], layer.values[:rows]
        return cache


class Prefix:
    """The constant part of one edit's forward pass. Its T tokens are those after ``start``.

    Attributes:
        start: tokens of each row (padding counts) that no step computes again.
        activations: (R, T, in) float32, what the projection reads.
        base: (R, T, out) float32, what it gives without edits.
        block: the first block that has to run.
        states: (E, T, d) the hidden states of the edit rows that it reads, or that the last block gave.
    """

    def __init__(self, reader: Reader, rows: Rows, found: dict[str, Tensor], direct: bool, head: Head | None) -> None:
        self._reader = reader
        self._head = head
        self.start = 0 if head is None else head.length
        self._rows = rows
        self._direct = direct
        self.activations = found["in"].float()
        self.base = found["out"].float()
        self.block = reader.location.block + int(direct)
        self.states = found["block out" if direct else "block in"][: rows.edits]
        self._at = rows.learned
        self.targets = rows.labels[: rows.edits, self._at + 1]

    def logits(self, change: Tensor) -> Tensor:
        """(E, P, vocabulary) where a target is predicted, with ``change`` (E, T, out) added by an edit."""
        reader = self._reader
        if self._direct:
            states = (self.states.float() + change).to(self.states.dtype)
            with reader.entering(self.block, states):
                return reader.logits(self._rows, self._at, self._head)
        with reader.entering(self.block, self.states), adding(reader.location.projection, change):
            return reader.logits(self._rows, self._at, self._head)


@contextlib.contextmanager
def adding(projection: nn.Module, change: Tensor) -> Iterator[None]:
    """Within, the projection's output (B, T, out) has ``change`` added to it."""
    hook = projection.register_forward_hook(lambda m, args, out: (out.float() + change).to(out.dtype))
    try:
        yield
    finally:
        hook.remove()


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found
