"""Classification heads for label spaces that are not all there at the start."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.memory.herding import unit


def spread(rows: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Scores (B, R) of ``classes`` (R,) as scores (B, num_classes); a class without a row gets the lowest number."""
    scores = rows.new_full((len(rows), num_classes), torch.finfo(rows.dtype).min)
    return scores.index_copy(1, classes, rows)


@torch.no_grad()
def fill_linear(layer: nn.Linear | GrowingHead, generator: torch.Generator) -> None:
    """Weights uniform with variance 1 / in_features, drawn on the CPU; biases zero."""
    bound = math.sqrt(3 / layer.in_features)
    layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator) * (2 * bound) - bound)
    layer.bias.zero_()


class GrowingHead(nn.Module):
    """A linear head that gets rows for new classes and columns for new features; row order is order of arrival.

    Attributes:
        weight: (R, D).
        bias: (R,).
        classes: (R,) the class of each row.
        out_features: size of the label space; logits of classes without a row are the lowest number.
    """

    classes: Tensor

    def __init__(self, num_classes: int, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = num_classes, in_features
        self.weight = nn.Parameter(torch.empty(0, in_features))
        self.bias = nn.Parameter(torch.empty(0))
        self.register_buffer("classes", torch.empty(0, dtype=torch.long))

    def resize(self, classes: Sequence[int], in_features: int) -> None:
        """Rows for ``classes`` and ``in_features`` columns, all zero."""
        self.in_features = in_features
        self.weight = nn.Parameter(self.weight.new_zeros(len(classes), in_features))
        self.bias = nn.Parameter(self.bias.new_zeros(len(classes)))
        self.classes = self.classes.new_tensor(list(classes))

    def grow(
        self, new: Sequence[int], in_features: int, generator: torch.Generator, zero_columns: bool = False
    ) -> None:
        """Add rows for the classes ``new``, and columns on the right up to ``in_features``; what is there is kept.

        Args:
            new: classes without a row.
            in_features: columns from now on, at least as many as there are.
            generator: a CPU generator; draws new rows and new columns, uniform with variance 1 / in_features. New
                biases are zero.
            zero_columns: old classes start with zeros for the new features, so that their logits stay as they are.
        """
        weight, bias = self.weight.detach(), self.bias.detach()
        rows, columns = weight.shape
        self.resize([*self.classes.tolist(), *new], in_features)
        fill_linear(self, generator)
        with torch.no_grad():
            if zero_columns:
                self.weight[:rows].zero_()
            self.weight[:rows, :columns] = weight
            self.bias[:rows] = bias

    def rows_of(self, labels: Tensor) -> Tensor:
        """The row of each class (B,)."""
        lookup = self.classes.new_zeros(self.out_features)
        lookup[self.classes] = torch.arange(len(self.classes), device=self.classes.device)
        return lookup[labels]

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) to logits (B, num_classes)."""
        return spread(F.linear(features, self.weight, self.bias), self.classes, self.out_features)


def align_new_rows(head: GrowingHead, new: int) -> float:
    """Scale the ``new`` last rows so that their mean norm is that of the others; returns the factor.

    Weight alignment (Zhao et al. 2020): biases stay as they are.
    """
    with torch.no_grad():
        norms = head.weight.norm(dim=1)
        factor = norms[:-new].mean() / norms[-new:].mean()
        head.weight[-new:] *= factor
    return float(factor)


class NearestMeanHead(nn.Module):
    """The class whose mean is nearest to the feature vector scaled to length one.

    Attributes:
        means: (num_classes, D) float32.
        known: (num_classes,) bool; logits of other classes are the lowest number.
    """

    means: Tensor
    known: Tensor

    def __init__(self, num_classes: int, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = num_classes, in_features
        self.register_buffer("means", torch.zeros(num_classes, in_features))
        self.register_buffer("known", torch.zeros(num_classes, dtype=torch.bool))

    def set(self, label: int, mean: Tensor) -> None:
        """The mean of a class."""
        self.means[label] = mean.to(self.means)
        self.known[label] = True

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) to minus the squared distance to each mean (B, num_classes)."""
        rows = unit(features)
        gaps = -torch.cdist(rows, self.means.to(rows.dtype), compute_mode="donot_use_mm_for_euclid_dist").square()
        return gaps.to(features.dtype).masked_fill(~self.known, torch.finfo(features.dtype).min)
