"""The script that compares methods over real text tasks: what it skips and what it refuses."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from clkit import api, resolve

FOLDER = Path(__file__).parents[2] / "experiments" / "text_sequence"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("text_sequence_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def test_a_finished_run_of_other_options_is_not_taken_for_this_one(script, tiny_llama, tmp_path, monkeypatch, capsys):
    for name in yaml.safe_load((FOLDER / "settings.yaml").read_text())["orders"]["a"]:
        rows = [{"prompt": f"{name} {i}", "answer": "ab"[i % 2], "options": ["a", "b"]} for i in range(6)]
        (tmp_path / name).mkdir()
        for part, some in (("train", rows[:4]), ("test", rows[4:])):
            (tmp_path / name / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path))
    made = []

    def execute(run):
        made.append(run.setting)
        api.run(resolve.load(FOLDER / "base.yaml", run.overrides))
        return f"{run.setting}: finished"

    monkeypatch.setattr(script, "execute", execute)
    options = ["tasks.root=" + str(tmp_path), f"model.name={tiny_llama}", "model.dtype=float32", "train.batch_size=6"]
    command = ["--out", str(tmp_path / "out"), "--settings", "reglora-lam0", "--orders", "a", "--seeds", "0"]
    assert script.main([*command, "--override", *options]) == 0
    assert script.main([*command, "--override", *options]) == 0
    assert made == ["reglora-lam0"]
    table = (tmp_path / "out" / "summary.csv").read_text()
    assert [row["setting"] for row in csv.DictReader(table.splitlines())] == made
    capsys.readouterr()
    assert script.main([*command, "--override", *options, "train.epochs=2"]) == 2
    message = capsys.readouterr().err
    assert "reglora-lam0/a-0" in message and "train.epochs" in message and "another --out" in message
    assert script.main([*command, "--summary"]) == 0
    assert (tmp_path / "out" / "summary.csv").read_text() == table
