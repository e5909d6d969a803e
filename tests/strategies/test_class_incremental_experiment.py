"""The class-incremental experiment: what its tables pair, and what it says where nothing is there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).parents[2] / "experiments" / "class_incremental" / "run.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("class_incremental_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path):
    content = {
        "name": "tiny",
        "output_dir": str(tmp_path / "runs"),
        "model": {"name": "identity"},
        "tasks": {"source": "digits", "train_limit": 6, "eval_limit": 3},
        "eval": {"initial": False},
        "compare": [["strategy=ncm"], ["strategy=simplecil"]],
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_it_runs_every_method_and_says_where_there_is_none(script, config, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["run.py", str(config), "--classes", "5", "--seeds", "0", "--curves", "--finished"]
    )
    script.main()
    assert capsys.readouterr().out == "5 classes per task: no such run is finished\n"
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "--only", "ncm"])
    script.main()
    printed = capsys.readouterr().out
    assert "| ncm " in printed and "simplecil" not in printed and "| after task | 1 | 2 |" in printed


def test_an_area_is_under_the_runs_of_one_seed(script):
    """With a run missing the third seed of one budget stood beside the second of the other."""

    def of(*pairs):
        return [{"seed": s, "average_incremental_accuracy": a, "average_accuracy": a} for s, a in pairs]

    rows = {"small": of((0, 0.2), (1, 0.4), (2, 0.6)), "large": of((0, 0.2), (2, 0.6))}
    printed = script.areas([1.0, 3.0], {"some": ["small", "large"]}, rows)
    assert "| some | 0.800 ± 0.566 | 0.800 ± 0.566 |" in printed
