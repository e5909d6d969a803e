"""Which tokens of a forward pass are the prompt, and decisions made on them once for a whole sequence."""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clkit.errors import CapabilityError

# What transformers calls the key-value cache: 5.23 renamed it.
CACHES = ("cache", "past_key_values")

_PIECE = 512  # tokens that are added up at once

_PROMPT: ContextVar[Tensor | None] = ContextVar("clkit_prompt_tokens", default=None)


@contextlib.contextmanager
def marking_prompt(mask: Tensor) -> Iterator[None]:
    """Within, ``mask`` (B, T) bool says which tokens of each forward pass of that shape belong to the prompt.

    Whoever scores an answer together with its prompt in one pass must say so: an edited model decides on the prompt
    alone, as it does when it writes the answer itself.
    """
    token = _PROMPT.set(mask.bool())
    try:
        yield
    finally:
        _PROMPT.reset(token)


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, for which a compiled model leaves its graph: what is decided depends on what is read."""
    made: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return made


def forget_compiled() -> None:
    """Compiled models are compiled anew at their next pass: torch does not look whether a hook was added since."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def marked_prompt() -> Tensor | None:
    """The mask of the innermost :func:`marking_prompt`, or None."""
    return _PROMPT.get()


class Sums(NamedTuple):
    """What a layer read of the tokens in a cache.

    Attributes:
        total: (B, d) float32, over the tokens that are not padding.
        tokens: (B, 1) how many these are.
        seen: how many positions there are, padding too.
    """

    total: Tensor
    tokens: Tensor
    seen: int


class Kept(NamedTuple):
    """What a cache carries of the sequences in it.

    Attributes:
        choice: what was decided for each; None = not yet.
        sums: see :meth:`PromptRouter.carry`; None = nothing was counted.
    """

    choice: list[Any] | None = None
    sums: Sums | None = None


@dataclass
class Pass:
    """One forward pass of the decoder.

    Attributes:
        choice: what was decided for each of its sequences; None = not yet.
        mask: its attention mask, as given.
        cache: the key-value cache that it continues.
        past: how many tokens are in that cache.
        kept: what that cache carries.
        input: how many tokens the input of ``generate`` has, those in the cache included; None = not in ``generate``,
            or all is decided.
        packed: it holds several sequences in one row.
    """

    choice: list[Any] | None = None
    mask: Any = None
    cache: Any = None
    past: int = 0
    kept: Kept = field(default_factory=Kept)
    input: int | None = None
    packed: bool = False

    def check(self) -> None:
        """Refuse what can't be routed.

        Raises:
            CapabilityError: the pass holds several sequences in one row.
        """
        if self.packed:
            raise CapabilityError(
                "This pass holds several sequences in one row (packing, continuous batching), and an edited model "
                "answers row by row. Use generate, or one sequence per row."
            )

    def incomplete(self, length: int) -> bool:
        """Whether a pass of ``length`` tokens ends before the prompt does: ``generate`` computes it in pieces."""
        return self.input is not None and self.past + length < self.input


@dataclass
class _Generation:
    """One call of ``generate``; ``input``: how many tokens it was given, those in a cache included, where known."""

    input: int | None
    choice: list[Any] | None = None


class PromptRouter:
    """Keeps what is decided on a sequence's prompt for the whole sequence; the base of methods that route.

    What the prompt is: the tokens marked by :func:`marking_prompt`; else within ``generate`` its whole input, what is
    in a cache that it was given included; else all tokens of the first forward pass of a sequence, as its attention
    mask shows them. A pass by hand that continues a key-value cache, or one that comes later in the same call of
    ``generate``, keeps the decision.

    Attributes:
        off: True while nothing is routed.
    """

    def __init__(self) -> None:
        self.off = False
        self._local = threading.local()
        self._undo: list[Any] = []
        self._kept = f"_clkit_choice_{id(self)}"  # attribute of a cache: the decision for the sequences in it

    def install(self, lm: Any, decoder: nn.Module) -> None:
        """Watch the model's forward passes and its ``generate``."""
        self._signature = inspect.signature(type(decoder).forward)
        before = decoder.register_forward_pre_hook(uncompiled(self._before), with_kwargs=True)
        after = decoder.register_forward_hook(uncompiled(self._after), with_kwargs=True, always_call=True)
        self._undo = [before.remove, after.remove]
        if callable(getattr(lm, "generate", None)):
            own = lm.__dict__.get("generate")
            lm.generate = MethodType(self._generating(own), lm)

            def restore() -> None:
                if own is None:
                    del lm.generate
                else:
                    lm.generate = own

            self._undo.append(restore)

    def remove(self) -> None:
        """Stop watching."""
        for undo in self._undo:
            undo()
        self._undo = []

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """Within, nothing is routed: the model answers by itself."""
        before, self.off = self.off, True
        try:
            yield
        finally:
            self.off = before

    def current(self) -> Pass:
        """The forward pass that is going on; what is set as its ``choice`` is kept for its sequences."""
        return getattr(self._local, "call", None) or Pass()

    def decided(
        self, x: Tensor, decide: Callable[[Tensor | None], Sequence[int]], names: Sequence[str]
    ) -> list[tuple[int, int]]:
        """Who answers each sequence of this pass, -1 = nobody, and from which of its tokens on: the prompt's last one.

        Decisions are kept by name, so that a sequence whose answer was taken out goes on without one.

        Args:
            x: (B, T, ...), what a layer reads.
            decide: gives a place in ``names`` or -1 for each sequence, from the mask of :meth:`prompt_mask`; called
                where nothing was decided yet and the prompt ends in this pass.
            names: of all that can answer now.

        Raises:
            CapabilityError: the pass holds several sequences in one row.
        """
        call = self.current()
        call.check()
        if call.choice and len(x) % len(call.choice) == 0:  # a cache of one prompt for several answers
            call.choice = [choice for choice in call.choice for _ in range(len(x) // len(call.choice))]
        if call.choice is None or len(call.choice) != len(x):
            if call.incomplete(x.shape[1]):
                return [(-1, x.shape[1])] * len(x)
            mask = self.prompt_mask(call, x)
            ends = last_token(mask, x.shape[1], len(x)) + call.past
            chosen = [names[k] if k >= 0 else None for k in decide(mask)]
            call.choice = list(zip(chosen, ends.tolist(), strict=True))
        places = {name: names.index(name) for name, _ in call.choice if name in names}
        return [(places.get(name, -1), max(end - call.past, 0)) for name, end in call.choice]

    def prompt_mask(self, call: Pass, x: Tensor) -> Tensor | None:
        """(B, T) bool, the tokens of ``x`` (B, T, ...) that belong to the prompt; None = all of them."""
        marked, length = marked_prompt(), x.shape[1]
        if marked is not None and marked.shape == x.shape[:2]:
            return marked.to(x.device)
        visible = _visible(call, length)
        if call.input is None or call.past + length <= call.input:
            return visible
        own = torch.arange(call.past, call.past + length, device=x.device) < call.input  # without a guessed answer
        return own.expand(len(x), -1) if visible is None else visible & own

    # --- what is in a cache -----------------------------------------------------------------------------------------
    def mean(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, d) float32, the mean of ``x`` (B, T, d) over the prompt's tokens, also those in the cache.

        Of a cache that was begun without :meth:`carry`, or cut since, the tokens in it don't count.

        Args:
            x: what a layer reads.
            mask: of :meth:`prompt_mask`.
        """
        before = self._before_this(x)
        if before is None:
            return mean_over(x, mask)
        total, tokens = _summed(x, mask)
        mean: Tensor = (before.total + total) / (before.tokens + tokens).clamp(min=1.0)
        return mean

    def carry(self, x: Tensor) -> None:
        """Count this pass's tokens, so that :meth:`mean` knows them where a later prompt continues the cache."""
        call = self.current()
        before = self._before_this(x)
        if call.past and before is None:
            call.kept = call.kept._replace(sums=None)
            return
        total, tokens = _summed(x.detach(), _visible(call, x.shape[1]))
        if before is not None:
            total, tokens = before.total + total, before.tokens + tokens
        call.kept = call.kept._replace(sums=Sums(total, tokens, call.past + x.shape[1]))

    def _before_this(self, x: Tensor) -> Sums | None:
        """The sums over the tokens in the cache, a row for each of ``x``; None: there are none, or they are unknown."""
        call = self.current()
        sums = call.kept.sums
        if not call.past or sums is None or sums.seen != call.past or len(x) % len(sums.total):
            return None
        times = len(x) // len(sums.total)  # a cache of one prompt for several beams
        return Sums(sums.total.repeat_interleave(times, 0), sums.tokens.repeat_interleave(times, 0), sums.seen)

    def _generating(self, own: Any) -> Any:
        """A method that replaces the class's, or the ``own`` one of a model; a deep copy of the model runs the copy."""

        def generate(lm: Any, *args: Any, **kwargs: Any) -> Any:
            plain = partial(type(lm).generate, lm) if own is None else own
            outer = getattr(self._local, "generation", None)
            self._local.generation = _Generation(None if _put_before(lm) else _given(args, kwargs))
            try:
                return plain(*args, **kwargs)
            finally:
                self._local.generation = outer

        return generate

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.off:  # also a pass of the plain model within one that is being decided
            return
        given = self._signature.bind_partial(module, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        length = cache.get_seq_length() if cache is not None and hasattr(cache, "get_seq_length") else 0
        past = int(length)
        kept = getattr(cache, self._kept, Kept()) if past else Kept()
        generation: _Generation | None = getattr(self._local, "generation", None)
        choice = kept.choice if generation is None else generation.choice  # each call of it is a prompt of its own
        known = None if generation is None or generation.choice is not None else generation.input
        packed = given.get("cu_seq_lens_q") is not None or (not past and _restarts(given))
        self._local.call = Pass(choice, given.get("attention_mask"), cache, past, kept, known, packed)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.off:
            return
        call, self._local.call = getattr(self._local, "call", None), None
        if call is None or (call.choice is None and call.kept.sums is None):
            return
        generation = getattr(self._local, "generation", None)
        if generation is not None:
            generation.choice = call.choice
        made = cache_of(output)[1] if isinstance(output, dict) else None
        for cache in (call.cache, made):
            if hasattr(cache, "get_seq_length"):
                setattr(cache, self._kept, Kept(call.choice, call.kept.sums))


def _given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """How many tokens a call of ``generate`` is given, those in a cache included; None = it starts from nothing."""
    names = ("inputs", "input_ids", "inputs_embeds", "attention_mask")  # the mask also where only new tokens are given
    found = [*args[:1], *(kwargs.get(name) for name in names)]
    return max((t.shape[1] for t in found if isinstance(t, Tensor) and t.dim() > 1), default=None)


def _put_before(lm: Any) -> bool:
    """Whether a peft adapter puts tokens of its own before the input of ``generate`` (prompt tuning and the like)."""
    wrapper = getattr(getattr(lm, "prepare_inputs_for_generation", None), "__self__", None)  # peft's while it generates
    return bool(getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False))


def _restarts(given: Mapping[str, Any]) -> bool:
    """Whether positions begin again within a row that no mask explains: then transformers takes it for several ones."""
    places = given.get("position_ids")
    if given.get("attention_mask") is not None or not isinstance(places, Tensor) or places.dim() != 2:
        return False
    return bool((places.diff(dim=1) <= 0).any())


def _visible(call: Pass, length: int) -> Tensor | None:
    """(B, T) bool, which of the ``length`` tokens of a pass are no padding; None = all."""
    mask = call.mask
    if isinstance(mask, Mapping):  # one per kind of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return None
    row = mask[:, 0, -1] if mask.dim() == 4 else mask  # of a square one: what the last token sees
    end = call.past + length
    row = row[:, call.past : end] if row.shape[1] >= end else row[:, -length:]  # a static cache's is longer
    return row.bool() if mask.dim() != 4 or row.dtype == torch.bool else row >= 0


def _summed(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, d) sum and (B, 1) number of the tokens of ``x`` (B, T, d) that ``mask`` marks; float32."""
    weights = x.new_ones(x.shape[:2], dtype=torch.float32) if mask is None else mask.to(x.device, torch.float32)
    total = x.new_zeros((x.shape[0], x.shape[2]), dtype=torch.float32)
    for start in range(0, x.shape[1], _PIECE):  # a long prompt is not copied as a whole
        here = slice(start, start + _PIECE)
        total = total + (x[:, here].float() * weights[:, here, None]).sum(dim=1)
    return total, weights.sum(dim=1, keepdim=True).expand(len(x), 1)


def cache_of(output: dict[str, Any]) -> tuple[str, Any]:
    """What a forward pass calls the key-value cache that it gives back, and the cache; ("", None) = none."""
    # Of the keys themselves: transformers warns when an output is asked for the old name.
    held = list(output)
    return next(((n, output[n]) for n in CACHES if n in held and output[n] is not None), ("", None))


def last_token(mask: Tensor | None, length: int, rows: int) -> Tensor:
    """(B,) index of the last token that ``mask`` (B, T) marks; without a mask the last of ``length``, for ``rows``."""
    if mask is None:
        return torch.full((rows,), length - 1)
    places = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask.bool(), places, 0).amax(dim=1)


def at_last_token(values: Tensor, mask: Tensor | None) -> Tensor:
    """(B, 1, d) of ``values`` (B, T, d) at the last token that ``mask`` marks."""
    last = last_token(mask, values.shape[1], len(values)).to(values.device)
    return values[torch.arange(len(values), device=values.device), last][:, None]


def mean_over(values: Tensor, mask: Tensor | None) -> Tensor:
    """(B, d) float32, the mean of ``values`` (B, T, d) over the tokens that ``mask`` marks; None = all."""
    if values.shape[1] > _PIECE:
        total, tokens = _summed(values, mask)
        return total / tokens.clamp(min=1.0)
    values = values.float()
    if mask is None:
        return values.mean(dim=1)
    weights = mask.to(values)[..., None]
    mean: Tensor = (values * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
    return mean
