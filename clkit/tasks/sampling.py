"""Choosing some of many records: by seed, and independent of the order of the records and of other files.

A record's rank is a hash of the seed, a purpose and its id. So a smaller limit gives a subset of what a larger one
gives, and a new record displaces at most one other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

import numpy as np

from clkit.rng import derive_seed


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A random stream of its own for each purpose under one seed."""
    return np.random.default_rng(derive_seed(seed, "tasks", purpose))


def ranked(ids: Sequence[str], seed: int, purpose: str) -> list[int]:
    """Positions of ``ids`` in a pseudo-random order that depends only on the ids, the seed and the purpose."""
    keys = [hashlib.sha256(f"{seed}\n{purpose}\n{i}".encode()).digest() for i in ids]
    return sorted(range(len(ids)), key=keys.__getitem__)


def by_group(groups: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Positions of each group's members, groups in order of first appearance."""
    found: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        found.setdefault(group, []).append(position)
    return found


def limited(ids: Sequence[str], groups: Sequence[Hashable], limit: int, seed: int, purpose: str) -> list[int]:
    """At most ``limit`` positions of each group (0 = all), in the given order."""
    if limit == 0:
        return list(range(len(ids)))
    chosen: list[int] = []
    for members in by_group(groups).values():
        order = ranked([ids[i] for i in members], seed, purpose)
        chosen += [members[i] for i in order[:limit]]
    return sorted(chosen)


def held_out(
    ids: Sequence[str],
    groups: Sequence[Hashable],
    fraction: float,
    seed: int,
    contents: Sequence[Hashable] | None = None,
) -> tuple[list[int], list[int]]:
    """Split positions into (train, eval); of each group ``fraction`` is held out, rounded, at least one.

    Records of a group with equal ``contents`` stay together (unless all are equal), so that no copy of a held-out
    record is learned; then fewer may be held out, or, where all have many copies, more. A group of one record stays
    in train, so the caller must check for an empty eval part.
    """
    contents = ids if contents is None else contents
    train: list[int] = []
    out: list[int] = []
    for members in by_group(groups).values():
        same = [[members[i] for i in copies] for copies in by_group([contents[i] for i in members]).values()]
        same = same if len(same) > 1 else [[i] for i in members]
        order = [same[i] for i in ranked([min(ids[i] for i in copies) for copies in same], seed, "eval")]
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        chosen: list[int] = []
        for copies in order:
            if len(chosen) + len(copies) <= count:
                chosen += copies
        if not chosen and len(order) > 1:
            chosen = min(order, key=len)
        out += chosen
        train += sorted(set(members) - set(chosen))
    return sorted(train), sorted(out)
