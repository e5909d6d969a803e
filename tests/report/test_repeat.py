"""What a page says of how to repeat a run that no command repeats."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import clkit
from clkit.api import open_run
from clkit.errors import CheckpointError
from clkit.report import load, render
from clkit.tasks import build_tasks

SMALL = {"num_tasks": 2, "train_limit": 8, "eval_limit": 4}


def page(run_dir):
    return render(load([run_dir])[0])[0]


def net():
    return torch.nn.Linear(64, 10)


def test_a_run_of_clkit_fit_with_parts_made_in_python_has_no_command(tmp_path):
    tasks = build_tasks("digits", SMALL)
    both = page(clkit.fit(net(), tasks, output_dir=tmp_path / "both", train={"steps": 1}).run_dir)
    assert "No command does: its tasks and its model were made in Python." in both
    assert "clkit run " not in both and "naive on a model made in Python" in both
    given = {"source": "digits", **SMALL}
    model = page(clkit.fit(net(), given, output_dir=tmp_path / "model", train={"steps": 1}).run_dir)
    assert "No command does: its model was made in Python." in model and "clkit run " not in model
    neither = page(clkit.fit("mlp", given, output_dir=tmp_path / "neither", train={"steps": 1}).run_dir)
    assert "clkit run " in neither and "No command does" not in neither


@pytest.mark.parametrize(("sections", "parts"), [({}, "its tasks and its model were"), (None, "its model was")])
def test_nor_has_one_of_a_trainer_made_in_python(tmp_path, sections, parts):
    sections = {"tasks": {"source": "digits", **SMALL}} if sections is None else sections
    trainer = clkit.SequentialTrainer(net(), "naive", sections | {"train": {"steps": 1}}, directory=tmp_path / "run")
    trainer.fit(build_tasks("digits", SMALL))
    assert f"No command does: {parts} made in Python." in page(tmp_path / "run")
    with pytest.raises(CheckpointError, match="made in Python: give"), open_run(tmp_path / "run"):
        pass


def test_nor_has_one_that_began_with_the_weights_of_another(runs, tmp_path):
    run_dir = shutil.copytree(runs[0], tmp_path / "run")
    facts = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps(facts | {"strategy_from": "python"}))
    assert "it began with the weights of another run" in page(run_dir) and "clkit run " not in page(run_dir)
