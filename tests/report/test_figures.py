"""Figures say what they are given to say, whatever letters it has."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from clkit.cli import main
from clkit.report import load, render
from clkit.result import RunResult

NAMES = ["US$ to C$", r"a_$\frac$", "_rest"]


def renamed(source, target):
    """The run with other names of its tasks."""
    shutil.copytree(source, target)
    old = json.loads((target / "matrix.json").read_text())["tasks"]
    for name in ("matrix.json", "events.jsonl"):
        text = (target / name).read_text()
        for before, after in zip(old, NAMES, strict=True):
            text = text.replace(f'"{before}"', json.dumps(after))
        (target / name).write_text(text)
    return target


@pytest.fixture(scope="module")
def run_dir(runs, tmp_path_factory):
    return renamed(runs[0], tmp_path_factory.mktemp("names") / "run")


def seen(drawing):
    """The texts of a figure, without shapes and attributes."""
    return [t.strip() for t in re.findall(r">([^<>]+)</text>", drawing.svg("f"))]


def test_names_with_dollar_signs_are_no_formulas_and_those_with_an_underscore_stand_in_legends(run_dir):
    drawn = {d.name.rpartition("-")[2]: seen(d) for d in render(load([run_dir])[0])[1]}
    assert all(name in drawn["scores"] for name in NAMES)
    assert all(name in drawn["matrix"] for name in NAMES) and f"after {NAMES[0]}" in drawn["matrix"]
    assert all(name in drawn["forgetting"] for name in NAMES[:2])


def test_plots_of_a_notebook_take_such_names_too(run_dir):
    result = RunResult.load(run_dir)
    for draw in (result.plot.matrix, result.plot.scores, result.plot.forgetting):
        draw().figure.canvas.draw()


def test_settings_with_dollar_signs_are_compared(runs, run_dir):
    results = [replace(RunResult.load(run), name=name) for run, name in zip(runs[::2], ("a $x$", "b $x"), strict=True)]
    for result in results:
        result.run_dir = None
    drawn = {d.name: seen(d) for d in render(results)[1]}
    assert {"a $x$", "b $x"} <= set(drawn["compare-average_accuracy"])
    assert {"1 a $x$", "2 b $x"} <= set(drawn["compare-pareto-forgetting"])
    assert "b $x" in drawn["compare-setting-2"] and "b $x" in drawn["compare-paired-forgetting"]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_runs_that_are_all_unknown_are_compared(runs):
    results = [RunResult.load(run) for run in runs[:2]]
    for result in results:
        result.matrix[:] = np.inf
        result.metrics = {}
    assert "2 runs of 2 settings" in render(results)[0]
    result = RunResult.load(runs[2])  # one of two seeds: the mean of its setting is unknown after every task
    assert "2 runs of 1 settings" in render([results[0], result])[0]


def test_a_run_that_is_named_twice_counts_once(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(runs[0].parent)
    assert main(["report", runs[2].name, "--sweep", ".", "--output", str(tmp_path / "r.html"), "--no-figures"]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "4 runs of 2 settings" in page
    assert [r.run_dir.name for r in load([runs[1], runs[0], runs[1]])[0]] == [runs[1].name, runs[0].name]
