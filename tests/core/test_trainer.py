"""The trainer: one step is what it should be, and what goes wrong stops it cleanly."""

from __future__ import annotations

import json
import os
import signal
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from clkit import api, resolve
from clkit.errors import CheckpointError, DataError, NumericalError
from clkit.rundir import RunDirectory
from clkit.signals import Interrupted
from clkit.strategy import Strategy


def run(content, **changes):
    merged = dict(content)
    for key, value in changes.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return api.run(resolve.validate(merged))


def losses(run_dir):
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [e["losses"]["cross_entropy"] for e in events if e["event"] == "step"]


def test_micro_batches_give_the_same_losses_as_the_whole_batch(text_content, tmp_path):
    whole = run(text_content, output_dir=str(tmp_path / "whole"))
    parts = run(text_content, output_dir=str(tmp_path / "parts"), train={"micro_batch": 3})
    np.testing.assert_allclose(losses(parts.run_dir), losses(whole.run_dir), rtol=2e-5)
    np.testing.assert_array_equal(parts.matrix, whole.matrix)


def test_gradient_checkpointing_changes_memory_not_numbers(text_content, tmp_path):
    plain = run(text_content, output_dir=str(tmp_path / "plain"))
    less = run(text_content, output_dir=str(tmp_path / "less"), model={"gradient_checkpointing": True})
    np.testing.assert_allclose(losses(less.run_dir), losses(plain.run_dir), rtol=2e-5)


def test_two_runs_with_one_seed_are_equal_and_with_another_seed_are_not(text_content, tmp_path):
    first = run(text_content, output_dir=str(tmp_path / "1"))
    second = run(text_content, output_dir=str(tmp_path / "2"))
    other = run(text_content, output_dir=str(tmp_path / "3"), seed=1)
    assert losses(first.run_dir) == losses(second.run_dir) != losses(other.run_dir)


class Poisoned(Strategy):
    """Breaks its loss at a given step."""

    def loss(self, batch):
        terms = super().loss(batch)
        if self.run.position.total_steps == 5:
            terms["poison"] = terms["cross_entropy"] * float("nan")
        return terms


def test_a_loss_that_is_not_finite_names_task_step_and_records_and_keeps_the_checkpoint(text_content, monkeypatch):
    monkeypatch.setattr(api.build, "make_strategy", lambda plugin: Poisoned(plugin.config))
    with pytest.raises(NumericalError, match=r"task 'blue' at step 2: .*poison.*Records: [0-9a-f]{16}"):
        run(text_content)
    directory = RunDirectory(text_content["output_dir"])
    assert directory.read("status.json")["state"] == "failed"
    assert directory.checkpoints.load()["position"]["total_steps"] == 4
    monkeypatch.undo()
    assert run(text_content).metrics["average_accuracy"] is not None


def test_a_finished_run_is_not_done_again_and_another_configuration_is_refused(text_content):
    first = run(text_content)
    before = (first.run_dir / "events.jsonl").read_bytes()
    again = run(text_content)
    assert again.metrics == first.metrics and again.snippet == first.snippet
    assert (first.run_dir / "events.jsonl").read_bytes() == before
    with pytest.raises(CheckpointError, match=r"train\.learning_rate: 0\.01 -> 0\.02"):
        run(text_content, train={"learning_rate": 0.02})


def test_changed_data_under_an_unfinished_run_is_refused(text_content):
    run(text_content)
    file = text_content["tasks"]["tasks"][1]
    with Path(file).open("a") as stream:
        stream.write('{"prompt": "blue 99", "answer": "a", "options": ["a", "b"]}\n')
    with pytest.raises(CheckpointError, match=r"data\.blue\.train"):
        run(text_content)


def test_a_second_process_in_the_same_directory_is_refused(text_content):
    directory = RunDirectory(text_content["output_dir"])
    with directory.locked(), pytest.raises(CheckpointError, match="another process is running"):
        run(text_content)


def test_an_unwritable_place_is_one_clear_error(text_content, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(CheckpointError, match="can't write"):
        run(text_content, output_dir=str(blocker / "run"))


def test_control_c_saves_the_state_and_the_same_command_goes_on(text_content, tmp_path, monkeypatch):
    whole = run(text_content, output_dir=str(tmp_path / "whole"))
    plain = Strategy.after_step

    def press(self):
        if self.run.position.total_steps == 3:
            os.kill(os.getpid(), signal.SIGINT)
        plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(Strategy, "after_step", press)
        with pytest.raises(Interrupted) as stopped:
            run(text_content)
    text = f"{text_content['output_dir']}: interrupted at task 1 of 3, step 3, and saved; the same call"
    assert str(stopped.value).startswith(text)
    shown = traceback.format_exception(stopped.value)
    assert shown[-1].startswith(f"clkit.signals.Interrupted: {text}")
    assert sum(line.startswith("  File") for line in shown) <= 4, "frames of the training loop tell the user nothing"
    directory = RunDirectory(text_content["output_dir"])
    assert directory.read("status.json")["state"] == "interrupted"
    assert directory.checkpoints.load()["position"]["total_steps"] == 3
    assert run(text_content).metrics == whole.metrics


def test_control_c_outside_a_step_says_how_to_go_on_too(text_content, monkeypatch):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("clkit.build.make_model", press)
    with pytest.raises(KeyboardInterrupt, match="interrupted; the same call or command again goes on") as stopped:
        run(text_content)
    assert str(stopped.value).startswith(f"{text_content['output_dir']}: ")


def test_control_c_without_a_directory_says_that_nothing_is_kept(monkeypatch):
    from clkit.tasks import build_tasks
    from clkit.trainer import SequentialTrainer

    monkeypatch.setattr(Strategy, "after_step", lambda self: os.kill(os.getpid(), signal.SIGINT))
    net = torch.nn.Sequential(torch.nn.Linear(64, 10))
    with pytest.raises(Interrupted, match="interrupted at task 1 of 5, step 1; nothing is kept"):
        SequentialTrainer(net, "naive").fit(build_tasks("digits", {"train_limit": 20}))


def test_a_module_a_strategy_by_name_and_a_few_sections_are_enough(tmp_path):
    from clkit.tasks import build_tasks
    from clkit.trainer import SequentialTrainer

    net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    tasks = build_tasks("digits", {"train_limit": 20})
    sections = {"train": {"epochs": 10, "optimizer": "sgd", "learning_rate": 0.1}}
    result = SequentialTrainer(net, "replay", sections, directory=tmp_path / "run").fit(tasks)
    assert result.metrics["learning_accuracy"] > 0.8
    assert resolve.load(tmp_path / "run" / "config.yaml").strategy.name == "replay"
    again = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    exec(result.snippet, {"module": again})
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_a_strategy_that_is_an_object_is_written_down_and_another_one_is_refused(tmp_path):
    from clkit.config import ReplayConfig, StrategyConfig
    from clkit.strategies.naive import Naive
    from clkit.strategies.replay import Replay
    from clkit.tasks import build_tasks
    from clkit.trainer import SequentialTrainer

    tasks = build_tasks("digits", {"train_limit": 8, "eval_limit": 4})

    def fit(strategy):
        return SequentialTrainer(torch.nn.Linear(64, 10), strategy, directory=tmp_path / "run").fit(tasks)

    options = Replay.config_class(replay=ReplayConfig(size=20))
    first = fit(Replay(options))
    written = resolve.load(tmp_path / "run" / "config.yaml").strategy
    assert (written.name, written.config) == ("replay", options)
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "`Linear`, trained by" in card and "strategy `replay`" in card
    assert np.array_equal(fit(Replay(options)).matrix, first.matrix, equal_nan=True)
    with pytest.raises(CheckpointError, match='strategy.name: "replay" -> "naive"'):
        fit(Naive(StrategyConfig(replay=options.replay)))
    with api.open_run(tmp_path / "run", tasks, torch.nn.Linear(64, 10)) as trainer:
        assert isinstance(trainer.strategy, Replay) and len(trainer.strategy.buffer) == 20


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_the_losses_of_full_precision(text_content, tmp_path, dtype):
    full = run(text_content, output_dir=str(tmp_path / "full"))
    half = run(text_content, output_dir=str(tmp_path / "half"), model={"dtype": dtype})
    assert losses(half.run_dir) != losses(full.run_dir)
    ours, theirs = losses(half.run_dir), losses(full.run_dir)
    np.testing.assert_allclose(ours[:4], theirs[:4], rtol=1e-3)
    np.testing.assert_allclose(ours, theirs, rtol=0.1)  # Adam's first steps turn on signs of tiny gradients


def test_scoring_every_few_steps_changes_nothing_and_is_written_down(text_content, tmp_path):
    plain = run(text_content, output_dir=str(tmp_path / "plain"))
    often = run(text_content, output_dir=str(tmp_path / "often"), eval={"every_steps": 2})
    assert losses(often.run_dir) == losses(plain.run_dir)
    np.testing.assert_array_equal(often.matrix, plain.matrix)
    events = [json.loads(line) for line in (often.run_dir / "events.jsonl").read_text().splitlines()]
    assert sum(e["event"] == "score" and e["after"].startswith("step 2 of red") for e in events) == 2


def test_scores_that_ctrl_c_cuts_short_are_there_once_after_a_resume(text_content, tmp_path, monkeypatch):
    from clkit import trainer

    def scored(result):
        events = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
        return [(e["after"], e["task"], e["total_steps"]) for e in events if e["event"] == "score"]

    plain = run(text_content, output_dir=str(tmp_path / "plain"), eval={"every_steps": 3})
    evaluate, count = trainer.evaluate_all, 0

    def pressing(*args, **kwargs):
        nonlocal count
        count += 1
        if count in (2, 4, 8):  # before training, midway, after the first task
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(trainer, "evaluate_all", pressing)
    for _ in range(3):
        with pytest.raises(Interrupted):
            run(text_content, eval={"every_steps": 3})
    found = scored(run(text_content, eval={"every_steps": 3}))
    assert len(found) > 9 and found == scored(plain)


def test_the_run_directory_says_what_was_run(text_content):
    result = run(text_content)
    facts = json.loads((result.run_dir / "run.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert set(facts["data"]) == {"red", "blue", "green"}
    assert all(len(h) == 64 for h in facts["files"].values()) and len(facts["files"]) == 3
    metrics = json.loads((result.run_dir / "metrics.json").read_text())
    assert "mean over i<T" in metrics["definitions"]["bwt"]
    assert resolve.load(result.run_dir / "config.yaml").train.epochs == 2


def test_schedules_and_optimizer_state_can_go_on_over_tasks(text_content):
    result = run(
        text_content, train={"schedule": "linear", "schedule_scope": "run", "warmup": 0.2, "reset_optimizer": False}
    )
    events = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
    rates = [e["learning_rate"] for e in events if e["event"] == "step"]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert len(set(rates)) > 8


def test_a_gradient_that_is_not_finite_is_refused_even_without_clipping(text_content, monkeypatch):
    class Rooted(Strategy):
        def loss(self, batch):
            terms = super().loss(batch)
            if self.run.position.total_steps == 3:
                zero = sum(p.sum() for p in self.parameters()) * 0
                terms["root"] = (zero * zero).sqrt()  # 0, with the gradient 0 / 0
            return terms

    monkeypatch.setattr(api.build, "make_strategy", lambda plugin: Rooted(plugin.config))
    with pytest.raises(NumericalError, match="gradient norm is not finite in task 'red' at step 4"):
        run(text_content, train={"clip": 0.0})


def test_an_update_that_breaks_the_weights_takes_its_checkpoint_with_it(tmp_path):
    content = {
        "output_dir": str(tmp_path / "run"),
        "model": {"name": "mlp", "hidden": [8]},
        "tasks": {"source": "digits", "train_limit": 20},
        "train": {"optimizer": "sgd", "learning_rate": 1e38, "clip": 0.0},
        "checkpoint": {"every_steps": 1, "keep": 9},
    }
    with pytest.raises(NumericalError, match="the update before had broken the weights"):
        run(content)
    saved = RunDirectory(tmp_path / "run").checkpoints.load()
    assert saved["position"]["total_steps"] == 0
    assert all(bool(t.isfinite().all()) and float(t.abs().max()) < 10 for t in saved["model"].values())


def test_a_record_that_does_not_fit_is_found_before_the_first_step(text_content):
    file = Path(text_content["tasks"]["tasks"][2])
    rows = file.read_text().splitlines()
    rows += [json.dumps({"prompt": f"green {i}", "answer": "long " * 99, "id": f"long-{i}"}) for i in (1, 2)]
    file.write_text("\n".join(json.dumps({k: v for k, v in json.loads(r).items() if k != "options"}) for r in rows))
    text_content["tasks"]["eval_fraction"] = 0.5
    with pytest.raises(DataError, match=r"(?s)do not fit the model.*task 'green.*long-.*task 'green.*long-"):
        run(text_content, model={"max_length": 64})
    assert not (Path(text_content["output_dir"]) / "checkpoints").exists()


def test_a_trainer_that_was_interrupted_goes_on_when_asked_again(text_content, tmp_path, monkeypatch):
    from clkit.trainer import SequentialTrainer

    config = resolve.validate(text_content)
    tasks = api.build.make_tasks(config)
    model = api.build.make_model(config.model, tasks, config.seed, lambda text: None)
    trainer = SequentialTrainer(model, "naive", config, directory=tmp_path / "run")
    plain = Strategy.after_step

    def press(self):
        if self.run.position.total_steps == 3:
            trainer._request_stop()
        plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(Strategy, "after_step", press)
        with pytest.raises(Interrupted):
            trainer.fit(tasks)
    assert not np.isnan(trainer.fit(tasks).matrix[-1]).any()


def test_micro_batches_and_gradient_checkpointing_really_happen(text_content, tmp_path, monkeypatch):
    from clkit.models.causal_lm import CausalLM

    rows: list[int] = []
    plain = CausalLM.loss

    def counting(self, batch, logits=None):
        rows.append(len(batch))
        return plain(self, batch, logits)

    monkeypatch.setattr(CausalLM, "loss", counting)
    run(text_content, train={"micro_batch": 3, "steps": 1})
    assert rows == [3, 1] * 3

    config = resolve.validate({**text_content, "model": {**text_content["model"], "gradient_checkpointing": True}})
    model = api.build.make_model(config.model, api.build.make_tasks(config), 0, lambda text: None)
    calls = []
    layer = model.module.get_base_model().model.layers[0]
    layer.self_attn.register_forward_hook(lambda *a: calls.append(1))
    batch = model.encode(api.build.make_tasks(config)[0].train).batch(torch.arange(2))
    model.loss(batch).backward()
    assert len(calls) == 2, "once forward, once again for the backward pass"
