"""SISA: shards that held nothing forgotten are taken as they are, and the whole is that of a run without the records."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from people import PEOPLE, request, run, served
from safetensors.torch import load_file

from clkit import resolve
from clkit.cli import main
from clkit.strategies.unlearning.sisa import Sisa

LENIENT = ["--max-utility-loss", "99", "--max-membership", "1", "--max-extraction", "1"]


@pytest.fixture
def content(people_content):
    """Two shards, merged by their sum; a schedule, which must not go from one to the other."""
    train = {**people_content["train"], "schedule": "linear", "epochs": 2}
    return {**people_content, "train": train, "strategy": {"name": "ties", "method": "task-arithmetic"}}


def unlearn(run_dir, file, *more):
    return main(["unlearn", "--run", str(run_dir), "--request", str(file), *LENIENT, *more])


def steps_of(run_dir):
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [e["steps"] for e in events if e["event"] == "task"]


@pytest.mark.parametrize(("person", "steps"), [(PEOPLE[0], [True, False]), (PEOPLE[2], [False, True])])
def test_only_the_shards_that_held_the_records_are_learned_and_the_rest_is_what_retraining_gives(
    person, steps, content, tmp_path
):
    scope = {"subject_ids": [person]}
    ours, certificate = served(content, tmp_path / "sisa", scope, "sisa", *LENIENT)
    theirs, _ = served(content, tmp_path / "retrain", scope, "retrain", *LENIENT)
    assert [bool(n) for n in steps_of(ours)] == steps and all(steps_of(theirs))
    assert certificate["method"]["guarantee"].startswith("1 of 2 shards are learned again")
    figures = {f["name"]: f["figures"] for f in certificate["verification"]}
    assert figures["retained_only"]["rows_of_other_records"] == 0
    weights = [load_file(p / "export" / "model.safetensors") for p in (ours, theirs)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[1]), "bit for bit"
    assert main(["eval", str(ours)]) == 0, "it opens like any run"


def test_a_second_request_goes_to_the_run_with_all_shards_and_takes_both_people_out(content, tmp_path, write, capsys):
    run_dir = run(content, tmp_path)
    first = write(request({"subject_ids": [PEOPLE[0]]}))
    assert unlearn(run_dir, first, "--method", "sisa") == 0
    second = write(request({"subject_ids": [PEOPLE[2]]}, request_id="R-2"), name="second.json")
    capsys.readouterr()
    assert main(["unlearn", "--run", str(run_dir), "--request", str(second), "--plan"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.strip("* ").startswith("sisa:")]
    assert "2 of 2 shards are learned again" in line and "100% of retraining" in line


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"strategy": "naive"}, "only a run of `ties` with start=base has shards"),
        ({"strategy": {"name": "ties", "start": "previous"}}, "only a run of `ties` with start=base has shards"),
        ({"train": {"epochs": 1, "batch_size": 4, "reset_optimizer": False}}, "moments went from task to task"),
        ({"train": {"epochs": 1, "batch_size": 4, "schedule_scope": "run"}}, "has another length now"),
        ({"strategy": {"name": "ties", "replay": {"size": 2}}}, "exemplars of one task were learned with another"),
    ],
)
def test_a_run_whose_shards_know_of_each_other_is_refused(changes, what, content):
    found = Sisa().check(SimpleNamespace(config=resolve.validate({**content, **changes})))
    assert what in " ".join(map(str, found))


def test_without_its_last_checkpoint_there_are_no_shards_to_take(content, tmp_path, write, capsys):
    run_dir = run(content, tmp_path)
    shutil.rmtree(run_dir / "checkpoints")
    assert unlearn(run_dir, write(request({"subject_ids": [PEOPLE[0]]})), "--method", "sisa") == 2
    assert "no checkpoint of its end" in capsys.readouterr().err
