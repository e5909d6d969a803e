"""The contract that every strategy keeps, third parties' included: trains, resumes exactly, exports, refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clkit import api, build, resolve
from clkit.checkpoint import pack, unpack
from clkit.errors import CapabilityError
from clkit.loop import StepLoop
from clkit.models import estimate
from clkit.plan import describe
from clkit.registry import STRATEGIES
from clkit.result import RunResult
from clkit.trainer import SequentialTrainer

WORLDS = {"text": "text_content", "classification": "vision_content", "edit": "edit_content"}
CASES = [
    pytest.param(name, world, id=f"{name}-{world}")
    for name in STRATEGIES.names()
    for world in WORLDS
    if world in STRATEGIES.get(name).capabilities.kinds
]


@pytest.fixture
def content(request, name, world):
    content = request.getfixturevalue(WORLDS[world])
    return {**content, "strategy": {"name": name, **OPTIONS.get(name, lambda content: {})(content)}}


def protected_base(content):
    """What a strategy needs that starts from a privately trained run."""
    engine = {"name": "private", "noise_multiplier": 1.0, "accountant": "rdp", "device": "cpu"}
    config = resolve.validate({**content, "engine": engine, "output_dir": content["output_dir"] + "-base"})
    return {"base": str(api.run(config).run_dir)}


OPTIONS = {"dp2unlearning": protected_base}


def with_replay(content):
    """Every strategy is also run with rehearsal under it; edits rehearse nothing, Avalanche's replay has its own buffer."""
    if content["tasks"].get("kind") == "edit" or content["strategy"]["name"] == "avalanche":
        return content
    return {**content, "strategy": {**content["strategy"], "replay": {"size": 10, "policy": "class-balanced"}}}


class Cut(Exception):
    """Stands for a process that ends here."""


def cut_after(monkeypatch, steps):
    """Let the process end after that many steps: of the optimiser, or edits."""
    done = 0

    def cut(plain):
        def step(self, *arguments):
            nonlocal done
            if done == steps:
                raise Cut
            done += 1
            return plain(self, *arguments)

        return step

    monkeypatch.setattr(SequentialTrainer, "_step", cut(SequentialTrainer._step))
    monkeypatch.setattr(StepLoop, "done", cut(StepLoop.done))


def weights(run_dir):
    from safetensors.torch import load_file

    newest = sorted((run_dir / "checkpoints").glob("[0-9]*"))[-1]
    return load_file(newest / "state.safetensors")


@pytest.mark.parametrize(("name", "world"), CASES)
def test_it_trains_and_measures_what_its_definition_says(name, world, content):
    result = api.run(resolve.validate(content))
    count = len(result.tasks)
    trained = [s for s in range(count) if not np.isnan(result.matrix[s]).all()]
    assert trained[-1] == count - 1
    assert all(not np.isnan(result.matrix[s, : s + 1]).any() for s in trained)
    assert result.metrics["average_accuracy"] == pytest.approx(result.matrix[-1].mean())
    assert RunResult.load(result.run_dir).metrics == result.metrics


@pytest.mark.parametrize(("name", "world"), [case for case in CASES if case.values[1] != "edit"])
def test_validate_tells_how_much_it_trains_or_that_it_can_not_tell(name, world, content):
    config = resolve.validate(content)
    tasks = build.make_tasks(config)
    told = STRATEGIES.get(name).trained(estimate(config.model, build.num_classes(tasks), build.input_shape(tasks)))
    model = build.make_model(config.model, tasks, config.seed, lambda text: None)
    trainer = SequentialTrainer(model, build.make_strategy(config.strategy), config)
    trainer.prepare(tasks)
    trainer.strategy.begin_task(tasks[0])
    assert told in (None, trainer.strategy.holds()["trained_parameters"])
    line = describe(config).splitlines()[-2]
    assert ("it decides what is trained" if told is None else f" {told:,} trained") in line


@pytest.mark.parametrize(("name", "world"), CASES)
def test_a_run_that_is_cut_at_any_step_ends_bit_identically(name, world, content, tmp_path, monkeypatch):
    whole = api.run(resolve.validate({**with_replay(content), "output_dir": str(tmp_path / "whole")}))
    config = resolve.validate({**with_replay(content), "output_dir": str(tmp_path / "cut")})
    for steps in (1, 3, 4, 3, 2):
        with monkeypatch.context() as patch:
            cut_after(patch, steps)
            try:
                api.run(config)
            except Cut:
                continue
    resumed = api.run(config)
    assert resumed.metrics == whole.metrics
    np.testing.assert_array_equal(resumed.matrix, whole.matrix)
    assert list(resumed.further) == list(whole.further)
    for further, scores in whole.further.items():
        np.testing.assert_array_equal(resumed.further[further].matrix, scores.matrix)
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.allclose(ours[key], theirs[key], rtol=0, atol=0, equal_nan=True), key


@pytest.mark.parametrize(("name", "world"), CASES)
def test_its_state_survives_packing_into_json_and_tensors(name, world, content):
    config = resolve.validate(with_replay(content))
    tasks = build.make_tasks(config)

    def trainer():
        model = build.make_model(config.model, tasks, config.seed, lambda text: None)
        return SequentialTrainer(model, build.make_strategy(config.strategy), config)

    first = trainer()
    first.fit(tasks)
    second = trainer()
    second.prepare(tasks)
    second.strategy.load_state_dict(unpack(*pack(first.strategy.state_dict())))
    second.strategy.load_model_state(first.strategy.model_state())
    assert str(pack(second.strategy.state_dict())[0]) == str(pack(first.strategy.state_dict())[0])
    with first.serving(), second.serving():
        assert second.score_task(tasks[0]).value == first.score_task(tasks[0]).value


def with_edits(base, result):
    """The plain base model with a run's edits put on it."""
    from transformers import AutoModelForCausalLM

    from clkit.editing import attach

    assert "clkit.Editor.load" in result.snippet and "attach(model" in result.snippet
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    attach(model, result.run_dir / "export")
    return model


@pytest.mark.parametrize(("name", "world"), CASES)
def test_what_it_exports_loads_without_a_run_and_scores_the_same(name, world, content):
    result = api.run(resolve.validate(content))
    tasks = build.make_tasks(resolve.validate(content))
    if world == "edit":
        loaded = with_edits(content["model"]["name"], result)
    elif world == "text":
        names: dict = {}
        assert "clkit" not in result.snippet, "a plain PEFT adapter or Hugging Face model"
        exec(result.snippet, names)
        loaded = names["model"].eval()
    else:
        from clkit.models import load_classifier

        loaded = load_classifier(result.run_dir / "export").module.eval()
    with api.open_run(result.run_dir) as trainer, trainer.serving(), torch.inference_mode():
        batch = trainer.run.encodings.train(0).batch(torch.arange(3))
        ours = trainer.model.module.eval()(**batch.inputs)
        theirs = loaded(**batch.inputs)
        if world != "classification":
            ours, theirs = ours.logits, theirs.logits
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert tasks[0].name == result.tasks[0]


@pytest.mark.parametrize("name", STRATEGIES.names())
def test_it_refuses_a_kind_of_task_that_it_can_not_learn(name, tmp_path):
    capabilities = STRATEGIES.get(name).capabilities
    if "edit" in capabilities.kinds:
        pytest.skip("it learns edits too")
    file = tmp_path / "edits.jsonl"
    file.write_text("".join(f'{{"prompt": "The capital of land {i} is", "target_new": "Lyon"}}\n' for i in range(10)))
    config = resolve.validate(
        {
            "output_dir": str(tmp_path / "r"),
            "strategy": name,
            "model": {"lora": {"r": 4 if capabilities.needs_lora else 0}},
            "tasks": {"source": "jsonl", "kind": "edit", "tasks": [str(file)]},
        }
    )
    with pytest.raises(CapabilityError, match=f"Strategy '{name}' can't learn tasks of kind edit"):
        api.run(config)
