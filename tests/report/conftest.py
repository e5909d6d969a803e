"""Finished runs to report on: two settings with two seeds each, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from clkit import resolve
from clkit.api import run


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    made = []
    for seed in (0, 1):
        for name, strategy in (("naive", {"name": "naive"}), ("replay", {"name": "replay", "replay": {"size": 30}})):
            content = {
                "name": f"{name} <{seed}> & co",
                "output_dir": str(root / f"{name}-{seed}"),
                "seed": seed,
                "model": {"name": "mlp", "hidden": [16]},
                "tasks": {"source": "digits", "train_limit": 30, "eval_limit": 10, "num_tasks": 3},
                "strategy": strategy,
                "train": {"epochs": 2, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.05},
                "tracking": {"log_every": 1},
            }
            made.append(Path(run(resolve.validate(content)).run_dir))
    return made
