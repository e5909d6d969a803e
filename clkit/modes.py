"""Compute in another way for a while: in evaluation mode, with other tensors, or as torch does by default."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """Within the context the module is in evaluation mode; afterwards every part of it is in the mode it was in."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield module
    finally:
        for m in training:
            m.training = True


@contextlib.contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Within, gradients exist and types are as given, whatever inference mode or autocast is around (a server's)."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Within the context the parameters and buffers called as in ``tensors`` have those values, without a copy.

    Do not run a backward pass of a graph that was built outside while inside, or the other way round. Buffers that the
    module updates in place (batch-norm statistics in training mode) change in ``tensors``; use evaluation mode.
    Inside a surrounding autocast either side computes with its own values.

    Raises:
        KeyError: the module has no parameter or buffer of a name.
    """
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    kept = {name: own[name].data for name in tensors}
    try:
        for name, value in tensors.items():
            own[name].data = value.to(own[name].device)
        # Autocast remembers a parameter's low-precision copy by the parameter, not by its values: without this the
        # module would go on computing with those it had before.
        torch.clear_autocast_cache()
        yield module
    finally:
        for name, value in kept.items():
            own[name].data = value
        torch.clear_autocast_cache()
