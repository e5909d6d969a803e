"""Herding: exemplars whose mean follows the mean of their class (Welling 2009; Rebuffi et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clkit.memory.balanced import GroupedBuffer, shares
from clkit.memory.base import Ref

_EPSILON = 1e-8


def unit(features: Tensor) -> Tensor:
    """Rows of (N, D) scaled to length one, in float64."""
    wide = features.double()
    scaled: Tensor = wide / (wide.norm(dim=1, keepdim=True) + _EPSILON)
    return scaled


def herd(features: Tensor, count: int) -> Tensor:
    """Pick rows one by one so that the mean of the picked is always as near as possible to the mean of all.

    The k-th pick is the argmin over the rest of ``|mu - (S + v) / k|``: v a row scaled to length one, mu the mean of
    all v, S the sum of those already picked. The first n of ``count`` picks are the picks of ``herd(features, n)``.

    Args:
        features: (N, D).
        count: how many; all rows where there are fewer.

    Returns:
        LongTensor (min(count, N),) of row indices in the order of picking.
    """
    rows = unit(features)
    lengths = rows.square().sum(dim=1)
    mean = rows.mean(dim=0)
    picked_sum = torch.zeros_like(mean)
    order: list[int] = []
    for k in range(1, min(count, len(rows)) + 1):
        # |k mu - S - v|^2 without its constant part.
        gap = lengths - 2 * (rows @ (k * mean - picked_sum))
        best = int(gap.argmin())
        order.append(best)
        picked_sum = picked_sum + rows[best]
        lengths[best] = torch.inf
    return torch.tensor(order, dtype=torch.long, device=features.device)


def class_mean(features: Tensor) -> Tensor:
    """(D,) the mean of the rows scaled to length one, itself scaled to length one; float64."""
    return F.normalize(unit(features).mean(dim=0), dim=0, eps=_EPSILON)


def group_name(task: int, label: int | None) -> str:
    """What shares one part of the buffer: a class of a task."""
    return f"task {task} class {label}"


def held_after(counts: Mapping[str, int], size: int) -> int:
    """How many records a herding buffer of ``size`` holds of groups with so many records each."""
    parts = shares(size, list(counts))
    return sum(min(count, parts[name]) for name, count in counts.items())


class HerdingBuffer(GroupedBuffer):
    """Each class of each task keeps a prefix of its herding order, in equal shares; the first classes get what is over.

    Chosen when a task has been learned, by features (:meth:`select`). The stream of records means nothing to it, so
    what it holds does not change while a task is being learned.
    """

    policy = "herding"
    by_features = True

    def select(self, refs: Sequence[Ref], features: Tensor, size: int | None = None) -> None:
        """Take the records of a task that was learned, and cut the earlier ones to their new shares.

        Args:
            refs: all records of the task.
            features: (N, D), of the network as it is now.
            size: from now on at most so many records; None = as before.
        """
        self.size = self.size if size is None else size
        rows: dict[str, list[int]] = {}
        for row, ref in enumerate(refs):
            if self._is_new(ref):
                rows.setdefault(self._group_of(ref), []).append(row)
                self.seen += 1
        new = sorted(rows, key=lambda name: (refs[rows[name][0]].task, refs[rows[name][0]].label or 0))
        parts = shares(self.size, [*self._groups, *new])
        for name, held in self._groups.items():
            del held[parts[name] :]
        for name in new:
            index = torch.tensor(rows[name], device=features.device)
            picked = herd(features.index_select(0, index), parts[name])
            self._groups[name] = [refs[rows[name][i]] for i in picked.tolist()]
        self._refs = None

    @staticmethod
    def _group_of(ref: Ref) -> str:
        return group_name(ref.task, ref.label)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; takes over the size, which may follow from a budget, stage by stage."""
        if state["policy"] == self.policy:
            self.size = state["size"]
        super().load_state_dict(state)

    def _offer(self, ref: Ref, draw: float) -> None:
        """Nothing: records are chosen when the task has been learned."""
