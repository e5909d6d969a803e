"""Frozen blocks made faster: batch norm folded into the convolution before it."""

from __future__ import annotations

import copy
from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def folded(block: nn.Module, foldable: bool) -> nn.Module:
    """What computes the same as a frozen block: a copy with folded batch norm, or the block where that is not sound.

    Args:
        block: in evaluation mode, and staying so.
        foldable: see ``Backbone.norm_follows_conv``.
    """
    if not foldable:
        return block
    block = copy.deepcopy(block).requires_grad_(False).eval()
    for module in list(block.modules()):
        for (name, conv), (after, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, after, nn.Identity())
    return block
