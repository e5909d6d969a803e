"""Classifiers that grow: the deep part of the network copied once per task, and a head that gains rows and columns.

A backbone that can be cut (``Backbone.parts``) becomes one shared part and a list of blocks side by side, each a copy
of everything behind the cut. What such a network looks like is a few numbers (``structure_of``): with them a fresh
network is brought into the same shape before tensors are loaded into it (``restructure``), on resume as from an export.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from clkit.errors import ModelError, did_you_mean
from clkit.models.backbones.base import Backbone, Chain
from clkit.models.classifier import ClassifierNet
from clkit.models.heads import GrowingHead, NearestMeanHead


class Expandable(Backbone):
    """A shared part and blocks on top of it; the features of all blocks stand side by side, the oldest first.

    Args:
        backbone: gives its parts away; not to be used any more.
        cut: the name of the first part that is copied.

    Attributes:
        general: the shared part.
        blocks: the copied parts.
        width: features of one block.
        foldable: see ``Backbone.norm_follows_conv``.
        frozen_general: the shared part is not trained.

    Raises:
        ModelError: the backbone can't be cut, or has no such part.
    """

    def __init__(self, backbone: Backbone, cut: str) -> None:
        super().__init__()
        parts = backbone.parts()
        kind = type(backbone).__name__
        if not parts:
            raise ModelError(
                f"{kind} can't be cut into a shared part and blocks: it names no parts (Backbone.parts). Take a "
                "cifar-resnet, resnet-18, efficientnet-lite0, mlp, or an encoder built like BERT or ViT."
            )
        names = [name for name, part in parts.items() if any(True for _ in part.parameters())]
        if cut not in names:
            near = did_you_mean(cut, names)
            raise ModelError(f"{kind} has no part '{cut}' to be cut at.{near} It has {', '.join(names)}.")
        at = list(parts).index(cut)
        items = list(parts.items())
        self.cut = cut
        self.normalise = backbone.normalise
        self.width = self.out_features = backbone.out_features
        self.config = getattr(backbone, "config", None)  # of a text encoder
        self.foldable = backbone.norm_follows_conv
        self.general = Chain(dict(items[:at]))
        self.blocks = nn.ModuleList([Chain(dict(items[at:]))])
        self.frozen_general, self._frozen_blocks = False, 0
        self.to(memory_format=torch.channels_last)

    def grow(self) -> None:
        """Append a copy of the newest block, statistics included."""
        block = copy.deepcopy(self.blocks[-1])
        block.requires_grad_(True)
        self.blocks.append(block)
        self.out_features = self.width * len(self.blocks)

    def freeze(self, general: bool, blocks: int) -> None:
        """Keep the ``blocks`` oldest blocks and, with ``general``, the shared part as they are, in evaluation mode."""
        self.frozen_general, self._frozen_blocks = general, blocks
        self.general.requires_grad_(not general)
        for i, block in enumerate(self.blocks):
            block.requires_grad_(i >= blocks)
        self.train(self.training)

    def train(self, mode: bool = True) -> Expandable:
        """Set the mode of everything that is trained."""
        super().train(mode)
        if self.frozen_general:
            self.general.eval()
        for block in self.blocks[: self._frozen_blocks]:
            block.eval()
        return self

    def maps(self, *inputs: Tensor, **named: Tensor) -> Any:
        """The shared part's output; images are put into the layout that convolutions are fast in."""
        return self.general(*(channels_last(x) for x in inputs), **named)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Features (B, width * blocks)."""
        maps = self.maps(*inputs, **named)
        return torch.cat([block(maps) for block in self.blocks], dim=1)


def channels_last(x: Tensor) -> Tensor:
    """Images in the memory layout that convolutions are fast in; anything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def expand(net: ClassifierNet, cut: str) -> Expandable:
    """Put an expandable backbone into a classifier in the place of its own; returns it.

    Raises:
        ModelError: the backbone can't be cut, or not there.
    """
    device = net.scale.device
    grown = Expandable(net.backbone, cut).to(device)
    net.backbone = grown
    return grown


def grow_head(net: ClassifierNet) -> GrowingHead:
    """Give a classifier a head without classes in the place of its own; returns it."""
    head = GrowingHead(num_classes_of(net), net.backbone.out_features).to(net.scale.device)
    net.head = head
    return head


def num_classes_of(net: ClassifierNet) -> int:
    """Size of the label space."""
    return int(net.head.out_features)


def structure_of(net: ClassifierNet) -> dict[str, Any] | None:
    """What ``restructure`` needs, as JSON; None for a classifier that never grew."""
    backbone, head = net.backbone, net.head
    found: dict[str, Any] = {}
    if isinstance(backbone, Expandable):
        found |= {"cut": backbone.cut, "blocks": len(backbone.blocks)}
    if isinstance(head, GrowingHead):
        found["classes"] = head.classes.tolist()
    elif isinstance(head, NearestMeanHead):
        found["nearest_mean"] = True
    return found or None


def restructure(net: ClassifierNet, structure: Mapping[str, Any]) -> None:
    """Bring a classifier as it was built into a structure; the values of what is new are meaningless.

    Raises:
        ModelError: the backbone has no such part.
    """
    if "cut" in structure:
        backbone = net.backbone if isinstance(net.backbone, Expandable) else expand(net, structure["cut"])
        while len(backbone.blocks) < structure["blocks"]:
            backbone.grow()
    device = net.scale.device
    if "classes" in structure:
        grow_head(net).resize(cast(Sequence[int], structure["classes"]), net.backbone.out_features)
    elif structure.get("nearest_mean"):
        net.head = NearestMeanHead(num_classes_of(net), net.backbone.out_features).to(device)
