"""Trackers get the numbers of events.jsonl under the same names; W&B stays offline, MLflow in plain files."""

from __future__ import annotations

import base64
import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from clkit import resolve
from clkit.api import run
from clkit.cli import main
from clkit.errors import ConfigError
from clkit.tracking import open_trackers, scalars


def content(vision_content, trackers):
    vision_content["tasks"] |= {"flat": True, "num_tasks": 2}
    vision_content["model"] = {"name": "mlp", "hidden": [8]}
    return vision_content | {"tracking": {"log_every": 1, "to": trackers}}


def told(run_dir) -> dict[str, list[tuple[int, float]]]:
    """What events.jsonl says, by name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (run_dir / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        for name, value in scalars(event["event"], event).items():
            found.setdefault(name, []).append((event["total_steps"], value))
    return found


def test_events_have_names_for_all_numbers(vision_content):
    result = run(resolve.validate(content(vision_content, [])))
    names = told(result.run_dir)
    assert {"loss/cross_entropy", "learning_rate", "score/task-1/accuracy", "cost/parameters"} <= names.keys()
    assert names["metric/average_accuracy"][-1][1] == result.metrics["average_accuracy"]
    assert not (result.run_dir / "tracking.json").exists()


def test_tensorboard_gets_every_number(vision_content):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(resolve.validate(content(vision_content, ["tensorboard"])))
    read = EventAccumulator(str(result.run_dir / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    expected = told(result.run_dir)
    assert set(read.Tags()["scalars"]) == expected.keys()
    for name, points in expected.items():
        seen = [(e.step, e.value) for e in read.Scalars(name)]
        assert [s for s, _ in seen] == [s for s, _ in points]
        assert [v for _, v in seen] == pytest.approx([v for _, v in points], rel=1e-6)


def test_tensorboard_keeps_what_was_scored_before_a_resume(vision_content, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from clkit.rundir import RunDirectory

    config = resolve.validate(content(vision_content, ["tensorboard"]))
    write, dies = RunDirectory.event, {"task-1": 2, "task-2": 2}  # in each task at its second step

    def event(self, kind, **fields):
        write(self, kind, **fields)
        if kind == "step" and fields["step"] == dies.get(fields["task"]):
            del dies[fields["task"]]
            raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "event", event)
        for _ in range(2):
            with pytest.raises(MemoryError):
                run(config)
    run_dir = run(config).run_dir
    read = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    assert {name: [e.step for e in read.Scalars(name)] for name in read.Tags()["scalars"]} == {
        name: [step for step, _ in points] for name, points in told(run_dir).items()
    }


def test_mlflow_gets_every_number_in_plain_files_and_goes_on_in_the_same_run(vision_content):
    mlflow = pytest.importorskip("mlflow")
    config = content(vision_content, ["mlflow"])
    result = run(resolve.validate(config))
    client = mlflow.MlflowClient((result.run_dir / "mlruns").as_uri())
    identity = json.loads((result.run_dir / "tracking.json").read_text())["mlflow"]
    for name, points in told(result.run_dir).items():
        assert [(m.step, m.value) for m in client.get_metric_history(identity, name)] == points
    assert client.get_run(identity).data.params["train.epochs"] == "1"
    (result.run_dir / "matrix.json").unlink()
    run(resolve.validate(config))
    experiment = client.get_experiment_by_name("clkit")
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_mlflow_and_wandb_say_how_a_run_ended_and_that_it_goes_on(vision_content, monkeypatch):
    mlflow, wandb = pytest.importorskip("mlflow"), pytest.importorskip("wandb")
    from clkit.strategy import Strategy

    config, codes, seen = resolve.validate(content(vision_content, ["mlflow", "wandb"])), [], []
    finish = wandb.Run.finish
    monkeypatch.setattr(
        wandb.Run, "finish", lambda run, exit_code=None: (codes.append(exit_code), finish(run, exit_code))
    )

    def status():
        identity = json.loads((config_dir / "tracking.json").read_text())["mlflow"]
        return mlflow.MlflowClient((config_dir / "mlruns").as_uri()).get_run(identity).info.status

    config_dir = Path(config.output_dir)
    for error in (MemoryError, KeyboardInterrupt):

        def end_task(self, task, error=error):
            seen.append(status())
            raise error

        with monkeypatch.context() as patched, pytest.raises(error):
            patched.setattr(Strategy, "end_task", end_task)
            run(config)
        seen.append(status())
    run(config)
    assert [*seen, status()] == ["RUNNING", "FAILED", "RUNNING", "KILLED", "FINISHED"]
    assert codes == [1, 1, 0]


def test_mlflow_takes_tasks_of_any_name_and_a_run_that_starts_afresh(text_content, tmp_path):
    pytest.importorskip("mlflow")
    file = tmp_path / "Q&A, law's 50%.jsonl"
    file.write_bytes((tmp_path / "red.jsonl").read_bytes())
    text_content["tasks"]["tasks"] = [str(file)]
    config = resolve.validate(text_content | {"tracking": {"to": ["mlflow"]}})
    for _ in range(2):
        run_dir = run(config, fresh=True).run_dir
        assert [*run_dir.glob("mlruns/*/*/metrics/score/Q_A_ law_s 50_/*")]


def test_wandb_writes_an_offline_run(vision_content, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    result = run(resolve.validate(content(vision_content, ["wandb"])))
    identity = json.loads((result.run_dir / "tracking.json").read_text())["wandb"]
    (file,) = (result.run_dir / "wandb").glob(f"offline-run-*/run-{identity}.wandb")
    names, until = [name.encode() for name in told(result.run_dir)], time.monotonic() + 30
    while not all(name in file.read_bytes() for name in names):  # W&B's own process writes it
        assert time.monotonic() < until, [name for name in names if name not in file.read_bytes()]
        time.sleep(0.2)


def test_a_missing_package_is_found_before_anything_is_loaded(vision_content, tmp_path, monkeypatch, capsys):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else real(name, *a))
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(content(vision_content, ["wandb"])))
    for command in ("validate", "run"):
        assert main([command, str(file)]) == 2
        assert "pip install 'clkit[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="wandb"):
        open_trackers(["wandb"], None, "x", {}, 0)


def test_an_unknown_tracker_is_named_with_a_near_one(vision_content):
    with pytest.raises(ConfigError, match=r"tracking\.to.*Did you mean 'tensorboard'"):
        resolve.validate(content(vision_content, ["tensorbord"]))


def test_samples_keep_the_answers_before_after_and_at_the_end(text_content):
    result = run(resolve.validate(text_content))
    samples = json.loads((result.run_dir / "samples.json").read_text())
    assert list(samples) == ["red", "blue", "green"]
    assert [entry["when"] for entry in samples["red"]] == ["before training", "after red", "after green"]
    assert [entry["when"] for entry in samples["green"]] == ["before training", "after green"]
    for entry in samples["blue"]:
        assert len(entry["rows"]) == 3
        assert all(row["prompt"].startswith("blue ") for row in entry["rows"])
        assert all(row["value"] == float(row["gold"] == row["prediction"]) for row in entry["rows"])
    none = {**text_content, "output_dir": text_content["output_dir"] + "-none", "tracking": {"samples": 0}}
    assert not (run(resolve.validate(none)).run_dir / "samples.json").exists()


def test_cost_counts_parameters_and_exemplars(vision_content):
    from clkit.report.history import History

    vision_content = content(vision_content, []) | {"strategy": {"name": "replay", "replay": {"size": 5}}}
    result = run(resolve.validate(vision_content))
    cost = History.read(result.run_dir).last_cost
    assert cost["parameters"] == cost["trainable_parameters"] == 64 * 8 + 8 + 8 * 10 + 10
    assert cost["model_bytes"] == 4 * (cost["parameters"] + 2)  # scale and shift of the inputs
    assert cost["exemplars"] == 5 and cost["exemplar_bytes"] == 5 * 64 * 4
    assert cost["peak_memory_bytes"] > 10 * 2**20


@pytest.mark.parametrize("flat", [True, False])
def test_samples_of_images_show_the_image_and_name_classes_by_their_names(tmp_path, flat):
    from PIL import Image
    from sklearn.datasets import load_digits

    content = {
        "output_dir": str(tmp_path / "run"),
        "model": {"name": "mlp"} if flat else {"name": "cifar-resnet-8"},
        "tasks": {"source": "digits", "order_seed": 3, "flat": flat, "train_limit": 20, "eval_limit": 10},
        "train": {"steps": 1},
    }
    run(resolve.validate(content))
    start = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])
    assert sorted(name for held in start["holds"] for name in held["classes"]) == list("0123456789")
    assert [(held["train"], held["eval"]) for held in start["holds"]] == [(40, 20)] * 5
    images = {
        image.astype("uint8").tobytes(): str(label) for image, label in zip(*load_digits(return_X_y=True), strict=True)
    }
    samples = json.loads((tmp_path / "run" / "samples.json").read_text())
    for entries, held in zip(samples.values(), start["holds"], strict=True):
        for row in (row for entry in entries for row in entry["rows"]):
            head, _, data = row["picture"].partition(",")
            image = Image.open(io.BytesIO(base64.b64decode(data)))
            pixels = (np.asarray(image, dtype=float) / 255 * 16).round().astype("uint8").tobytes()
            assert head == "data:image/png;base64" and image.size == (8, 8)
            assert row["gold"] == images[pixels] and row["gold"] in held["classes"]
            assert (row["prediction"] == row["gold"]) == (row["value"] == 1)


def test_a_class_is_named_in_the_order_of_its_task_or_by_its_number():
    from clkit.observe import _class_names
    from clkit.tasks.base import LabelledExamples, Task

    held = LabelledExamples(torch.zeros(2, 1), torch.tensor([2, 3]), ("a", "b"))
    tasks = [
        Task("listed", held, held, "classification", "accuracy", (2, 3), {"class_names": names})
        for names in (["two", "three"], {2: "two", "3": "three"})
    ]
    assert [_class_names([task]) for task in tasks] == [{"2": "two", "3": "three"}] * 2


@pytest.mark.filterwarnings("error")
def test_an_image_of_one_colour_beyond_the_usual_range_has_a_thumbnail():
    from clkit.tasks.images import thumbnail

    assert thumbnail(torch.full((3, 4, 4), 7.0)).startswith("data:image/png;base64,")
