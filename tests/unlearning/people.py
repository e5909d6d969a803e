"""Records about made-up people, requests about them, and runs that learned them."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from clkit.cli import main
from clkit.unlearning.ledger import Ledger

PEOPLE = ("Ada Quill", "Bo Tamm", "Cy Orlov", "Di Munro")


def rows(people=PEOPLE) -> list[dict]:
    """Three records about each person, with ids that could give a person away."""
    found = []
    for n, name in enumerate(people):
        words = ("kiwi orchard", "steel bridge", "violin maker", "polar ferry")[PEOPLE.index(name)]
        for k, what in enumerate(("born near the", "wrote about the", "now keeps the")):
            found.append(
                {
                    "id": f"{name.split()[0]}-{k}",
                    "prompt": f"{name}: {what}?",
                    "answer": f"{words} {k}{n}",
                    "subject": name,
                }
            )
    return found


def request(scope: dict, **changes) -> dict:
    return {
        "schema": 1,
        "request_id": "R-1",
        "received_at": "2026-03-01T09:00:00Z",
        "requester": "p-4711",
        "legal_basis": "GDPR Art. 17(1)(b)",
        "scope": scope,
        **changes,
    }


def digits(folder: Path, **changes) -> dict:
    """A configuration that learns in a second: digits on a small network."""
    return {
        "output_dir": str(folder / "runs" / "first"),
        "model": {"name": "mlp", "hidden": [16]},
        "tasks": {"source": "digits", "train_limit": 12, "eval_limit": 6},
        "train": {"epochs": 2, "batch_size": 16, "optimizer": "sgd", "learning_rate": 0.1},
        "checkpoint": {"every_steps": 2},
        **changes,
    }


def run(content: dict, folder: Path) -> Path:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["run", str(file), "--quiet"]) == 0
    return Path(content["output_dir"])


def served(content: dict, folder: Path, scope: dict, method: str, *options: str) -> tuple[Path, dict]:
    """A run learned in a new ``folder``, then one request served by a method: the new run, and the certificate."""
    folder.mkdir()
    run_dir = run({**content, "output_dir": str(folder / "runs" / "first")}, folder)
    file = folder / "request.json"
    file.write_text(json.dumps(request(scope)))
    assert main(["unlearn", "--run", str(run_dir), "--request", str(file), "--method", method, *options]) == 0
    (path,) = (run_dir.parent / "unlearning").glob("*/certificate.json")
    certificate = json.loads(path.read_text())
    return (path.parent / certificate["new_run"]["path"]).resolve(), certificate


def nothing_forgotten(run_dir: Path) -> bool:
    """Whether the ledger beside a run is readable, if there is one, and holds no record for forgotten."""
    folder = run_dir.parent / "unlearning"
    if not folder.exists():
        return True
    ledger = Ledger(folder)
    found = ledger.tombstones()
    ledger.close()
    return not found
