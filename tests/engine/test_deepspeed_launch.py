"""`clkit run --num-processes`: one run in several processes, what it shows when one dies, and how it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import environment, talk

from clkit import api, resolve
from clkit.cli import main
from clkit.errors import ConfigError


def command(file: Path, count: int, *overrides: str) -> list[str]:
    processes = ["--num-processes", str(count)]
    return [sys.executable, "-m", "clkit.cli", "run", str(file), *overrides, *processes, "--quiet"]


@pytest.fixture
def file(text_content, tmp_path) -> Path:
    text_content["tasks"]["tasks"] = text_content["tasks"]["tasks"][:2]
    text_content["strategy"] = {"name": "reglora", "fraction": 0.1}
    text_content["train"]["epochs"] = 20
    text_content["eval"]["initial"] = False
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(text_content))
    return path


def steps_done(run_dir: Path) -> int:
    events = run_dir / "events.jsonl"
    return events.read_text().count('"event": "step"') if events.exists() else 0


def kill_second_process(parent: int) -> None:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            child = f"\nPPid:\t{parent}\n" in (entry / "status").read_text()
            second = "RANK=1" in (entry / "environ").read_text().split("\0")
        except OSError:
            continue
        if child and second:
            os.kill(int(entry.name), signal.SIGKILL)
            return
    raise AssertionError("there is no second process")


@pytest.mark.slow
@pytest.mark.kill
@pytest.mark.parametrize("stage", [2, 3])
def test_a_killed_process_ends_all_and_one_process_finishes_the_run_of_two(file, text_content, tmp_path, stage):
    overrides = ["engine=deepspeed", f"engine.zero_stage={stage}", f"output_dir={tmp_path / 'two'}"]
    run = subprocess.Popen(command(file, 2, *overrides), env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        while steps_done(tmp_path / "two") < 25:
            assert run.poll() is None, run.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        kill_second_process(run.pid)
        shown = run.communicate(timeout=90)[1]
    finally:
        run.kill()
    assert run.returncode == 1
    assert shown.count("process 1 was killed by SIGKILL") == 1, shown
    assert "Traceback" not in shown and "goes on from the last checkpoint" in shown

    resumed = subprocess.run(command(file, 1, *overrides), env=environment(), capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    local = api.run(resolve.validate({**text_content, "output_dir": str(tmp_path / "local")}))
    two = json.loads((tmp_path / "two" / "matrix.json").read_text())
    np.testing.assert_array_equal(np.array(two["matrix"], dtype=float), local.matrix)
    assert steps_done(tmp_path / "two") == steps_done(tmp_path / "local"), "no step is repeated in the record"


@pytest.mark.slow
def test_an_error_that_all_processes_meet_is_shown_once(file, tmp_path):
    overrides = ["engine=deepspeed", f"output_dir={tmp_path / 'two'}", "train.learning_rate=1e37", "train.clip=0"]
    run = subprocess.run(command(file, 2, *overrides), env=environment(), capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.count("is not finite in task 'red'") == 1, run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_a_process_that_is_done_ends_well_while_gloo_still_frees_a_tensor():
    assert talk("exit_worker.py", None, 2) == [{}, {}]


def test_several_processes_need_an_engine_for_several(file, capsys):
    assert main(["run", str(file), "--num-processes", "2"]) == 2
    assert "set engine=deepspeed" in capsys.readouterr().err
    assert main(["run", str(file), "--num-processes", "0"]) == 2
    assert "--num-processes: got 0, expected at least 1" in capsys.readouterr().err


def test_a_script_that_was_started_several_times_is_told_when_its_engine_is_for_one_process(
    text_content, tmp_path, monkeypatch
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"engine\.name: 'local' is for a single process, and the launcher started 2"):
        api.run(resolve.validate(text_content | {"output_dir": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()
