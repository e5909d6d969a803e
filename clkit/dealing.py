"""One batch, many forward passes: micro-batches and processes, and what share of the loss each of them has."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clkit.config import TrainConfig
from clkit.rng import Streams
from clkit.tasks.augment import augmented
from clkit.tasks.batch import Batch

if TYPE_CHECKING:
    from clkit.engine.base import Engine
    from clkit.strategy import Strategy

Share = dict[str, float]
"""What part of each loss term a piece of a batch stands for; ``*`` is for terms without units of their own."""


def dealt(
    batch: Batch, train: TrainConfig, strategy: Strategy, engine: Engine, streams: Streams
) -> list[tuple[Batch, Share]]:
    """This process's micro-batches of a batch, on the device, each with its shares (none where it is the whole batch).

    All processes get equally many. One that would have nothing to do repeats a part of the same kind with a share of 0.
    """
    rank, world = engine.group.rank, engine.group.world
    rows = engine.rows(batch, train.micro_batch)
    parts = [_part(batch, some) for some in rows]
    given: list[Share] = shares(parts, strategy, engine) if max(world, len(parts)) > 1 else [{}]
    if world == 1:
        parts = [augmented(part.to(engine.device), train.augment, streams) for part in parts]
        return list(zip(parts, given, strict=True))
    if train.augment != "none":
        # Drawn for the batch in its own order, so that the number of processes makes no difference.
        whole = augmented(batch, train.augment, streams)
        for part, some in zip(parts, rows, strict=True):
            part.inputs = {name: value[some] for name, value in whole.inputs.items()}
    pairs: list[tuple[Batch, Share]] = []
    for _, alike in itertools.groupby(zip(parts, given, strict=True), lambda pair: _kinds(pair[0])):
        pairs += alike
        part, share = pairs[-1]
        pairs += [(part, dict.fromkeys(share, 0.0))] * (-len(pairs) % world)
    return [(part.to(engine.device), share) for part, share in pairs[rank::world]]


def _kinds(part: Batch) -> set[bool]:
    """Which rows it has: new ones, rehearsed ones, or both."""
    return set() if part.replayed is None else {*part.replayed.tolist()}


def cut(count: int, replayed: Tensor | None, size: int, processes: int, *, apart: bool = True) -> list[Tensor]:
    """Which rows of a batch each part has, at most ``size`` of them (0 = no limit).

    For several processes rows are dealt out like cards, new and rehearsed ones each by themselves: parts are alike in
    size, and all have rehearsed rows if one has, so that every process runs the same passes (ZeRO-3 depends on it).
    Where that would take too large parts, because few rows are rehearsed, each kind has parts of its own, if it may.
    A batch of fewer rows of a kind than processes gives fewer parts of it than there are processes.

    Args:
        count: rows of the batch.
        replayed: (count,) bool, True for rehearsed rows; None when there are none.
        size: rows per part.
        processes: how many share the parts.
        apart: whether kinds may have parts of their own; else few rehearsed rows make few parts, of whatever size.

    Example:
        >>> [part.tolist() for part in cut(5, None, 2, 1)], [part.tolist() for part in cut(5, None, 0, 2)]
        ([[0, 1], [2, 3], [4]], [[0, 2, 4], [1, 3]])
    """
    rows = torch.arange(count)
    if processes == 1:
        return list(torch.split(rows, size or count))
    kinds = [rows] if replayed is None else [rows[~replayed], rows[replayed]]
    kinds = [kind for kind in kinds if len(kind)]
    parts = min([processes * -(-count // (processes * (size or count))), *map(len, kinds)])
    if apart and -(-count // parts) > min(size or count, -(-count // processes)):
        return [kind[part] for kind in kinds for part in cut(len(kind), None, size, processes)]
    # The second kind is dealt from the other end, so that no part has one row more of both.
    places = [[part, parts - 1 - part] for part in range(parts)]
    return [torch.cat([kind[i::parts] for kind, i in zip(kinds, place, strict=False)]) for place in places]


def split_batch(batch: Batch, size: int, processes: int = 1) -> list[Batch]:
    """The parts of a batch as :func:`cut` says."""
    return [_part(batch, rows) for rows in cut(len(batch), batch.replayed, size, processes)]


def _part(batch: Batch, rows: Tensor) -> Batch:
    """Some rows, collated on their own: less padding."""
    if len(rows) == len(batch) and bool((rows[1:] > rows[:-1]).all()):
        return batch
    part = batch.source.batch(batch.indices[rows])
    part.replayed = None if batch.replayed is None else batch.replayed[rows]
    return part


def shares(parts: list[Batch], strategy: Strategy, engine: Engine) -> list[Share]:
    """Each part's share of every loss term, so that the sum over the parts is the mean over the whole batch."""
    units = [engine.units(strategy, part) for part in parts]
    totals = {k: sum(u[k] for u in units) for k in units[0]}
    return [{k: u[k] / totals[k] if totals[k] else 0.0 for k in u} for u in units]
