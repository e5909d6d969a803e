"""WISE with few steps on a tiny model: two edits a shard, nothing merged."""

from __future__ import annotations

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
