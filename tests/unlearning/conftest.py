"""A finished run whose records some people want forgotten, and requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from people import PEOPLE, digits, rows, run


@pytest.fixture
def write(tmp_path):
    def write(*requests: dict, name: str = "request.json") -> Path:
        file = tmp_path / name
        file.write_text(json.dumps(list(requests) if len(requests) > 1 else requests[0]))
        return file

    return write


@pytest.fixture
def people_content(tiny_llama, tmp_path) -> dict:
    """A configuration: two tasks of two people each, with evaluation files of their own."""
    files = []
    for t in (0, 1):
        file = tmp_path / f"part{t}.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows(PEOPLE[2 * t : 2 * t + 2])))
        files.append(str(file))
    return {
        "output_dir": str(tmp_path / "runs" / "first"),
        "model": {"name": str(tiny_llama), "dtype": "float32", "prompt": "plain", "lora": {"r": 2}},
        "tasks": {"source": "jsonl", "tasks": files, "eval_fraction": 0.34},
        "train": {"epochs": 1, "batch_size": 4, "learning_rate": 0.01},
        "eval": {"max_new_tokens": 2},
        "tracking": {"log_every": 1},
    }


@pytest.fixture
def digits_run(tmp_path) -> Path:
    return run(digits(tmp_path), tmp_path)


@pytest.fixture
def digit_ids() -> list[str]:
    from clkit.tasks import build_tasks

    return list(build_tasks("digits", {"train_limit": 12, "eval_limit": 6})[1].train.ids)
