"""The same run by the local engine and by DeepSpeed, stages 0 to 3, on one and two processes: the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from processes import talk

from clkit import api, resolve
from clkit.checkpoint import read_checkpoint

STRATEGIES: dict[str, dict] = {
    "naive": {},
    "replay": {"replay": {"size": 12}},
    "joint": {},
    "olora": {"lambda2": 0.1},
    "ewc": {"examples": 4, "lam": 50.0},
    "lwf": {"replay": {"size": 12}},
    "ilora": {"replay": {"size": 12}},
    "reglora": {"fraction": 0.1, "lam": 5.0},
    "dp2unlearning": {},
}
M0 = {"name": "private", "noise_multiplier": 1.0, "unit": "record", "test_seed": 0}
# Small enough that every matrix of the tiny model is really split: DeepSpeed keeps small ones whole by default.
SPLIT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}}


@pytest.fixture(scope="module")
def content(tiny_llama, tmp_path_factory) -> dict:
    """Two tasks whose answers differ in length, so that processes get unequal numbers of targets; a last short batch."""
    folder = tmp_path_factory.mktemp("deepspeed")
    files = []
    for t, word in enumerate(("red", "blue")):
        rows = []
        for i in range(14):
            answer = "ab"[(i + t) % 2] * (1 + i % 3)
            rows.append(
                {"prompt": f"{word} {'x' * (i % 5)} {i}", "answer": answer, "options": [c * len(answer) for c in "ab"]}
            )
        file = folder / f"{word}.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        files.append(str(file))
    (folder / "split.json").write_text(json.dumps(SPLIT_ALL))
    return {
        "folder": str(folder),
        "model": {
            "name": str(tiny_llama),
            "dtype": "float32",
            "prompt": "plain",
            "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        },
        "tasks": {"source": "jsonl", "tasks": files, "eval_fraction": 0.34},
        "train": {"epochs": 1, "batch_size": 4, "learning_rate": 0.01, "clip": 0.5, "schedule": "linear"},
        "eval": {"max_new_tokens": 2, "initial": False, "also": ["perplexity"]},
        "checkpoint": {"every_steps": 0, "keep": 1},
        "tracking": {"log_every": 1},
    }


def run_of(content: dict, name: str, where: str, engine: dict, **train: object) -> dict:
    """``micro_batch`` also scores before training, when DeepSpeed has no optimiser yet."""
    parts = {k: v for k, v in content.items() if k != "folder"}
    base = {"base": f"{content['folder']}/m0/naive"} if name == "dp2unlearning" else {}
    return parts | {
        "output_dir": f"{content['folder']}/{where}/{name}",
        "strategy": {"name": name, **base, **STRATEGIES[name]},
        "engine": engine,
        "train": content["train"] | train,
        "eval": content["eval"] | {"initial": "micro_batch" in train},
    }


def deepspeed(content: dict, stage: int) -> dict:
    return {"name": "deepspeed", "zero_stage": stage, "config_file": f"{content['folder']}/split.json"}


@pytest.fixture(scope="module")
def local(content) -> dict:
    api.run(resolve.validate(run_of(content, "naive", "m0", M0)))
    for name in STRATEGIES:
        api.run(resolve.validate(run_of(content, name, "local", {"name": "local"})))
    return content


def steps(run_dir: Path) -> list[dict[str, float]]:
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    found = [e["losses"] for e in events if e["event"] == "step"]
    return found + [{e["name"]: e["value"]} for e in events if e["event"] == "value"]


def same_numbers(ours: Path, theirs: Path) -> None:
    assert len(steps(ours)) == len(steps(theirs)) >= 3
    for mine, yours in zip(steps(ours), steps(theirs), strict=True):
        assert mine == pytest.approx(yours, rel=1e-5, abs=1e-5)
    matrix = [np.array(json.loads((d / "matrix.json").read_text())["matrix"], dtype=float) for d in (ours, theirs)]
    assert np.isfinite(matrix[0][-1]).all()
    np.testing.assert_array_equal(*map(np.tril, matrix))  # what was learned; above only where `eval.initial` is on


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_losses_and_scores_do_not_depend_on_stage_and_processes(local, world):
    runs = [
        run_of(local, name, f"stage{stage}-{world}", deepspeed(local, stage))
        for stage in range(4)
        for name in STRATEGIES
    ]
    talk("run_many.py", runs, world)
    for run in runs:
        ours = Path(run["output_dir"])
        same_numbers(ours, Path(local["folder"], "local", ours.name))


@pytest.mark.slow
def test_micro_batches_small_parameters_and_offload_change_nothing(local):
    """Accumulation under every stage with DeepSpeed's defaults, and the optimiser's state and weights off the device."""
    runs = [
        run_of(local, "ilora", f"micro{stage}", {"name": "deepspeed", "zero_stage": stage}, micro_batch=1)
        for stage in (1, 2, 3)
    ]
    offload = {"name": "deepspeed", "offload_optimizer": "cpu"}
    runs += [
        run_of(local, "reglora", "offload2", {**offload, "zero_stage": 2}),
        run_of(local, "reglora", "offload3", {**offload, "zero_stage": 3, "offload_parameters": "cpu"}),
    ]
    talk("run_many.py", runs, 2)
    for run in runs:
        ours = Path(run["output_dir"])
        same_numbers(ours, Path(local["folder"], "local", ours.name))


@pytest.mark.slow
def test_a_checkpoint_is_the_same_whatever_wrote_it(local):
    """Weights, moments and what the strategy keeps, whole: so N processes can go on from what M wrote."""
    runs = [run_of(local, "reglora", f"state{stage}", deepspeed(local, stage)) for stage in (0, 2, 3)]
    talk("run_many.py", runs, 2)

    def newest(run_dir: Path) -> dict:
        return read_checkpoint(sorted((run_dir / "checkpoints").glob("[0-9]*"))[-1])

    expected = newest(Path(local["folder"], "local", "reglora"))
    for run in runs:
        found = newest(Path(run["output_dir"]))
        assert found["model"].keys() == expected["model"].keys()
        for name, value in expected["model"].items():
            assert found["model"][name].shape == value.shape
            np.testing.assert_allclose(found["model"][name], value, atol=1e-5)
        assert found["engine"]["optimizer"].keys() == expected["engine"]["optimizer"].keys()
        for index, moments in expected["engine"]["optimizer"].items():
            for key, value in moments.items():
                np.testing.assert_allclose(found["engine"]["optimizer"][index][key], value, atol=1e-5)
        exported = Path(run["output_dir"], "export")
        assert sorted(p.name for p in exported.iterdir()) == sorted(
            p.name for p in Path(local["folder"], "local", "reglora", "export").iterdir()
        )


@pytest.mark.slow
def test_half_precision_follows_the_local_engine(local):
    """A base in bfloat16, float32 adapters, autocast."""

    def typed(run: dict, dtype: str) -> dict:
        return run | {"model": local["model"] | {"dtype": dtype}}

    runs = []
    dtype = "bfloat16"
    api.run(resolve.validate(typed(run_of(local, "naive", f"{dtype}-local", {"name": "local"}), dtype)))
    for stage in (0, 2, 3):
        runs.append(typed(run_of(local, "naive", f"{dtype}-{stage}", deepspeed(local, stage)), dtype))
    talk("run_many.py", runs, 2)
    for run in runs:
        ours = Path(run["output_dir"])
        plain = Path(local["folder"], f"{run['model']['dtype']}-local", "naive")
        assert len(steps(ours)) == len(steps(plain)) >= 3
        for mine, yours in zip(steps(ours), steps(plain), strict=True):
            assert mine == pytest.approx(yours, rel=0.02)


@pytest.mark.slow
def test_recomputed_activations_change_nothing(content):
    """Adapters on a frozen base and all weights, with several passes per step, at every stage."""
    kinds = {"adapter": {}, "weights": {"lora": {"r": 0}}}

    def recomputed(kind: str, where: str, engine: dict, **model: object) -> dict:
        run = run_of(content, "replay", f"{where}/{kind}", engine, micro_batch=2)
        return run | {"model": content["model"] | kinds[kind] | model}

    for kind in kinds:
        api.run(resolve.validate(recomputed(kind, "kept", {"name": "local"})))
    runs = [
        recomputed(kind, f"recomputed{stage}", deepspeed(content, stage), gradient_checkpointing=True)
        for stage in range(4)
        for kind in kinds
    ]
    talk("run_many.py", runs, 2)
    for run in runs:
        ours = Path(run["output_dir"])
        same_numbers(ours, Path(content["folder"], "kept", *ours.parts[-2:]))


@pytest.mark.slow
def test_few_rehearsed_rows_change_nothing(content):
    """One rehearsed row beside four new ones: it goes through the model by itself."""
    options = {"ilora": {}, "lwf": {"rows": "replayed"}}

    def few(name: str, where: str, engine: dict) -> dict:
        run = run_of(content, name, where, engine, micro_batch=1)
        return run | {"strategy": {"name": name, "replay": {"size": 12, "ratio": 0.25}, **options[name]}}

    for name in options:
        api.run(resolve.validate(few(name, "few", {"name": "local"})))
    runs = [few(name, f"few{stage}", deepspeed(content, stage)) for stage in (0, 2) for name in options]
    talk("run_many.py", runs, 2)
    for run in runs:
        ours = Path(run["output_dir"])
        same_numbers(ours, Path(content["folder"], "few", ours.name))
