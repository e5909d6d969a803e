"""Which memory answers a sequence: decided once, on the tokens of its prompt, and kept while the answer is written."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from clkit.errors import RequestError, did_you_mean
from clkit.models.routing import PromptRouter, at_last_token
from clkit.strategies.wise.likeness import readings_of

if TYPE_CHECKING:
    from clkit.strategies.wise.likeness import Gate
    from clkit.strategies.wise.side_memory import SideMemory

Activation = Callable[[Tensor], Tensor]

# Above this length the published code takes the maximum over positions, not the mean.
_PUBLISHED_LONG = 100
# Likeness to the same prompt in two memories differs by rounding only.
_EQUAL = 1e-5


@dataclass(frozen=True)
class Decision:
    """How one sequence was routed.

    Attributes:
        memory: name of the memory that answers; None = the model itself.
        scores: per memory, how much it would change the projection's output at the prompt's last token.
        thresholds: per memory, what the score has to exceed.
        likeness: per memory, how alike the prompt is to the nearest of its edits; empty without a gate.
    """

    memory: str | None
    scores: dict[str, float]
    thresholds: dict[str, float]
    likeness: dict[str, float]


class Answer(NamedTuple):
    """Who answers a sequence.

    Attributes:
        memory: its index, -1 = the model itself.
        start: the first token of this pass that it changes.
    """

    memory: int
    start: int


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


class Router(PromptRouter):
    """Scores memories on the last token of a prompt and keeps the decision for the whole sequence.

    Args:
        slack: a score must exceed threshold * slack.
        activation: see :func:`change_sizes`.
        compat: the published statistic: the mean over all positions, padding too, and the maximum of more than 100.
        answer_only: a memory changes what stands from the prompt's last token on; else the whole sequence.
        always: thresholds do not count: the memory with the largest score answers, whatever it is.
        gate: when given, the prompt must also look like one of the memory's edits, and of several memories that with
            the most alike edit answers.

    Attributes:
        last: the decisions of the newest scoring, one per sequence.
    """

    def __init__(
        self,
        slack: float,
        activation: Activation | None = None,
        compat: bool = False,
        always: bool = False,
        answer_only: bool = True,
        gate: Gate | None = None,
    ) -> None:
        super().__init__()
        self.slack = slack
        self.gate = gate
        self.activation = activation
        self.compat = compat
        self.always = always
        self.answer_only = answer_only
        self.last: list[Decision] = []
        self._forced: tuple[str | None] | None = None

    def forget(self) -> None:
        """The memories changed: scores of earlier decisions mean nothing any more."""
        self.last = []

    @contextlib.contextmanager
    def forced(self, memory: str | None) -> Iterator[None]:
        """Within, every sequence is answered by ``memory`` (None = the model itself)."""
        before, self._forced = self._forced, (memory,)
        try:
            yield
        finally:
            self._forced = before

    # --- deciding ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def route(self, x: Tensor, base: Tensor, memories: Sequence[SideMemory]) -> list[Answer]:
        """Who answers each sequence, and from which token of this pass on; decides if that is not done yet.

        Args:
            x: (B, T, in) what the projection reads.
            base: (B, T, out) what it gives.
            memories: to choose from.
        """
        names = [m.name for m in memories]

        def decide(mask: Tensor | None) -> list[int]:
            read, output = self.read(x, mask), self.read(base, mask)
            sizes = [change_sizes(memory(read), output, self.activation) for memory in memories]
            scores = torch.stack([self.statistic(size) for size in sizes]).T
            limits = [-math.inf if self.always else m.threshold * self.slack for m in memories]
            alike, fit, rank = None, scores, scores
            if self.gate is not None:
                alike = rank = self.gate(readings_of(x, mask, self.mean(x, mask)), [m.edits for m in memories])
                fit = scores.where(alike >= self.gate.limit, -math.inf)
            chosen = choose(fit, limits, rank)
            near = [{} for _ in x] if alike is None else [dict(zip(names, row, strict=True)) for row in alike.tolist()]
            self.last = [
                Decision(
                    None if k < 0 else names[k],
                    dict(zip(names, row, strict=True)),
                    dict(zip(names, limits, strict=True)),
                    own,
                )
                for k, row, own in zip(chosen, scores.tolist(), near, strict=True)
            ]
            return chosen

        decided = self.decided(x, decide, names)
        if self.gate is not None:
            self.carry(x)
        forced = None if self._forced is None else self._index(self._forced[0], memories)
        return [Answer(k if forced is None else forced, start if self.answer_only else 0) for k, start in decided]

    def read(self, values: Tensor, mask: Tensor | None) -> Tensor:
        """(B, P, d) the positions of ``values`` (B, T, d) that are scored: the last one of the prompt.

        Measured (README.md, "The statistic"): there an edit's paraphrases and other prompts are furthest apart. The
        published code scores all positions.
        """
        if self.compat:
            return values
        return at_last_token(values, mask)

    def statistic(self, sizes: Tensor) -> Tensor:
        """(B,) one score per sequence from the sizes (B, P) of the changes at the positions that are read."""
        return sizes.amax(dim=1) if self.compat and sizes.shape[1] > _PUBLISHED_LONG else sizes.mean(dim=1)

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


def choose(scores: Tensor, limits: Sequence[float], rank: Tensor | None = None) -> list[int]:
    """Per row of ``scores`` (B, N) the best among those above their own limit; -1 where none is.

    The best is the largest ``rank`` (B, N), of equal ones the newest (two memories may hold answers to one prompt);
    without it the largest score, as published.

    >>> choose(torch.tensor([[3.0, 2.0], [0.5, 2.0], [0.5, 0.1]]), [4.0, 1.0])
    [1, 1, -1]
    >>> choose(torch.tensor([[3.0, 2.0], [3.0, 2.0]]), [1.0, 1.0], torch.tensor([[0.6, 0.9], [0.9, 0.9]]))
    [1, 1]
    """
    passing = scores > torch.tensor(list(limits), dtype=scores.dtype, device=scores.device)
    fit = (scores if rank is None else rank).masked_fill(~passing, -torch.inf)
    best, which = fit.max(dim=1)
    if rank is not None:
        which = fit.shape[1] - 1 - (fit.flip(1) >= best[:, None] - _EQUAL).int().argmax(dim=1)
    return torch.where(best > -torch.inf, which, -1).tolist()
