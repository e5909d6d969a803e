"""Private training on two processes: the numbers of one, one noise, one secret, one account."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from processes import talk
from safetensors.torch import load_file

from clkit import api, resolve
from clkit.engine.guarantee import FILE

CASES: dict[str, dict] = {
    "hooks": {"engine": {"per_unit": "hooks"}, "train": {"micro_batch": 2}},
    "loop": {"engine": {"per_unit": "loop"}},
    "ghost": {"engine": {"per_unit": "ghost"}, "model": {"lora": {"r": 0}}},
    "subjects": {"engine": {"unit": "subject"}, "train": {"micro_batch": 1}},
    "few": {"train": {"batch_size": 1}},  # batches of fewer units than processes, and empty ones
}


@pytest.fixture(scope="module")
def runs(tiny_llama, tmp_path_factory):
    """Each case as a function of the folder it runs in; records of unequal length by people with one to four."""
    data = tmp_path_factory.mktemp("private")
    for name in ("train", "test"):
        rows = [{"prompt": f"say {i}", "answer": "ab " * (1 + i % 4), "subject": "wxyz"[i // 4]} for i in range(13)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def of(folder: str) -> list[dict]:
        lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
        return [
            {
                "output_dir": str(data / folder / name),
                "model": {"name": str(tiny_llama), "dtype": "float32", "prompt": "plain", "lora": lora}
                | case.get("model", {}),
                "tasks": {"source": "jsonl", "tasks": [str(data)], "metric": "perplexity"},
                "strategy": "naive",
                "engine": {"name": "private", "noise_multiplier": 0.5, "accountant": "rdp", "device": "cpu"}
                | {"test_seed": 3}
                | case.get("engine", {}),
                "train": {"steps": 6, "batch_size": 5, "learning_rate": 0.01, "clip": 0.3} | case.get("train", {}),
                "tracking": {"log_every": 1},
                "eval": {"initial": False},
            }
            for name, case in CASES.items()
        ]

    return of


def end_of(run: dict) -> tuple[dict, dict]:
    folder = Path(run["output_dir"])
    newest = sorted((folder / "checkpoints").glob("[0-9]*"))[-1]
    return load_file(newest / "state.safetensors"), json.loads((folder / "run.json").read_text())["privacy"]


@pytest.mark.slow
def test_two_processes_give_the_numbers_and_the_account_of_one(runs):
    for run in runs("one"):
        api.run(resolve.validate(run))
    talk("run_many.py", runs("two"), 2)
    for one, two in zip(runs("one"), runs("two"), strict=True):
        (weights, facts), (others, found) = end_of(one), end_of(two)
        trained = [k for k in weights if k.startswith("/model/")]
        assert trained
        for key in trained:
            np.testing.assert_allclose(others[key], weights[key], atol=1e-5, rtol=0)
        assert found == facts and sum(steps for _, _, steps in facts["spent"]) == 6
        files = [Path(run["output_dir"], FILE).read_text() for run in (one, two)]
        assert files[0] == files[1] and files[0].count("\n") == 6, "each step is written down once"


@pytest.mark.slow
def test_processes_share_a_secret_batch_and_add_one_noise(tmp_path):
    content = {
        "output_dir": str(tmp_path / "run"),
        "model": {"name": "mlp", "hidden": [8]},
        "tasks": {"source": "digits", "train_limit": 12, "eval_limit": 6},
        "train": {"batch_size": 4},
    }
    first, second = talk("private_worker.py", content, 2)
    assert first["drawn"] == second["drawn"] and first["spent"] == second["spent"]
    assert first["moved"] == second["moved"] and first["noise"] == second["noise"], "the weights stay the same"
    assert first["std"] == pytest.approx(2.0 * 0.5 / 4, rel=0.02), "that of one noise, not of two"
    again, _ = talk("private_worker.py", content, 2)
    assert again["drawn"] != first["drawn"] and again["noise"] != first["noise"], "another run has another secret"
