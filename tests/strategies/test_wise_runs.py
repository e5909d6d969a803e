"""WISE in a run: tasks are batches of edits, R is reliability, a run that is cut anywhere ends with the same bits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from clkit import api, build, resolve
from clkit.checkpoint import pack, unpack
from clkit.editing import attach
from clkit.errors import CapabilityError, ConfigError
from clkit.loop import StepLoop
from clkit.trainer import SequentialTrainer


@pytest.fixture
def content(tiny_llama, tmp_path):
    """Two tasks of three edits on the tiny Llama."""
    files = []
    for t in range(2):
        file = tmp_path / f"batch{t}.jsonl"
        rows = [
            {"prompt": f"Town {t} of {i}?", "target_new": "ab"[i % 2], "locality_prompt": f"Sum {i}", "id": f"{t}-{i}"}
            for i in range(3)
        ]
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        files.append(str(file))
    options = {"layer": "0", "steps": 6, "contexts": 1, "negatives": 1, "shard_size": 2, "merge_every": 4}
    return {
        "output_dir": str(tmp_path / "run"),
        "model": {"name": str(tiny_llama), "dtype": "float32", "prompt": "plain", "lora": {"r": 0}},
        "tasks": {"source": "jsonl", "kind": "edit", "tasks": files},
        "strategy": {"name": "wise", **options},
        "eval": {"max_new_tokens": 2},
        "checkpoint": {"every_steps": 1},
        "tracking": {"log_every": 1},
    }


def test_the_matrix_is_reliability_of_each_batch_after_each_batch(content):
    result = api.run(resolve.validate(content))
    assert result.task_metrics == ["edit-exact"] * 2
    assert not np.isnan(result.matrix[np.tril_indices(2)]).any()
    assert ((result.matrix >= 0) & (result.matrix <= 1) | np.isnan(result.matrix)).all()
    with api.open_run(result.run_dir) as trainer:
        memories = trainer.strategy.holdings()
        assert memories == {"shards-0-1": ["0-0", "0-1", "0-2", "1-0"], "shard-2": ["1-1", "1-2"]}
        with trainer.serving():
            assert trainer.score_task(trainer.tasks[0]).value == result.matrix[1, 0]


def test_a_run_that_is_cut_at_any_edit_ends_bit_identically(content, tmp_path, monkeypatch):
    class Cut(Exception):
        pass

    def saved(run_dir):
        from safetensors.torch import load_file

        return load_file(sorted((run_dir / "checkpoints").glob("[0-9]*"))[-1] / "state.safetensors")

    whole = api.run(resolve.validate({**content, "output_dir": str(tmp_path / "whole")}))
    config = resolve.validate({**content, "output_dir": str(tmp_path / "cut")})
    plain = StepLoop.done
    for cut in (0, 1, 2, 1):
        left = [cut]

        def done(self, losses, left=left):
            if not left[0]:
                raise Cut
            left[0] -= 1
            plain(self, losses)

        with monkeypatch.context() as patch, pytest.raises(Cut):
            patch.setattr(StepLoop, "done", done)
            api.run(config)
    resumed = api.run(config)
    assert resumed.metrics == whole.metrics
    np.testing.assert_array_equal(resumed.matrix, whole.matrix)
    ours, theirs = saved(tmp_path / "cut"), saved(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k].nan_to_num(), theirs[k].nan_to_num()) for k in ours)


def test_its_state_survives_packing(content):
    config = resolve.validate(content)
    tasks = build.make_tasks(config)

    def trainer():
        model = build.make_model(config.model, tasks, config.seed, lambda text: None)
        return SequentialTrainer(model, build.make_strategy(config.strategy), config)

    first, second = trainer(), trainer()
    first.fit(tasks)
    second.prepare(tasks)
    second.strategy.load_state_dict(unpack(*pack(first.strategy.state_dict())))
    assert str(pack(second.strategy.state_dict())[0]) == str(pack(first.strategy.state_dict())[0])


def test_its_export_is_put_on_the_base_model_and_answers_the_same(content):
    from transformers import AutoModelForCausalLM

    result = api.run(resolve.validate(content))
    base = AutoModelForCausalLM.from_pretrained(content["model"]["name"], dtype=torch.float32).eval()
    assert "clkit.Editor.load" in result.snippet
    attach(base, result.run_dir / "export")
    with api.open_run(result.run_dir) as trainer, torch.inference_mode():
        for prompt in ("Town 0 of 1?", "Town 1 of 2?", "else"):
            ids = torch.tensor([trainer.model.tokenizer(prompt).input_ids])
            assert torch.equal(trainer.model.module.eval()(ids).logits, base(ids).logits)


def test_other_tasks_are_refused(content, text_content):
    text = {**text_content, "strategy": "wise"}
    with pytest.raises(CapabilityError, match="'wise' can't learn tasks of kind text; it learns edit"):
        api.run(resolve.validate(text))
    with pytest.raises(ConfigError, match="strategy.merge_every: got 5, expected a multiple of shard_size"):
        resolve.validate({**content, "strategy": {"name": "wise", "merge_every": 5, "shard_size": 2}})


def test_every_edit_is_logged(content):
    result = api.run(resolve.validate(content))
    text = (result.run_dir / "events.jsonl").read_text()
    events = [json.loads(line) for line in text.splitlines()]
    steps, edits = ([e for e in events if e["event"] == kind] for kind in ("step", "edit"))
    assert len(steps) == len(edits) == 6
    assert all(set(e["losses"]) == {"target", "margin"} for e in (*steps, *edits))


def test_scoring_amid_a_batch_changes_nothing(content, tmp_path):
    whole = api.run(resolve.validate(content))
    often = {**content, "output_dir": str(tmp_path / "often"), "eval": {"max_new_tokens": 2, "every_steps": 1}}
    assert (api.run(resolve.validate(often)).matrix == whole.matrix)[np.tril_indices(2)].all()
