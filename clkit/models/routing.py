"""Which tokens of a forward pass are the prompt, and decisions made on them once for a whole sequence."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# What transformers calls the key-value cache: 5.23 renamed it.
CACHES = ("cache", "past_key_values")

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


def marked_prompt() -> Tensor | None:
    """The mask of the innermost :func:`marking_prompt`, or None."""
    return _PROMPT.get()


@dataclass
class Pass:
    """One forward pass of the decoder.

    Attributes:
        choice: what was decided for each of its sequences; None = not yet.
        mask: its attention mask, as given.
        cache: the key-value cache that it continues.
        past: how many tokens are in that cache.
    """

    choice: list[Any] | None = None
    mask: Any = None
    cache: Any = None
    past: int = 0


@dataclass
class _Generation:
    """One call of ``generate``."""

    choice: list[Any] | None = None


class PromptRouter:
    """Keeps what is decided on a sequence's prompt for the whole sequence; the base of methods that route.

    What the prompt is: the tokens marked by :func:`marking_prompt`; else within ``generate`` its input; else all tokens
    of the first forward pass of a sequence, as its attention mask shows them. A pass that continues a key-value cache,
    or comes later in the same call of ``generate``, keeps the decision.

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
        before = decoder.register_forward_pre_hook(self._before, with_kwargs=True)
        after = decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True)
        self._undo = [before.remove, after.remove]
        if callable(getattr(lm, "generate", None)):
            own, plain = lm.__dict__.get("generate"), lm.generate
            lm.generate = self._generating(plain)

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

    def decided(self, x: Tensor, decide: Callable[[Tensor | None], Sequence[Any]]) -> list[tuple[Any, int]]:
        """What holds for each sequence of this pass, and from which of its tokens on: the prompt's last one.

        Args:
            x: (B, T, ...), what a layer reads.
            decide: gives one choice per sequence from the mask of :meth:`prompt_mask`; called where nothing was decided
                yet.
        """
        call = self.current()
        if call.choice is None or len(call.choice) != len(x):
            mask = self.prompt_mask(call, x)
            ends = last_token(mask, x.shape[1], len(x)) + call.past
            call.choice = list(zip(decide(mask), ends.tolist(), strict=True))
        return [(choice, max(end - call.past, 0)) for choice, end in call.choice]

    def prompt_mask(self, call: Pass, x: Tensor) -> Tensor | None:
        """(B, T) bool, the tokens of ``x`` (B, T, ...) that belong to the prompt; None = all of them."""
        marked, mask = marked_prompt(), call.mask
        if marked is not None and marked.shape == x.shape[:2]:
            return marked.to(x.device)
        if not isinstance(mask, Tensor):
            return None
        if mask.dim() == 4:  # additive or bool; what the last token sees
            row = mask[:, 0, -1, -x.shape[1] :]
            return row if row.dtype == torch.bool else row >= 0
        return mask[:, -x.shape[1] :].bool()

    def _generating(self, plain: Any) -> Any:
        def generate(*args: Any, **kwargs: Any) -> Any:
            outer = getattr(self._local, "generation", None)
            self._local.generation = _Generation()
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
        generation = getattr(self._local, "generation", None)
        kept = None
        if generation is not None and generation.choice is not None:
            kept = generation.choice
        elif int(length) > 0:
            kept = getattr(cache, self._kept, None)
        self._local.call = Pass(kept, given.get("attention_mask"), cache, int(length))

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.off:
            return
        call, self._local.call = getattr(self._local, "call", None), None
        if call is None or call.choice is None:
            return
        generation = getattr(self._local, "generation", None)
        if generation is not None:
            generation.choice = call.choice
        made = cache_of(output)[1] if isinstance(output, dict) else None
        for cache in (call.cache, made):
            if hasattr(cache, "get_seq_length"):
                setattr(cache, self._kept, call.choice)


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
    values = values.float()
    if mask is None:
        return values.mean(dim=1)
    weights = mask.to(values)[..., None]
    mean: Tensor = (values * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
    return mean
