"""Runs of a sweep: done once, resumed, reported, shared, whatever starts them."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clkit.cli import main
from clkit.rundir import RunDirectory
from clkit.sweep.config import LauncherConfig
from clkit.sweep.launchers import environment
from clkit.sweep.worker import Outcome

LOCAL = {"name": "local", "jobs": 2, "threads": 1}


def results(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("metrics.json"))}


def times(folder: Path) -> dict[str, float]:
    return {str(p.relative_to(folder)): p.stat().st_mtime for p in folder.rglob("metrics.json")}


def test_a_sweep_does_its_runs_once_and_says_a_line_for_each(write, sweep_content, tmp_path, capsys):
    file = write(sweep_content)
    assert main(["sweep", file, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count(" new ") == 4 and out.endswith("4 runs: 2 settings x 2 seeds\n")
    assert not (tmp_path / "sweep").exists(), "a dry run writes nothing"

    assert main(["sweep", file]) == 0
    out, err = capsys.readouterr()
    assert "tiny: 4 runs, 0 finished, 0 failed before, 4 to do" in err and "\r" not in err
    assert [line.split("]")[0] for line in err.splitlines()[1:]] == [f"[{i}/4" for i in (1, 2, 3, 4)]
    assert "### Strategies against each other" in out and "summary.tex" in out
    here = tmp_path / "sweep" / "naive" / "seed-0"
    assert {"config.yaml", "run.json", "status.json", "events.jsonl", "matrix.json", "export"} <= {
        p.name for p in here.iterdir()
    }
    cost = RunDirectory(here).state["cost"]
    assert cost["cpu_seconds"] > 0 and cost["peak_memory_bytes"] > 2**20
    holds = RunDirectory(tmp_path / "sweep" / "replay,size=8" / "seed-0").state["holds"]
    assert holds == {"trained_parameters": 64 * 8 + 8 + 8 * 10 + 10, "exemplars": 8, "exemplar_bytes": 8 * 64 * 4}

    before = times(tmp_path / "sweep")
    assert main(["sweep", file]) == 0
    assert "4 finished, 0 failed before, 0 to do" in capsys.readouterr().err
    assert main(["sweep", file, "--dry-run"]) == 0
    assert capsys.readouterr().out.count(" finished ") == 4
    assert times(tmp_path / "sweep") == before


def test_a_directory_with_another_run_is_an_error_before_anything_starts(write, sweep_content, tmp_path, capsys):
    assert main(["sweep", write(sweep_content), "sweep.seeds=1"]) == 0
    capsys.readouterr()
    assert main(["sweep", write(sweep_content), "train.epochs=2"]) == 2
    err = capsys.readouterr().err
    assert "train.epochs: 1 -> 2" in err and "choose another output_dir" in err
    assert len(results(tmp_path / "sweep")) == 2


def test_a_failed_run_is_reported_with_exit_code_3_and_done_again_on_request_only(
    write, sweep_content, tmp_path, capsys
):
    sweep_content["train"]["learning_rate"] = 1e30  # the loss is not finite
    sweep_content["train"] |= {"clip": 0, "epochs": 3}
    file = write(sweep_content)
    arguments = ["sweep", file, "sweep.seeds=1", "sweep.axes.strategy=[naive]"]
    assert main(arguments) == 3
    err = capsys.readouterr().err
    assert "1 runs failed; --retry-failed" in err and "not finite" in err
    assert main(arguments) == 3
    assert "1 failed before, 0 to do" in capsys.readouterr().err
    assert main([*arguments, "--retry-failed"]) == 3
    assert "0 failed before, 1 to do" in capsys.readouterr().err


def test_summary_reprints_the_tables(write, sweep_content, tmp_path, capsys):
    assert main(["sweep", write(sweep_content), "--quiet"]) == 0
    first = capsys.readouterr().out
    assert main(["sweep", "--summary", str(tmp_path / "sweep")]) == 0
    assert capsys.readouterr().out == first
    assert main(["sweep", "--summary", str(tmp_path)]) == 2
    assert "no sweep here" in capsys.readouterr().err
    assert main(["sweep"]) == 2 and main(["sweep", "x.yaml", "--summary", "y"]) == 2


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    out = capsys.readouterr().out
    assert "--dry-run" in out and "clkit sweep --summary runs/my_sweep" in out and "exit code" in out


@pytest.mark.slow
def test_local_processes_give_the_numbers_of_this_process_and_keep_a_log_each(write, sweep_content, tmp_path):
    assert main(["sweep", write(sweep_content), "--quiet"]) == 0
    here = results(tmp_path / "sweep")
    sweep_content |= {"output_dir": str(tmp_path / "local")}
    sweep_content["sweep"]["launcher"] = LOCAL
    assert main(["sweep", write(sweep_content), "--quiet"]) == 0
    assert results(tmp_path / "local") == here
    assert len(list((tmp_path / "local").rglob("log.txt"))) == 4


@pytest.mark.slow
def test_submitits_local_executor_gives_the_same_numbers(write, sweep_content, tmp_path):
    pytest.importorskip("submitit")
    assert main(["sweep", write(sweep_content), "sweep.seeds=1", "--quiet"]) == 0
    here = results(tmp_path / "sweep")
    sweep_content |= {"output_dir": str(tmp_path / "jobs")}
    sweep_content["sweep"]["launcher"] = {"name": "slurm", "cluster": "local", "jobs": 2, "minutes": 5}
    assert main(["sweep", write(sweep_content), "sweep.seeds=1", "--quiet"]) == 0
    assert results(tmp_path / "jobs") == here
    assert list((tmp_path / "jobs" / "jobs").glob("*_result.pkl")), "submitit did it"


def test_a_job_that_is_cancelled_is_a_failed_run_and_the_others_go_on(
    write, sweep_content, tmp_path, monkeypatch, capsys
):
    submitit = pytest.importorskip("submitit")

    class Cancelled:
        """A job that Slurm told to stop, as its worker answers then."""

        job_id = "7"

        def done(self):
            return True

        def result(self):
            return Outcome("interrupted")

    start = submitit.AutoExecutor.map_array
    monkeypatch.setattr(
        submitit.AutoExecutor, "map_array", lambda self, job, specs: [Cancelled(), *start(self, job, specs[1:])]
    )
    sweep_content["sweep"]["launcher"] = {"name": "slurm", "cluster": "local", "jobs": 9, "minutes": 5}
    assert main(["sweep", write(sweep_content)]) == 3
    said = capsys.readouterr()
    assert "1 runs failed" in said.err and "job 7: was told to stop" in said.err and "### All settings" in said.out


def test_slurm_where_there_is_none_is_an_error_that_says_so(write, sweep_content, monkeypatch, capsys, tmp_path):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["sweep", write(sweep_content), "sweep.launcher=slurm"]) == 2
    assert "sweep.launcher: " in capsys.readouterr().err


@pytest.mark.parametrize(("gib", "code"), [(0.5, 1), (0, 0)])
def test_a_process_above_its_memory_limit_fails_to_allocate(gib, code):
    program = f"from clkit.sweep.worker import limit_memory; limit_memory({gib}); bytearray(2**30)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code and ("MemoryError" in done.stderr) == bool(code)


@pytest.mark.slow
def test_a_run_above_the_memory_limit_fails_and_the_others_go_on(write, sweep_content, tmp_path, capsys):
    sweep_content["sweep"] = {
        "axes": {"model.hidden": [[8], [12_000_000], [16]]},  # the second needs 3 GB for its first layer
        "seeds": 1,
        "launcher": LOCAL | {"jobs": 1, "memory_gib": 2},
    }
    assert main(["sweep", write(sweep_content)]) == 3
    err = capsys.readouterr().err
    why = "failed: needs more than the 2 GiB of sweep.launcher.memory_gib"
    assert f"[2/3] hidden=12000000 seed 0: {why}" in err and "1 runs failed" in err
    assert len(results(tmp_path / "sweep")) == 2


def test_workers_see_their_threads_and_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = environment(LauncherConfig(threads=3, gpus=2), slot=1)
    assert found["OMP_NUM_THREADS"] == "3" and found["CUDA_VISIBLE_DEVICES"] == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert environment(LauncherConfig(gpus=2), slot=1)["CUDA_VISIBLE_DEVICES"] == "6,7"


def start(file: str, *arguments: str, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "clkit.cli", "sweep", file, *arguments]
    # A job in the background ignores Ctrl-C, and its children do too.
    hears = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, stdout=log.open("ab"), stderr=subprocess.STDOUT, preexec_fn=hears)


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(FileNotFoundError):  # a checkpoint was renamed while its directory was listed
            if condition():
                return
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


@pytest.fixture
def long_content(sweep_content):
    """Runs of a few seconds, saved after every step, in one process beside the sweep's."""
    sweep_content["tasks"] |= {"train_limit": 100}
    sweep_content["train"] |= {"epochs": 6}
    sweep_content["checkpoint"] = {"every_steps": 10}
    sweep_content["sweep"]["launcher"] = LOCAL | {"jobs": 1}
    return sweep_content


@pytest.mark.kill
@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_where_it_was(write, long_content, tmp_path):
    folder, log = tmp_path / "sweep", tmp_path / "log.txt"
    file = write(long_content)
    process = start(file, log=log)
    until(lambda: len(results(folder)) >= 1 and len(list(folder.rglob("checkpoints/*"))) >= 3)
    process.kill()
    process.wait()
    worked = [RunDirectory(p.parent) for p in folder.rglob("config.yaml")]
    until(lambda: all(d.state.get("state") in ("finished", "interrupted") for d in worked))
    before = times(folder)
    assert 1 <= len(before) < 4, log.read_text()
    assert start(file, log=log).wait(300) == 0, log.read_text()
    assert len(results(folder)) == 4
    assert {k: v for k, v in times(folder).items() if k in before} == before, "finished runs are not done again"

    long_content |= {"output_dir": str(tmp_path / "whole")}
    long_content["sweep"]["launcher"] = {"name": "in-process"}
    assert main(["sweep", write(long_content), "--quiet"]) == 0
    assert results(tmp_path / "whole") == results(folder)


@pytest.mark.kill
@pytest.mark.slow
def test_ctrl_c_saves_what_is_going_on_and_exits_130(write, long_content, tmp_path):
    folder, log = tmp_path / "sweep", tmp_path / "log.txt"
    process = start(write(long_content), log=log)
    until(lambda: list(folder.rglob("checkpoints/*")))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, log.read_text()
    states = [RunDirectory(p.parent).state.get("state") for p in folder.rglob("config.yaml")]
    assert "running" not in states and len(results(folder)) < 4


@pytest.mark.kill
@pytest.mark.slow
def test_two_sweeps_in_one_directory_share_the_runs(write, long_content, tmp_path):
    folder, logs = tmp_path / "sweep", [tmp_path / "a.txt", tmp_path / "b.txt"]
    file = write(long_content)
    both = [start(file, log=log) for log in logs]
    assert [process.wait(300) for process in both] == [0, 0], [log.read_text() for log in logs]
    assert len(results(folder)) == 4
    for events in folder.rglob("events.jsonl"):
        stages = [e["name"] for e in map(json.loads, events.read_text().splitlines()) if e["event"] == "task"]
        assert len(stages) == len(set(stages)) == 5, "a stage was learned twice"
    summaries = [log.read_text().partition("### All settings")[2] for log in logs]
    assert summaries[0] and summaries[0] == summaries[1]
