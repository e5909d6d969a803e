"""WISE with few steps on a tiny model: two edits a shard, nothing merged."""

from __future__ import annotations

import clkit

METHOD = {
    "name": "wise",
    "layer": "0",
    "steps": 8,
    "contexts": 1,
    "negatives": 1,
    "shard_size": 2,
    "merge_every": 0,
    "learning_rate": 0.3,
}


def request(i: int, **fields) -> clkit.EditRequest:
    """An edit of its own."""
    content = {"prompt": f"Town of {i}?", "target_new": "ab"[i % 2], "id": f"e{i}", "locality_prompt": f"Sum {i}?"}
    return clkit.EditRequest(**(content | fields))
