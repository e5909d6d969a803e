"""Which memory answers a sequence: decided once, on the tokens of its prompt, and kept while the answer is written."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clkit.errors import RequestError, did_you_mean
from clkit.models.routing import marked_prompt

if TYPE_CHECKING:
    from clkit.strategies.wise.side_memory import SideMemory

Activation = Callable[[Tensor], Tensor]

# What transformers calls the key-value cache: 5.23 renamed it.
_CACHES = ("cache", "past_key_values")
# Above this length the published code takes the maximum over positions, not the mean.
_PUBLISHED_LONG = 100
_KEPT = "_wise_choice"  # attribute of a key-value cache: the decision for the sequences in it


@dataclass(frozen=True)
class Decision:
    """How one sequence was routed.

    Attributes:
        memory: name of the memory that answers; None = the model itself.
        scores: per memory, how much it would change the projection's output at the prompt's last token.
        thresholds: per memory, what the score has to exceed.
    """

    memory: str | None
    scores: dict[str, float]
    thresholds: dict[str, float]


def change_sizes(change: Tensor, base: Tensor, activation: Activation | None = None) -> Tensor:
    """(B, P) how much a memory changes each token's output: the norm of x dW (WISE, eq. 3).

    Args:
        change: (B, P, out), x dW.
        base: (B, P, out), what the projection gives without it.
        activation: the published code takes the norm of ``activation(base + change) - activation(base)``.
    """
    if activation is not None:
        change = activation(base.float() + change) - activation(base.float())
    sizes: Tensor = change.norm(dim=-1)
    return sizes


class Router:
    """Scores memories on the last token of a prompt and keeps the decision for the whole sequence.

    What the prompt is: the tokens marked by :func:`clkit.models.routing.marking_prompt`; else within ``generate`` its
    input; else all tokens of the first forward pass of a sequence, as its attention mask shows them. A pass that
    continues a key-value cache, or comes later in the same call of ``generate``, keeps the decision.

    Args:
        slack: a score must exceed threshold * slack.
        activation: see :func:`change_sizes`.
        compat: the published statistic: the mean over all positions, padding too, and the maximum of more than 100.

    Attributes:
        last: the decisions of the newest scoring, one per sequence.
        off: True while the memories are switched off.
    """

    def __init__(self, slack: float, activation: Activation | None = None, compat: bool = False) -> None:
        self.slack = slack
        self.activation = activation
        self.compat = compat
        self.last: list[Decision] = []
        self.off = False
        self._forced: tuple[str | None] | None = None
        self._local = threading.local()
        self._undo: list[Any] = []

    # --- installing -------------------------------------------------------------------------------------------------
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

    def forget(self) -> None:
        """The memories changed: indices of earlier decisions mean nothing any more."""
        self.last = []

    @contextlib.contextmanager
    def forced(self, memory: str | None) -> Iterator[None]:
        """Within, every sequence is answered by ``memory`` (None = the model itself)."""
        before, self._forced = self._forced, (memory,)
        try:
            yield
        finally:
            self._forced = before

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """Within, nothing is scored and nothing is added."""
        before, self.off = self.off, True
        try:
            yield
        finally:
            self.off = before

    # --- where a forward pass stands --------------------------------------------------------------------------------
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
        given = self._signature.bind_partial(module, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        length = cache.get_seq_length() if cache is not None and hasattr(cache, "get_seq_length") else 0
        generation = getattr(self._local, "generation", None)
        kept = None
        if generation is not None and generation.choice is not None:
            kept = generation.choice
        elif int(length) > 0:
            kept = getattr(cache, _KEPT, None)
        self._local.call = _Call(kept, given.get("attention_mask"), cache)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call, self._local.call = getattr(self._local, "call", None), None
        if call is None or call.choice is None:
            return
        generation = getattr(self._local, "generation", None)
        if generation is not None:
            generation.choice = call.choice
        made = next((output[name] for name in _CACHES if isinstance(output, dict) and name in output), None)
        for cache in (call.cache, made):
            if hasattr(cache, "get_seq_length"):
                setattr(cache, _KEPT, call.choice)

    # --- deciding ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def route(self, x: Tensor, base: Tensor, memories: Sequence[SideMemory]) -> list[int]:
        """The index of the memory that answers each sequence, -1 for none; decides if that is not done yet.

        Args:
            x: (B, T, in) what the projection reads.
            base: (B, T, out) what it gives.
            memories: to choose from.
        """
        call = getattr(self._local, "call", None) or _Call(None, None, None)
        if self._forced is not None:
            return [self._index(self._forced[0], memories)] * len(x)
        if call.choice is None or len(call.choice) != len(x):
            mask = self._prompt_mask(call.mask, x)
            read, output = self.read(x, mask), self.read(base, mask)
            sizes = [change_sizes(memory(read), output, self.activation) for memory in memories]
            scores = torch.stack([self.statistic(size) for size in sizes]).T
            limits = [m.threshold * self.slack for m in memories]
            call.choice = choose(scores, limits)
            names = [m.name for m in memories]
            self.last = [
                Decision(
                    None if k < 0 else names[k],
                    dict(zip(names, row, strict=True)),
                    dict(zip(names, limits, strict=True)),
                )
                for k, row in zip(call.choice, scores.tolist(), strict=True)
            ]
        return list(call.choice)

    def read(self, values: Tensor, mask: Tensor | None) -> Tensor:
        """(B, P, d) the positions of ``values`` (B, T, d) that are scored: the last one of the prompt.

        Measured (README.md, "The statistic"): there an edit's paraphrases and other prompts are furthest apart. The
        published code scores all positions.
        """
        if self.compat:
            return values
        if mask is None:
            return values[:, -1:]
        places = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask.bool(), places, 0).amax(dim=1)
        return values[torch.arange(len(values), device=values.device), last][:, None]

    def statistic(self, sizes: Tensor) -> Tensor:
        """(B,) one score per sequence from the sizes (B, P) of the changes at the positions that are read."""
        return sizes.amax(dim=1) if self.compat and sizes.shape[1] > _PUBLISHED_LONG else sizes.mean(dim=1)

    def _prompt_mask(self, mask: Any, x: Tensor) -> Tensor | None:
        marked = marked_prompt()
        if marked is not None and marked.shape == x.shape[:2]:
            return marked.to(x.device)
        if not isinstance(mask, Tensor):
            return None
        if mask.dim() == 4:  # additive or bool; what the last token sees
            row = mask[:, 0, -1, -x.shape[1] :]
            return row if row.dtype == torch.bool else row >= 0
        return mask[:, -x.shape[1] :].bool()

    @staticmethod
    def _index(name: str | None, memories: Sequence[SideMemory]) -> int:
        if name is None:
            return -1
        names = [m.name for m in memories]
        if name not in names:
            raise RequestError(
                f"There is no memory '{name}'.{did_you_mean(name, names)} There are: {', '.join(names)}."
            )
        return names.index(name)


def choose(scores: Tensor, limits: Sequence[float]) -> list[int]:
    """Per row of ``scores`` (B, N) the largest score among those above their own limit; -1 where none is.

    >>> choose(torch.tensor([[3.0, 2.0], [0.5, 2.0], [0.5, 0.1]]), [4.0, 1.0])
    [1, 1, -1]
    """
    passed = torch.where(scores > torch.tensor(list(limits), device=scores.device), scores, -torch.inf)
    best, which = passed.max(dim=1)
    return torch.where(best > -torch.inf, which, -1).tolist()


@dataclass
class _Call:
    """One forward pass of the decoder."""

    choice: list[int] | None
    mask: Any
    cache: Any


@dataclass
class _Generation:
    """One call of ``generate``."""

    choice: list[int] | None = None
