"""Strategies of other kinds on DeepSpeed, as far as they declare: the numbers of the local engine, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import talk
from test_deepspeed_numbers import same_numbers

from clkit import api, resolve
from clkit.engine.group import LocalGroup
from clkit.errors import CapabilityError, ClkitError

SMALL = {"heads": 4, "pairs": 32, "key_dim": 4, "key_passes": 2}


def contents(folder: Path, tiny_llama: Path) -> dict[str, dict]:
    edits = folder / "edits.jsonl"
    rows = [{"prompt": f"Town {i}?", "target_new": "ab"[i % 2], "locality_prompt": f"Sum {i}"} for i in range(3)]
    edits.write_text("".join(json.dumps(r) + "\n" for r in rows))
    digits = {"source": "digits", "train_limit": 12, "eval_limit": 6}
    track = {"checkpoint": {"every_steps": 0, "keep": 1}, "tracking": {"log_every": 1}}
    wise = {"layer": "0", "steps": 4, "contexts": 1, "negatives": 1, "shard_size": 2, "merge_every": 4}
    return {
        "dkvb": {
            "model": {"name": "identity"},
            "tasks": digits,
            "strategy": {"name": "dkvb", **SMALL},
            "train": {"epochs": 1, "batch_size": 7, "optimizer": "sgd", "momentum": 0.0, "learning_rate": 2.0},
            **track,
        },
        **{
            name: {
                "model": {"name": "mlp", "hidden": [64, 32]},
                "tasks": digits,
                "strategy": {"name": name, "replay": {"size": 10, "policy": "herding"}},
                "train": {"epochs": 1, "batch_size": 7, "learning_rate": 0.01, "weight_decay": 0.01, "clip": 0.5},
                **track,
            }
            for name in ("memo", "der")
        },
        "wise": {
            "model": {"name": str(tiny_llama), "dtype": "float32", "prompt": "plain", "lora": {"r": 0}},
            "tasks": {"source": "jsonl", "kind": "edit", "tasks": [str(edits)]},
            "strategy": {"name": "wise", **wise},
            "eval": {"max_new_tokens": 2},
            **track,
        },
    }


@pytest.mark.slow
def test_stages_0_to_2_give_the_numbers_of_the_local_engine(tmp_path, tiny_llama):
    given = contents(tmp_path, tiny_llama)
    runs = []
    for name in given:
        api.run(resolve.validate({**given[name], "output_dir": str(tmp_path / "local" / name)}))
        for stage in range(3):
            engine = {"name": "deepspeed", "zero_stage": stage}
            runs.append({**given[name], "engine": engine, "output_dir": str(tmp_path / f"stage{stage}" / name)})
    talk("run_many.py", runs, 2)
    for run in runs:
        ours = Path(run["output_dir"])
        same_numbers(ours, tmp_path / "local" / ours.name)


def test_a_classifier_leaves_zero_3_on_one_process_as_it_leaves_the_local_engine(tmp_path):
    from safetensors.torch import load_file

    exported = []
    for engine in ({"name": "deepspeed", "zero_stage": 3}, {"name": "local"}):
        content = {
            "output_dir": str(tmp_path / engine["name"]),
            "model": {"name": "mlp", "hidden": [8]},
            "tasks": {"source": "digits", "train_limit": 8, "eval_limit": 4, "num_tasks": 2},
            "train": {"steps": 3, "optimizer": "sgd", "learning_rate": 0.1},
            "engine": engine,
        }
        talk("run_many.py", [content], 1)
        exported.append(load_file(tmp_path / engine["name"] / "export" / "model.safetensors"))
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.allclose(value, exported[1][name], atol=1e-5) for name, value in exported[0].items())


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("memo", {"engine": {"name": "deepspeed", "zero_stage": 3}}, r"does not run under ZeRO-3 \(it supports 0, 1, 2\)"),
])  # fmt: skip
def test_what_would_give_other_numbers_is_refused(tmp_path, tiny_llama, name, changes, message):
    given = {**contents(tmp_path, tiny_llama)[name], "engine": {"name": "deepspeed", "zero_stage": 1}, **changes}
    with pytest.raises(ClkitError, match=message):
        api.run(resolve.validate({**given, "output_dir": str(tmp_path / "run")}))


class _Two(LocalGroup):
    world = 2


def test_batch_statistics_on_several_processes_are_refused(tiny_llama, tmp_path):
    from clkit import build
    from clkit.engine.deepspeed import DeepSpeedEngine

    images = {"model": {"name": "cifar-resnet-8"}, "tasks": {"source": "digits", "flat": False}}
    config = resolve.validate({**contents(tmp_path, tiny_llama)["memo"], **images})
    model = build.make_model(config.model, build.make_tasks(config), 0, lambda text: None)
    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
    engine.group = _Two()
    with pytest.raises(CapabilityError, match="batch normalisation"):
        engine.prepare(model)
