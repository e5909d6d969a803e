"""The Python entry points: what they accept, what they record, what they leave alone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import clkit
from clkit import api, build, resolve
from clkit.errors import CheckpointError, ConfigError, DataError
from clkit.models import load_classifier, wrap
from clkit.tasks.base import LabelledExamples
from clkit.trainer import SequentialTrainer


@pytest.fixture
def digits():
    section = {"source": "digits", "train_limit": 12, "eval_limit": 6}
    return build.make_tasks(resolve.validate({"tasks": section, "model": "mlp"}))


def network(classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(64, classes)


def test_one_file_is_one_task(text_content, tmp_path):
    quick = {"model.prompt": "plain", "train.steps": 1, "eval.max_new_tokens": 2}
    result = clkit.fit(text_content["model"]["name"], tmp_path / "red.jsonl", output_dir=tmp_path / "one", **quick)
    assert json.loads((tmp_path / "one" / "matrix.json").read_text())["tasks"] == ["red"]
    assert result.name == "one"


@pytest.mark.parametrize("tasks", [3, None, [1, 2], b"red.jsonl", object()])
def test_tasks_of_a_wrong_type_are_an_error_that_says_what_is_accepted(tasks):
    with pytest.raises(ConfigError, match="tasks: got .*, expected a file, a list of files, a mapping .* TaskSequence"):
        clkit.fit(tasks=tasks)


def test_a_model_of_a_wrong_type_is_an_error():
    with pytest.raises(ConfigError, match="model: got int, expected a name"):
        clkit.fit(3, tasks="red.jsonl")


def test_wrap_can_be_called_by_its_full_name_again():
    program = "import clkit.models\nfrom torch import nn\nfor _ in range(2): clkit.models.wrap(nn.Linear(2, 2))"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_module_and_tasks_made_in_python_are_used_and_asked_for_again(wrapped, digits, tmp_path):
    model = wrap(network()) if wrapped else network()
    module = model.module if wrapped else model
    before = module.weight.detach().clone()
    result = clkit.fit(model, digits, output_dir=tmp_path / "run", train={"optimizer": "sgd", "learning_rate": 0.1})
    assert not torch.equal(module.weight, before)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["tasks_from"] == facts["model_from"] == "python"
    with pytest.raises(CheckpointError, match="tasks were made in Python: give tasks="), api.open_run(result.run_dir):
        pass
    with pytest.raises(CheckpointError, match="model was made in Python: give model="):  # noqa: SIM117
        with api.open_run(result.run_dir, tasks=digits):
            pass
    with api.open_run(result.run_dir, tasks=digits, model=network()) as trainer:
        assert torch.equal(trainer.model.module.weight, module.weight)


def test_options_of_what_was_made_in_python_are_refused(digits, tmp_path):
    lost = {"model.dtype": "float32", "tasks.metric": "accuracy", "model.lora.target_modules": ["q_proj"]}
    with pytest.raises(ConfigError, match="no effect") as refused:
        clkit.fit(network(), digits, output_dir=tmp_path / "run", **lost)
    assert "model.dtype" in str(refused.value) and "tasks.metric" in str(refused.value)
    assert "model.lora" not in str(refused.value) and not (tmp_path / "run").exists()


def test_a_language_model_without_its_tokenizer_is_an_error_that_says_so(tmp_path):
    (tmp_path / "red.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 12)
    with pytest.raises(ConfigError, match=r"clkit.models.wrap\(module, tokenizer\)"):
        clkit.fit(network(), tmp_path / "red.jsonl", output_dir=tmp_path / "run")


@pytest.mark.parametrize("module", [network(5), nn.Sequential(network(), nn.Unflatten(1, (5, 2)))])
def test_a_module_whose_output_does_not_fit_the_classes_is_a_data_error(module, digits, tmp_path):
    with pytest.raises(DataError, match=r"must give logits \(B, num_classes\), and these tasks have 10 classes"):
        clkit.fit(module, digits, output_dir=tmp_path / "run", eval={"initial": False}, train={"epochs": 5})


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_numbers_reach_a_module_as_they_are_in_the_type_of_its_weights(dtype):
    model, x = wrap(network()), torch.arange(128).view(2, 64)
    encoded = model.encode(LabelledExamples(x.to(dtype), torch.tensor([0, 1]), ["a", "b"]))
    assert torch.equal(model.logits(encoded.batch(torch.arange(2))), model.module(x.float()))


def test_token_ids_reach_a_module_that_embeds_them():
    module = nn.Sequential(nn.Embedding(300, 4), nn.Flatten(), nn.Linear(12, 2))
    x = torch.tensor([[1, 2, 3], [299, 0, 256]])
    model = wrap(module)
    encoded = model.encode(LabelledExamples(x, torch.tensor([0, 1]), ["a", "b"]))
    assert torch.equal(model.logits(encoded.batch(torch.arange(2))), module(x))


def test_tasks_that_name_no_classes_have_those_of_their_labels(digits, tmp_path):
    unnamed = clkit.TaskSequence([dataclasses.replace(t, classes=None) for t in digits], scenario="domain")
    assert unnamed.num_classes == 10
    quick = {"train.steps": 1, "train.batch_size": 4}
    result = clkit.fit("mlp", unnamed, output_dir=tmp_path / "run", **quick)
    assert load_classifier(result.run_dir / "export").num_classes == 10


def test_a_run_can_be_opened_where_nothing_can_be_written(digits, tmp_path, monkeypatch):
    run_dir = clkit.fit(network(), digits, output_dir=tmp_path / "run").run_dir
    (run_dir / ".lock").unlink(missing_ok=True)
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    with api.open_run(run_dir, tasks=digits, model=network()) as trainer, trainer.serving():
        trainer.score_task(trainer.tasks[0])
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == before
    with pytest.raises(CheckpointError, match="no permission to write"):
        clkit.fit(network(), digits, output_dir=run_dir)


def test_opening_a_run_changes_nothing_in_it(text_content, tmp_path):
    result = api.run(resolve.validate(text_content))
    events = tmp_path / "run" / "events.jsonl"
    with events.open("a") as file:
        file.write('{"event": "mine"}\n')

    def content():
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*") if p.is_file()}

    before = content()
    with api.open_run(result.run_dir) as trainer, trainer.serving():
        trainer.score_task(trainer.scored[0])
    after = content()
    after.pop(tmp_path / "run" / ".lock", None)
    before.pop(tmp_path / "run" / ".lock", None)
    assert after == before


def test_the_type_of_the_weights_is_chosen_for_the_engines_device(text_content, tmp_path, monkeypatch):
    seen = []
    load = build.load_model
    monkeypatch.setattr(build, "load_model", lambda *a, **k: seen.append(k["device"]) or load(*a, **k))
    result = api.run(resolve.validate({**text_content, "engine": {"name": "local", "device": "cpu"}}))
    with api.open_run(result.run_dir):
        pass
    assert seen == [torch.device("cpu")] * 2


def test_a_task_without_evaluation_examples_is_found_before_training(digits, tmp_path):
    empty = dataclasses.replace(digits[0], name="empty", eval=digits[0].eval.subset([]))
    with pytest.raises(DataError, match="'empty' has no evaluation examples"):
        clkit.fit(network(), clkit.TaskSequence([empty]), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fresh_starts_again_where_the_status_of_the_run_before_is_damaged(digits, tmp_path):
    options = {"tasks": digits, "output_dir": tmp_path / "run", "train.epochs": 1}
    clkit.fit(network(), **options)
    (tmp_path / "run" / "status.json").write_text("{")
    with pytest.raises(CheckpointError, match="start again with --fresh"):
        clkit.fit(network(), **options)
    assert clkit.fit(network(), fresh=True, **options).metrics["average_accuracy"] is not None


def test_a_finished_run_without_its_checkpoints_is_not_told_to_go_on(digits, tmp_path):
    clkit.fit(network(), digits, output_dir=tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    gone = pytest.raises(CheckpointError, match="its checkpoints are gone; what it exported is in .*export")
    with gone, api.open_run(tmp_path / "run", digits, network()):
        pass


def test_a_resume_computes_in_the_type_that_auto_meant_when_the_run_began(text_content, tmp_path, monkeypatch):
    from clkit.strategy import Strategy

    def run(name, prefers_bfloat16):
        monkeypatch.setattr("clkit.models.precision.cpu_prefers_bfloat16", lambda: prefers_bfloat16)
        model = {**text_content["model"], "dtype": "auto"}
        return api.run(resolve.validate({**text_content, "model": model, "output_dir": str(tmp_path / name)}))

    def losses(result):
        lines = map(json.loads, (result.run_dir / "events.jsonl").read_text().splitlines())
        return [line["losses"] for line in lines if line["event"] == "step"]

    def stop(self):
        if self.run.position.total_steps == 3:
            raise KeyboardInterrupt

    whole, other = run("whole", False), run("other", True)
    assert losses(whole) != losses(other), "the types must differ for this to say something"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Strategy, "after_step", stop)
        run("cut", False)
    assert losses(run("cut", True)) == losses(whole)
    monkeypatch.setattr("clkit.models.precision.cpu_prefers_bfloat16", lambda: True)
    with api.open_run(tmp_path / "whole") as trainer:
        assert trainer.model.autocast_dtype is None


def test_a_call_that_does_one_run_does_not_pass_over_compare(digits, tmp_path):
    entries = [["strategy=naive"], ["strategy=replay"]]
    with pytest.raises(ConfigError, match="compare: stands for several runs"):
        clkit.fit(network(), digits, output_dir=tmp_path / "run", compare=entries)
    assert not (tmp_path / "run").exists()


def test_a_trainer_learns_a_plain_list_of_tasks_as_it_learns_their_sequence(digits):
    found = [SequentialTrainer(network()).fit(tasks).matrix for tasks in (digits, list(digits))]
    np.testing.assert_array_equal(*found)
