"""Runs that edit: each edit's line in the events, how all stand after each task, and their page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clkit import api, resolve
from clkit.editing import Editor
from clkit.editing.request import read_requests
from clkit.loop import StepLoop
from clkit.plan import describe
from clkit.report import write_report
from clkit.report.history import History
from clkit.report.sections import Edits

QUICK = {
    "wise": {"layer": "0", "steps": 4, "contexts": 0, "negatives": 1, "merge_every": 0, "shard_size": 4},
    "grace": {"layer": "0", "steps": 4},
    "in_context": {"layer": "0"},
    "ft_layer": {"layer": "0", "steps": 2, "contexts": 0},
}


class Cut(Exception):
    """Stands for a process that ends here."""


def config(content, name, **options):
    return resolve.validate({**content, "strategy": {"name": name, **QUICK[name]}, **options})


def noted(result):
    """The lines about edits, without what the clock says."""
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("time", "seconds")}
        for line in (result.run_dir / "events.jsonl").read_text().splitlines()
        if json.loads(line)["event"] in ("edit", "edits")
    ]


@pytest.mark.parametrize("name", QUICK)
def test_a_run_writes_down_what_the_editor_writes_into_its_journal(name, edit_content, tmp_path):
    result = api.run(config(edit_content, name))
    events = noted(result)
    assert [e["id"] for e in events if e["event"] == "edit"] == [f"{t}-{i}" for t in range(2) for i in range(3)]
    assert [(e["edits"], "rows" in e) for e in events if e["event"] == "edits"] == [(3, False), (6, True)]
    editor = Editor.load(
        edit_content["model"]["name"], {"name": name, **QUICK[name]}, device="cpu", prompt="plain", dtype="float32"
    )
    editor.edit([r for file in edit_content["tasks"]["tasks"] for r in read_requests(Path(file))])
    for ours, theirs in zip((e for e in events if e["event"] == "edit"), editor.journal.entries, strict=True):
        for key in ("id", "request", "before", "after", "memory", "steps"):
            assert ours[key] == theirs[key], key
        assert ours.get("routes", {}).keys() == theirs.get("routes", {}).keys()


def test_what_a_run_costs_are_the_numbers_that_its_edits_keep(edit_content, tmp_path):
    costs = {}
    for name in ("ft_layer", "grace"):
        result = api.run(config(edit_content, name, output_dir=str(tmp_path / name)))
        lines = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
        costs[name] = [e["trainable_parameters"] for e in lines if e["event"] == "cost"]
    assert len(set(costs["ft_layer"])) == 1 and costs["ft_layer"][0] > 0  # one layer, however many edits
    first, second = costs["grace"]  # keys and values of three edits, then of six
    assert 0 < first < second < costs["ft_layer"][0]


def test_validate_says_that_edits_train_none_of_the_weights(edit_content):
    text = describe(config(edit_content, "grace"))
    assert "6 edits, one after another" in text and "35,104 parameters, none of them trained" in text
    assert "optimiser" not in text and "gradients" not in text


def test_a_run_that_was_cut_writes_every_edit_down_once(edit_content, tmp_path, monkeypatch):
    whole = api.run(config(edit_content, "grace", output_dir=str(tmp_path / "whole")))
    cut = config(edit_content, "grace", output_dir=str(tmp_path / "cut"))
    plain, done = StepLoop.done, []

    def step(self, losses):
        done.append(losses)
        if len(done) in (3, 5):  # the edit is written down, and no checkpoint has it
            raise Cut
        plain(self, losses)

    monkeypatch.setattr(StepLoop, "done", step)
    for _ in range(2):
        with pytest.raises(Cut):
            api.run(cut)
    assert noted(api.run(cut)) == noted(whole)


@pytest.mark.parametrize("name", QUICK)
def test_the_page_of_a_run_shows_scores_along_the_edits_routes_and_journal(name, edit_content, tmp_path):
    result = api.run(config(edit_content, name))
    edits = Edits.of_run(result.run_dir, History.read(result.run_dir))
    titles = [d.title for d in edits.drawings("e")]
    assert titles[:3] == [
        "Score right after each edit",
        "Score of all edits so far",
        "Score with all 6 edits in the model",
    ]
    assert ("Routing of queries" in titles) == (name != "ft_layer")
    write_report([result], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "Town 0 of 0?" in text and "6 edits" in text and all(t in text for t in titles)
    cards = text.partition('<dl class="cards">')[2].partition("</dl>")[0]
    for label, mean in edits.standing[-1]["means"].items():
        assert f"<dt>{label}</dt><dd>{mean:.4f}<small>of all edits, at the end" in cards
    if name != "ft_layer":
        label, by_memory, base = edits.answered[0]
        assert label == "reliability" and by_memory + base == 6 and by_memory >= 5
