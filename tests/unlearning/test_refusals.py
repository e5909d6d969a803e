"""What `clkit unlearn` can't serve: exit code 2, words that say why, and a ledger in which nothing is forgotten."""

import json
from pathlib import Path

import pytest
from people import PEOPLE, nothing_forgotten, request, run

from clkit import api
from clkit.cli import main
from clkit.unlearning.ledger import Ledger

LENIENT = ["--max-utility-loss", "1", "--max-membership", "1", "--max-extraction", "1"]


def unlearn(run_dir: Path, file: Path, *more: str) -> int:
    return main(["unlearn", "--run", str(run_dir), "--request", str(file), *LENIENT, *more])


@pytest.fixture
def untouched(monkeypatch):
    """Fails the test when something is trained."""
    monkeypatch.setattr("clkit.api.run", lambda *args, **kwargs: pytest.fail("trained"))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"scope": {"record_ids": ["nobody"]}}, "record_ids[0]: is not in the run's data"),
        ({"scope": {"subject_ids": []}}, "subject_ids"),
        ({"scope": {"predicate": {"field": "answer", "equals": "unheard"}}}, "selects no record"),
        ({"scope": {"record_ids": "ALL"}}, "every training record"),
        ({"schema": 2}, "schema"),
        ({"unit": "household"}, "unit"),
        ({"deadline": "soon"}, "deadline"),
    ],
)
def test_a_request_that_can_not_be_served_is_told_and_leaves_nothing(
    changes, what, digits_run, write, capsys, untouched
):
    if changes.get("scope") == {"record_ids": "ALL"}:
        with api.open_run(digits_run) as trainer:
            changes = {"scope": {"record_ids": [i for task in trainer.tasks for i in task.train.ids]}}
    content = {**request({"record_ids": ["nobody"]}), **changes}
    assert unlearn(digits_run, write(content)) == 2
    assert what in capsys.readouterr().err
    assert nothing_forgotten(digits_run)


def test_a_file_that_is_no_json_is_told_and_leaves_nothing(digits_run, tmp_path, capsys, untouched):
    file = tmp_path / "request.json"
    file.write_text('{"schema": 1, "request_id"')
    assert unlearn(digits_run, file) == 2
    assert "request.json" in capsys.readouterr().err
    assert nothing_forgotten(digits_run)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--method", "dp2unlearning"], "the run's strategy is naive"),
        (["--method", "exact_replay"], "checkpoint"),
        (["--method", "idk"], "does not unlearn tasks of kind classification"),
        (["--method", "npo", "--set", "beta=0"], "beta"),
        (["--method", "npo", "--set", "forget_tasks=[digits]"], "forget_tasks"),
    ],
)
def test_a_method_that_does_not_fit_the_run_is_refused_before_anything_is_forgotten(
    options, what, digits_run, digit_ids, write, capsys, untouched
):
    for path in (digits_run / "checkpoints").iterdir():  # so that exact_replay has nothing to go back to
        if "exact_replay" in options:
            path.unlink() if path.is_file() else [p.unlink() for p in path.iterdir()]
    assert unlearn(digits_run, write(request({"record_ids": digit_ids[:3]})), *options) == 2
    assert what in capsys.readouterr().err
    assert nothing_forgotten(digits_run)


def test_after_a_refusal_the_same_request_can_be_served_in_another_way(digits_run, digit_ids, write):
    file = write(request({"record_ids": digit_ids[:3]}))
    assert unlearn(digits_run, file, "--method", "dp2unlearning") == 2
    assert unlearn(digits_run, file) == 0
    ledger = Ledger(digits_run.parent / "unlearning")
    assert len(ledger.tombstones()) == 3
    ledger.close()


def test_a_network_that_its_strategy_changed_is_refused_before_anything_is_forgotten(
    people_content, write, tmp_path, capsys
):
    run_dir = run({**people_content, "strategy": "olora"}, tmp_path)
    file = write(request({"subject_ids": [PEOPLE[0]]}))
    assert unlearn(run_dir, file, "--method", "npo", "--keep-near-duplicates") == 2
    assert "serves another network" in capsys.readouterr().err
    assert nothing_forgotten(run_dir)


def test_changed_data_and_a_served_request_id_leave_the_ledger_as_it_was(digits_run, digit_ids, write, capsys):
    assert unlearn(digits_run, write(request({"record_ids": digit_ids[:2]}))) == 0
    before = sorted(p.name for p in (digits_run.parent / "unlearning").iterdir())
    assert unlearn(digits_run, write(request({"record_ids": digit_ids[4:5]}))) == 2
    assert "already served" in capsys.readouterr().err
    facts = json.loads((digits_run / "run.json").read_text())
    name = next(iter(facts["data"]))
    facts["data"][name] = {**facts["data"][name], "train": "0" * 64}
    (digits_run / "run.json").write_text(json.dumps(facts))
    assert unlearn(digits_run, write(request({"record_ids": digit_ids[4:5]}, request_id="R-2"))) == 2
    assert "its data have changed" in capsys.readouterr().err
    assert sorted(p.name for p in (digits_run.parent / "unlearning").iterdir()) == before
    ledger = Ledger(digits_run.parent / "unlearning")
    assert len(ledger.tombstones()) == 2
    ledger.close()


def test_a_private_run_is_not_replayed_because_it_can_not_be_repeated(people_content, write, tmp_path, capsys):
    engine = {"name": "private", "noise_multiplier": 4.0, "accountant": "rdp"}
    run_dir = run({**people_content, "engine": engine, "checkpoint": {"keep": 100}}, tmp_path)
    with api.open_run(run_dir) as trainer:
        file = write(request({"record_ids": [trainer.tasks[1].train.ids[0]]}))
    assert unlearn(run_dir, file, "--method", "exact_replay", "--keep-near-duplicates") == 2
    assert "secret batches and noise" in capsys.readouterr().err
    assert nothing_forgotten(run_dir)


def test_a_run_that_began_with_a_model_that_learned_the_records_is_not_said_to_be_retrained_without_them(
    people_content, write, tmp_path, capsys
):
    whole = {**people_content["model"], "lora": {"r": 0}}
    first = run({**people_content, "model": whole, "output_dir": str(tmp_path / "runs" / "zero")}, tmp_path)
    second = run({**people_content, "model": {**whole, "name": str(first / "export")}}, tmp_path)
    file = write(request({"subject_ids": [PEOPLE[0]]}, unit="subject"))
    more = ["--keep-near-duplicates"]
    assert unlearn(second, file, *more) == 2
    assert f"{first} made, which learned" in capsys.readouterr().err and nothing_forgotten(second)
    assert unlearn(second, file, "--plan") == 0
    out = capsys.readouterr().out
    assert "* retrain: not here. model.name: the run began with a model that" in out and "  npo: " in out

    # From what came of the request there it can be served, and from a run that learned other records.
    assert unlearn(first, file, *more) == 0
    (clean,) = (p for p in first.parent.glob("zero-without-*"))
    third = run({**people_content, "model": {**whole, "name": str(clean / "export")},
                 "output_dir": str(tmp_path / "runs" / "third")}, tmp_path)  # fmt: skip
    assert unlearn(third, write(request({"subject_ids": [PEOPLE[2]]}, request_id="R-2")), *more) == 2
    assert f"{clean} made, which learned" in capsys.readouterr().err
    other = {**people_content["tasks"], "tasks": people_content["tasks"]["tasks"][:1]}
    less = run(
        {**people_content, "model": whole, "tasks": other, "output_dir": str(tmp_path / "runs" / "less")}, tmp_path
    )
    fourth = run({**people_content, "model": {**whole, "name": str(less / "export")},
                  "output_dir": str(tmp_path / "runs" / "fourth")}, tmp_path)  # fmt: skip
    assert unlearn(fourth, write(request({"subject_ids": [PEOPLE[2]]}, request_id="R-3")), *more) == 0
