"""Hidden states of a decoder as they are computed, and the distance between those of two learners."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from clkit.errors import CapabilityError
from clkit.models.lora import base_model

Show = Callable[[int, Tensor], None]
"""Gets the index of a hidden state and its value (B, T, d)."""


class SquaredGap(torch.autograd.Function):
    """Sum of (fast - slow)^2, or one-sided of max(slow - fast, 0)^2; no gradient for ``slow``.

    Equal to the expression in plain autograd. Only the difference is kept for the backward pass, in the type of the
    hidden states, while the sum is taken in float32 (float64 for float64): half of what autograd keeps in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, fast: Tensor, slow: Tensor, one_sided: bool) -> Tensor:
        """Both (N, d); returns a scalar."""
        gap = fast - slow
        if one_sided:
            gap.clamp_(max=0)
        ctx.save_for_backward(gap)
        return gap.to(torch.promote_types(gap.dtype, torch.float32)).square().sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """2 (fast - slow), where it counts."""
        (gap,) = ctx.saved_tensors
        return gap * (2 * grads[0]), None, None


def squared_gap(fast: Tensor, slow: Tensor, one_sided: bool) -> Tensor:
    """See :class:`SquaredGap`."""
    result: Tensor = SquaredGap.apply(fast, slow, one_sided)
    return result


def find_decoder(module: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The part of a causal language model below its output layer, and the list of its blocks.

    Raises:
        CapabilityError: the model has no such list.
    """
    model: Any = base_model(module)
    decoder = model.get_decoder()
    count = getattr(decoder.config, "num_hidden_layers", None)
    for part in decoder.modules():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return decoder, part
    raise CapabilityError(
        f"I-LoRA compares hidden states, and {type(model).__name__} has no list of its {count} decoder layers. "
        "Take a decoder-only language model, or set strategy.gamma=0 (replay with an averaged adapter)."
    )


class _Tap(nn.Module):
    """Stands for a block and shows what it returns.

    A forward hook on the block would do, but some versions of transformers run it inside gradient checkpointing, where
    it would be repeated in the backward pass.
    """

    def __init__(self, block: nn.Module, show: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.block = block
        self.show = show

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.block(*args, **kwargs)
        self.show(out[0] if isinstance(out, tuple) else out)
        return out

    def __getattr__(self, name: str) -> Any:
        block = super().__getattr__("block")
        return block if name == "block" else getattr(block, name)


@contextlib.contextmanager
def showing(decoder: nn.Module, blocks: nn.ModuleList, wanted: Collection[int], show: Show) -> Iterator[None]:
    """Within the context each forward pass of ``decoder`` shows its hidden states as they come; none is kept.

    Args:
        decoder: from :func:`find_decoder`.
        blocks: the same.
        wanted: indices as in transformers: k is the output of block k (from 1), the last one after the final norm.
        show: gets index and value.
    """
    last = len(blocks)
    own = list(blocks)
    hook = decoder.register_forward_hook(lambda module, args, out: show(last, out[0])) if last in wanted else None
    try:
        for k in wanted:
            if k < last:
                blocks[k - 1] = _Tap(own[k - 1], lambda value, k=k: show(k, value))  # type: ignore[misc]
        yield
    finally:
        for i, block in enumerate(own):
            blocks[i] = block
        if hook is not None:
            hook.remove()
