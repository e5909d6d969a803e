"""Which tokens of a forward pass are the prompt, for methods that look at the prompt alone (WISE, GRACE)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor

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
