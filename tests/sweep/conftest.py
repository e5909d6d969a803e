"""A sweep that takes seconds: two digits tasks on a tiny network."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def sweep_content(tmp_path) -> dict:
    return {
        "name": "tiny",
        "output_dir": str(tmp_path / "sweep"),
        "model": {"name": "mlp", "hidden": [8]},
        "tasks": {"source": "digits", "train_limit": 8, "eval_limit": 4},
        "train": {"epochs": 1, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.05},
        "eval": {"initial": False},
        "checkpoint": {"every_steps": 0},
        "sweep": {
            "axes": {"strategy": ["naive", {"name": "replay", "replay": {"size": 8}}]},
            "seeds": 2,
            "launcher": {"name": "in-process"},
        },
    }


@pytest.fixture
def write(tmp_path):
    """Write a sweep's content to a file; returns its path as text."""

    def written(content: dict) -> str:
        file: Path = tmp_path / "sweep.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(file)

    return written
