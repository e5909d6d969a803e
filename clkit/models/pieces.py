"""The output layer of a language model a few positions at a time: its loss without all logits in memory at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.models.lora import base_model
from clkit.modes import evaluating

PIECES = 4
"""Into how many parts the positions are cut: the logits and their gradient take a quarter of the memory."""


class _Summed(torch.autograd.Function):
    """Sum of the cross entropies of all rows. The gradient for the states is computed at once, piece by piece."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        """States (N, d) and targets (N,), -100 = none; returns a float32 scalar."""
        gradient = torch.empty_like(states)
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        for part, wanted, place in zip(
            states.chunk(PIECES), targets.chunk(PIECES), gradient.chunk(PIECES), strict=True
        ):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                loss = F.cross_entropy(head(leaf).float(), wanted, ignore_index=-100, reduction="sum")
            place.copy_(torch.autograd.grad(loss, leaf)[0])
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Scale what is there."""
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


def summed_cross_entropy(head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor) -> Tensor:
    """The sum over rows of -log softmax(head(states))[targets]; equal to plain autograd but for the order of sums.

    Args:
        head: the output layer; nothing in it is trained, for it gets no gradient.
        states: (N, d) its inputs.
        targets: (N,) tokens; -100 where there is none.
    """
    total: Tensor = _Summed.apply(states, targets, head)
    return total


class OutputLayer:
    """The output layer of a language model, apart from what lies below it.

    Args:
        model: the transformers model.
        head: its output layer.
    """

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        self._model = model
        self.head = head

    @classmethod
    def of(cls, module: nn.Module) -> OutputLayer | None:
        """That of a model, peft's wrapper or not; None where the loss can't be taken in pieces.

        It can't where the layer itself is trained, or where the model does more to the logits than this layer (a cap,
        a scale): with another layer in its place the model must return what that one gives. Nor where ZeRO-3 splits the
        layer over processes: each use gathers it, and processes with fewer positions would have fewer pieces.
        """
        model: Any = base_model(module)
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module) or any(p.requires_grad or hasattr(p, "ds_id") for p in head.parameters()):
            return None
        found = cls(model, head)
        ids = torch.zeros((1, 2), dtype=torch.long, device=next(model.parameters()).device)
        known = _Known(head)
        with torch.no_grad(), evaluating(model), found._replaced(known):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return found if torch.equal(logits, known(logits)) else None

    def apart(self) -> AbstractContextManager[None]:
        """Within the context the model returns, as its logits, what would have gone into the output layer."""
        return self._replaced(_Open(self.head))

    @contextlib.contextmanager
    def _replaced(self, other: nn.Module) -> Iterator[None]:
        name = next(n for n, m in self._model.named_modules() if m is self.head)
        self._model.set_submodule(name, other)
        try:
            yield
        finally:
            self._model.set_submodule(name, self.head)


class _Open(nn.Module):
    """Stands for the output layer and lets through what goes in; Mamba asks the layer for the type of its weight."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, states: Tensor) -> Tensor:
        """The states themselves."""
        return states

    def __getattr__(self, name: str) -> Any:
        head = super().__getattr__("head")
        return head if name == "head" else getattr(head, name)


class _Known(_Open):
    """An output layer whose logits run from -500 to 500, whatever goes in."""

    def forward(self, states: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return torch.linspace(-500, 500, states.shape[-1]).to(states).expand_as(states)
