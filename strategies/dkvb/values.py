"""Reading values: the sum over the pairs that an example selected, with its gradient in closed form."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BagSum(torch.autograd.Function):
    """``out_b = scale_b * sum of values[slots of bag b]``.

    The gradient of a row is the sum over the bags that hold it, ``sum_b scale_b * g_b``: one ``index_add_``, where
    autograd of the lookup takes ten times as long. Nothing but slots and scales is kept for it.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, slots: Tensor, offsets: Tensor, scale: Tensor) -> Tensor:
        """``values`` (R, v), ``slots`` (M,), ``offsets`` (G,) start of each bag, ``scale`` (G,); returns (G, v)."""
        ctx.save_for_backward(slots, offsets, scale)
        ctx.rows = len(values)
        return F.embedding_bag(slots, values, offsets, mode="sum") * scale.unsqueeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Only rows that were read have a gradient."""
        slots, offsets, scale = ctx.saved_tensors
        ends = torch.cat([offsets[1:], offsets.new_tensor([len(slots)])])
        each = (grads[0] * scale.unsqueeze(1)).repeat_interleave(ends - offsets, dim=0, output_size=len(slots))
        return each.new_zeros(ctx.rows, each.shape[1]).index_add_(0, slots, each), None, None, None


def bag_sum(values: Tensor, slots: Tensor, offsets: Tensor, scale: Tensor) -> Tensor:
    """See :class:`BagSum`."""
    result: Tensor = BagSum.apply(values, slots, offsets, scale)
    return result


def make_decoder(kind: str, inputs: int, hidden: int, classes: int, generator: torch.Generator) -> nn.Sequential:
    """The network behind the values: ``linear`` (one layer) or ``mlp`` (Linear, ReLU, Linear).

    Weights and biases are uniform in +-1/sqrt(inputs), torch's default for a linear layer. The last layer's are drawn
    class by class, so that a decoder for more classes begins with the same weights.
    """
    layers: list[nn.Module] = []
    width = inputs
    if kind == "mlp":
        first = _empty(inputs, hidden)
        _uniform(first.weight, inputs, generator)
        _uniform(first.bias, inputs, generator)
        layers, width = [first, nn.ReLU()], hidden
    layers.append(_rows(width, classes, generator))
    return nn.Sequential(*layers)


def widen(decoder: nn.Sequential, wider: nn.Sequential) -> None:
    """Take the last layer's further rows from a decoder for more classes; the rows that are there stay."""
    old, new = decoder[-1], wider[-1]
    with torch.no_grad():
        for name, value in old.named_parameters():
            target = new.get_parameter(name)
            target[: len(value)] = value.to(target.device)
    decoder[-1] = new.to(next(old.parameters()).device).requires_grad_(next(old.parameters()).requires_grad)


def _rows(inputs: int, classes: int, generator: torch.Generator) -> nn.Linear:
    layer = _empty(inputs, classes)
    for weight, bias in zip(layer.weight.data, layer.bias.data, strict=True):
        _uniform(weight, inputs, generator)
        _uniform(bias, inputs, generator)
    return layer


def _empty(inputs: int, outputs: int) -> nn.Linear:
    with torch.device("meta"):  # drawn from our own generator afterwards
        layer = nn.Linear(inputs, outputs)
    return layer.to_empty(device="cpu")


def _uniform(tensor: Tensor, inputs: int, generator: torch.Generator) -> None:
    bound = inputs**-0.5
    tensor.data.uniform_(-bound, bound, generator=generator)
