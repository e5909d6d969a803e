"""Figures say what they are given to say, whatever letters it has."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import clkit
from clkit.cli import main
from clkit.report import load, render
from clkit.report.figures import Drawing, axis, legend_below
from clkit.result import RunResult
from clkit.tasks.base import LabelledExamples, Task, TaskSequence

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


def test_runs_of_twenty_tasks_are_small_enough_for_fifty_in_a_page(tmp_path):
    tasks = []
    for k in range(20):
        held = LabelledExamples(torch.randn(4, 8), torch.tensor([k] * 4), [f"{k}-{i}" for i in range(4)])
        tasks.append(Task(f"domain-{k}-of-the-sequence", held, held, "classification", "accuracy", (k,)))
    run_dir = clkit.fit(torch.nn.Linear(8, 20), TaskSequence(tasks), output_dir=tmp_path, train={"steps": 2}).run_dir
    results = [RunResult.load(run_dir) for _ in range(6)]
    few, many = (len(render(results[:count])[0]) for count in (2, 6))
    assert (many - few) / 4 < 5e6 / 50 * 0.95


def test_styles_of_many_figures_are_written_once_but_for_a_live_page(runs):
    results = [RunResult.load(run) for run in runs[:2]] * 3
    page, live = (render(results, live=live)[0] for live in (False, True))
    rules = dict(re.findall(r"\.(k\d+)\{([^}]*)\}", page[: page.index("</style>")]))
    drawn, styled = ("".join(re.findall("<svg .*?</svg>", text, re.DOTALL)) for text in (page, live))
    assert " style=" not in drawn
    assert [rules[name] for name in re.findall('class="([^"]*)"', drawn)] == re.findall(' style="([^"]*)"', styled)


@pytest.mark.parametrize(("count", "length"), [(5, 6), (8, 40), (12, 10), (20, 24), (40, 9)])
def test_legends_stand_within_their_figures_and_leave_room_for_the_lines(count, length):
    def draw(axes):
        for k in range(count):
            axes.plot([0, 1], [0, 1], label=f"{k} domain-of-tasks".ljust(length, "x")[:length])
        axis(axes, "optimiser steps", "accuracy")
        legend_below(axes, count)

    figure = Drawing("scores", "Scores", "", draw).figure()
    figure.draw_without_rendering()
    legend = figure.axes[0].get_legend()
    box, lowest = legend.get_window_extent(), min(text.get_window_extent().y0 for text in legend.get_texts())
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and lowest >= -2  # of the space below the letters
    assert figure.axes[0].get_window_extent().height > 90
    assert figure.axes[0].get_window_extent().width > 200
