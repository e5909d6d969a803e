"""Finished runs to report on: two settings with two seeds each, made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clkit import resolve
from clkit.api import run
from clkit.cli import main
from clkit.tasks import build_tasks


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


@pytest.fixture(scope="session")
def deletion(tmp_path_factory) -> Path:
    """A run without eight digits that one before it had learned, with its certificate and ledger."""
    root = tmp_path_factory.mktemp("deletion")
    options = {"train_limit": 12, "eval_limit": 6, "num_tasks": 2}
    content = {
        "output_dir": str(root / "runs" / "first"),
        "model": {"name": "mlp", "hidden": [16]},
        "tasks": {"source": "digits", **options},
        "train": {"epochs": 6, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.1},
    }
    first = run(resolve.validate(content)).run_dir
    request = {
        "schema": 1,
        "request_id": "R-1",
        "received_at": "2026-03-01T09:00:00Z",
        "requester": "p-4711",
        "legal_basis": "GDPR Art. 17(1)(b)",
        "scope": {"record_ids": list(build_tasks("digits", options)[1].train.ids)[:8]},
    }
    (root / "request.json").write_text(json.dumps(request))
    lenient = ["--max-utility-loss", "1", "--max-membership", "1"]
    assert main(["unlearn", "--run", str(first), "--request", str(root / "request.json"), *lenient]) == 0
    (found,) = (root / "runs").glob("first-without-*")
    return found


@pytest.fixture(scope="session")
def edited(tmp_path_factory) -> Path:
    """A directory as `clkit edit` writes it: three edits, one rollback, scores and routes of the final model."""
    folder = tmp_path_factory.mktemp("edited")

    def route(score):
        return {"memory": "shard-0" if score > 2 else None, "score": score, "threshold": 2.0}

    entries, rows = [], []
    for i in range(3):
        routes = {"prompt": route(4.0 + i), "rephrase": route(3.0), "locality": route(0.5 + i)}
        after = {"prompt": 1.0, "rephrase": 0.5, "locality": 1.0}
        entries.append(
            {"number": i + 1, "kind": "edit", "id": str(i), "request": {"prompt": f"<b>{i}", "target_new": "x"},
             "before": {"prompt": 0.0}, "after": after, "routes": routes, "memory": "shard-0", "steps": 3}
        )  # fmt: skip
        rows.append({"id": str(i), "after": after | {"prompt": 0.5 * (i > 0)}, "routes": routes})
    entries.append({"number": 4, "kind": "rollback", "ids": ["9"], "relearned": []})
    (folder / "edits.json").write_text("{}")
    (folder / "scores.json").write_text(json.dumps({"edits": 3, "rows": rows}))
    (folder / "journal.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    return folder
