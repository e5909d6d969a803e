"""A run that is SIGKILLed again and again ends with the same bits as one that never was."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from clkit.checkpoint import read_checkpoint

KILLS = 20
PRELOAD = [
    "torch",
    "transformers",
    "peft",
    "clkit.api",
    "clkit.cli",
    "clkit.strategies.replay",
    "clkit.tasks.jsonl",
    "clkit.tasks.digits",
]

# Places where a process dies in the middle of what it does: module, class or None, function, which call of it.
PLACES = [
    ("clkit.checkpoint", None, "_save_tensors", 3),
    ("clkit.checkpoint", None, "_sync", 7),
    ("clkit.trainer", None, "evaluate_all", 5),
    ("clkit.strategy", "Strategy", "begin_task", 1),
    ("clkit.strategy", "Strategy", "end_task", 1),
    ("clkit.strategy", "Strategy", "after_backward", 3),
    ("clkit.result", "RunResult", "save", 1),
]


def _run(config: str, log: str, place: tuple | None) -> None:
    """The process that is killed: `clkit run CONFIG`, dying at ``place`` if one is given."""
    import importlib

    import torch

    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if place is not None:
        module, owner, name, at = place
        target = importlib.import_module(module)
        target = getattr(target, owner) if owner else target
        plain, calls = getattr(target, name), 0

        def dying(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **kwargs)

        setattr(target, name, dying)
    from clkit.cli import main

    sys.exit(main(["run", config, "--quiet"]))


class Killer:
    def __init__(self, tmp_path: Path) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.log = tmp_path / "log.txt"

    def start(self, config: Path, place: tuple | None = None):
        process = self.context.Process(target=_run, args=(str(config), str(self.log), place))
        process.start()
        return process

    def finish(self, config: Path) -> None:
        process = self.start(config)
        process.join(300)
        assert process.exitcode == 0, self.log.read_text()


def outcome(run_dir: Path):
    newest = sorted((run_dir / "checkpoints").glob("[0-9]*"))[-1]
    state = read_checkpoint(newest)
    files = {f: (run_dir / f).read_bytes() for f in ("metrics.json", "matrix.json")}
    files["matrix.json"] = files["matrix.json"].replace(str(run_dir).encode(), b"")
    steps = [
        line.split('"time"')[0] for line in (run_dir / "events.jsonl").read_text().splitlines() if '"step"' in line
    ]
    return files, state, steps


def assert_same(ours, theirs):
    import torch

    assert ours[0] == theirs[0]
    assert ours[2] == theirs[2], "events differ: something was done twice or lost"

    def walk(a, b, where):
        assert type(a) is type(b), where
        if isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                walk(a[key], b[key], f"{where}/{key}")
        elif isinstance(a, list):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                walk(x, y, f"{where}/{i}")
        elif isinstance(a, torch.Tensor):
            assert torch.equal(
                a.nan_to_num(-1) if a.is_floating_point() else a, b.nan_to_num(-1) if b.is_floating_point() else b
            ), where
        else:
            assert a == b, where

    walk({k: v for k, v in ours[1].items() if k != "events"}, {k: v for k, v in theirs[1].items() if k != "events"}, "")


@pytest.mark.kill
@pytest.mark.parametrize("world", ["text_content", "vision_content"])
def test_twenty_sigkills_leave_no_trace_in_weights_metrics_and_events(world, request, tmp_path):
    content = request.getfixturevalue(world)
    content["strategy"] = {"name": "replay", "replay": {"size": 8}}
    content["train"] = {**content["train"], "epochs": 3}
    content["name"] = "killed or not"

    def config(name: str) -> Path:
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**content, "output_dir": str(tmp_path / name)}))
        return file

    killer = Killer(tmp_path)
    since = time.monotonic()
    killer.finish(config("whole"))
    duration = time.monotonic() - since
    whole = outcome(tmp_path / "whole")

    draw = random.Random(0)
    plan: list[tuple | None] = [*PLACES, *[None] * (KILLS - len(PLACES))]
    draw.shuffle(plan)
    killed = 0
    while killed < KILLS:
        process = killer.start(config("killed"), plan[killed])
        if plan[killed] is None:
            process.join(draw.uniform(0.05, 1.0) * duration)
            process.kill()
        process.join(300)
        if process.exitcode == -signal.SIGKILL:
            killed += 1
            continue
        # It got to the end first: the result must be right, and the killing goes on with a new run.
        assert process.exitcode == 0, killer.log.read_text()
        assert_same(outcome(tmp_path / "killed"), whole)
        shutil.rmtree(tmp_path / "killed")
    killer.finish(config("killed"))
    assert_same(outcome(tmp_path / "killed"), whole)
