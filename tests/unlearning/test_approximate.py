"""Requests served from the deployed weights, and what is left on disk after a request."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from people import PEOPLE, digits, request, run
from safetensors.torch import load_file

from clkit.cli import main

LENIENT = ["--max-utility-loss", "99", "--max-membership", "1", "--max-extraction", "1"]


def unlearn(run_dir, file, *more):
    return main(["unlearn", "--run", str(run_dir), "--request", str(file), *LENIENT, *more])


def certificate(run_dir) -> tuple[dict, Path]:
    (path,) = (run_dir.parent / "unlearning").glob("*/certificate.json")
    content = json.loads(path.read_text())
    return content, (path.parent / content["new_run"]["path"]).resolve()


def test_it_starts_from_the_deployed_weights_and_says_what_it_read(people_content, write, tmp_path, capsys):
    run_dir = run(people_content, tmp_path)
    file = write(request({"subject_ids": [PEOPLE[0]]}))
    assert unlearn(run_dir, file, "--method", "npo", "--set", "epochs=1", "learning_rate=1e-12") == 0
    content, new_run = certificate(run_dir)
    assert content["method"]["options"]["epochs"] == 1 and content["method"]["guarantee"].startswith("No guarantee")
    figures = {f["name"]: f["figures"] for f in content["verification"]}
    assert figures["retained_only"]["rows_of_other_records"] > 0, "it has to read what it pushes down"
    old, new = (load_file(p / "export" / "adapter_model.safetensors") for p in (run_dir, new_run))
    assert all(torch.allclose(old[k], new[k], atol=1e-6) for k in old)
    assert main(["eval", str(new_run)]) == 0, "it opens like any run"
    capsys.readouterr()
    second = write(request({"subject_ids": [PEOPLE[1]]}, request_id="R-2"), name="second.json")
    assert unlearn(new_run, second) == 2
    assert "began with the weights of another run" in capsys.readouterr().err


def test_options_that_are_wrong_and_tasks_that_it_can_not_unlearn_are_refused(digits_run, digit_ids, write, capsys):
    file = write(request({"record_ids": digit_ids[:2]}))
    cases = {
        "beta: out of range": ["--method", "npo", "--set", "beta=0"],
        "unknown key": ["--method", "npo", "--set", "bata=1"],
        "does not unlearn tasks of kind classification": ["--method", "idk"],
        "forget_tasks: is for runs": ["--method", "kl", "--set", "forget_tasks=[a]"],
    }
    for what, more in cases.items():
        assert unlearn(digits_run, file, *more) == 2
        assert what in capsys.readouterr().err


def test_the_same_epochs_control_trains_for_half_as_long(digits_run, digit_ids, write):
    file = write(request({"record_ids": digit_ids[:2]}))
    assert unlearn(digits_run, file, "--method", "retrain_same_epochs") == 0
    new_run = certificate(digits_run)[1]
    steps = [json.loads(line) for line in (new_run / "events.jsonl").read_text().splitlines()]
    assert [e["steps"] for e in steps if e["event"] == "task"] == [2] * 5


def test_features_of_forgotten_inputs_are_listed_and_purged(tmp_path, digit_ids, computed, write, capsys):
    content = digits(
        tmp_path,
        model={"name": "cifar-resnet-8", "freeze_backbone": True},
        tasks={"source": "digits", "train_limit": 12, "eval_limit": 6, "flat": False},
    )
    run_dir = run(content, tmp_path)
    other = run({**content, "output_dir": str(tmp_path / "runs" / "beside")}, tmp_path)
    before = set(computed.glob("*/*.safetensors"))
    capsys.readouterr()
    assert unlearn(run_dir, write(request({"record_ids": digit_ids[:2]})), "--purge") == 0
    superseded = certificate(run_dir)[0]["superseded"]
    assert superseded["still_there"] == ["checkpoints", "export", "samples.json", "report.html"]
    assert superseded["other_runs_begun_before"] == [other.name]
    listed = {computed / name for name in superseded["cached_features"]}
    assert listed and listed < before, "those of the second task, and no more"
    assert not any(path.exists() for path in listed) and all(path.exists() for path in before - listed)
    assert f"left: {other}" in capsys.readouterr().out
    assert main(["eval", str(certificate(run_dir)[1])]) == 0, "what is missing is computed again"
