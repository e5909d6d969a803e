"""Exact replay: what it gives is, bit for bit, a run that never had the records; where it can't, it says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from people import digits, request, run, served
from safetensors.torch import load_file

from clkit.cli import main
from clkit.result import RunResult
from clkit.tasks import build_tasks
from clkit.unlearning.ledger import Ledger
from clkit.unlearning.records import records
from clkit.uses import FirstUse

LENIENT = ["--max-utility-loss", "1", "--max-membership", "1", "--max-extraction", "1"]


def unlearn(run_dir, file, *more):
    return main(["unlearn", "--run", str(run_dir), "--request", str(file), *LENIENT, *more])


def sequence(content):
    return build_tasks("jsonl", {k: v for k, v in content["tasks"].items() if k != "source"})


def newest(run_dir):
    return load_file(sorted((run_dir / "checkpoints").glob("[0-9]*"))[-1] / "state.safetensors")


def both(content, tmp_path, write, scope):
    """The same request served by replay and by retraining, in two worlds; the two new runs and the replay's events."""
    found, messages = [], []
    for method in ("exact_replay", "retrain"):
        new_run, certificate = served(content, tmp_path / method, scope, method, *LENIENT)
        found.append(new_run)
        messages.append(certificate["method"]["guarantee"])
    return (*found, messages[0])


def assert_equal(replayed, clean, first_row=0):
    a, b = RunResult.load(replayed), RunResult.load(clean)
    assert a.tasks == b.tasks
    np.testing.assert_array_equal(a.matrix[first_row:], b.matrix[first_row:])
    ours, theirs = newest(replayed), newest(clean)
    assert ours.keys() == theirs.keys()
    for key in ours:
        if "/matrix" not in key and "/initial" not in key:
            assert torch.equal(ours[key], theirs[key]), key
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (clean / "export" / name).exists():
            assert (replayed / "export" / name).read_bytes() == (clean / "export" / name).read_bytes()


def test_a_record_of_the_second_task_goes_back_to_where_that_begins(tmp_path, write, digit_ids):
    content = digits(tmp_path, checkpoint={"every_steps": 2, "keep": 100}, train={"epochs": 2, "batch_size": 16})
    replayed, clean, said = both(content, tmp_path, write, {"record_ids": digit_ids[:3]})
    assert_equal(replayed, clean)
    assert "The first 4 steps are those of the old run" in said
    (first, *_) = [json.loads(line) for line in (replayed / "events.jsonl").read_text().splitlines()]
    assert first["total_steps"] >= 4, "the first task was not trained again"


@pytest.mark.parametrize("grouped", [False, True])
def test_by_record_it_goes_back_within_a_task(grouped, people_content, tmp_path, write):
    files = people_content["tasks"]["tasks"]
    with Path(files[1]).open("a") as file:
        for i in range(160):
            file.write(json.dumps({"id": f"n{i}", "prompt": f"{'x' * (i % 7)} {i}?", "answer": f"{i}"}) + "\n")
    train = {"epochs": 1, "batch_size": 2, "learning_rate": 0.01, "order": "record", "group_by_length": grouped}
    content = {
        **people_content,
        "train": train,
        "checkpoint": {"every_steps": 1, "keep": 1000},
        "model": {**people_content["model"], "lora": {"r": 2, "dropout": 0.1}},
    }
    tasks = sequence(people_content)
    from clkit.loader import record_order

    order = [tasks[1].train.ids[i] for b in record_order(tasks[1].train.ids, 2, (0, "order", 1, 0)) for i in b.tolist()]
    late = order[75]
    replayed, clean, said = both(content, tmp_path, write, {"record_ids": [late]})
    assert_equal(replayed, clean)
    done = int(said.split("The first ")[1].split()[0])
    before = -(-len(tasks[0].train) // 2)
    assert done == before + (32 if grouped else 37)
    (first, *_) = [json.loads(line) for line in (replayed / "events.jsonl").read_text().splitlines()]
    assert first["total_steps"] > done - 1


def test_scores_on_forgotten_evaluation_records_become_not_measured(people_content, tmp_path, write):
    tasks = sequence(people_content)
    mine = [r for r in records(tasks) if r.place.task == "part1"]
    chosen = [next(r.id for r in mine if r.place.part == part) for part in ("train", "eval")]
    content = {**people_content, "checkpoint": {"every_steps": 1, "keep": 1000}}
    replayed, clean, _ = both(content, tmp_path, write, {"record_ids": chosen})
    assert_equal(replayed, clean, first_row=1)
    first = RunResult.load(replayed).matrix[0]
    assert not np.isnan(first[0]) and np.isnan(first[1]), "only the column of the task that lost a scored record"


def test_without_an_old_checkpoint_or_with_a_strategy_that_looks_ahead_it_refuses(tmp_path, write, digit_ids, capsys):
    run_dir = run(digits(tmp_path), tmp_path)
    file = write(request({"record_ids": digit_ids[:3]}))
    assert unlearn(run_dir, file, "--method", "exact_replay") == 2
    err = capsys.readouterr().err
    assert "none is kept" in err and "task 2 of 5" in err and "checkpoint.keep" in err
    ledger = Ledger(run_dir.parent / "unlearning")
    assert not ledger.tombstones(), "what can't be served leaves nothing behind"
    ledger.close()
    assert unlearn(run_dir, file, "--plan") == 0
    out = capsys.readouterr().out
    assert "  exact_replay: not here." in out and "* retrain: 20 optimiser steps, 100% of retraining" in out
    assert "  npo: " in out and "No guarantee" in out
    other = tmp_path / "other"
    other.mkdir()
    run_dir = run(digits(other, strategy="ncm", checkpoint={"keep": 100}), other)
    assert unlearn(run_dir, file, "--method", "exact_replay") == 2
    assert "'ncm' may look ahead" in capsys.readouterr().err


def test_a_schedule_that_knows_the_number_of_steps_is_replayed_from_the_task_only(people_content, tmp_path, write):
    content = {
        **people_content,
        "train": {"epochs": 3, "batch_size": 1, "learning_rate": 0.01, "order": "record", "schedule": "linear"},
        "checkpoint": {"every_steps": 1, "keep": 1000},
    }
    tasks = sequence(people_content)
    replayed, clean, said = both(content, tmp_path, write, {"record_ids": [tasks[1].train.ids[0]]})
    assert_equal(replayed, clean)
    assert f"The first {3 * len(tasks[0].train)} steps" in said


def test_first_use_is_the_step_whose_batch_first_held_a_record(digits_run):
    from clkit import api

    with api.open_run(digits_run) as trainer:
        uses, tasks = trainer.uses, trainer.tasks
    assert uses.foreign == 0 and uses.used() == sum(len(t.train) for t in tasks)
    steps = [uses.at(i) for i in tasks[1].train.ids]
    assert min(steps) == 4 and max(steps) == 5, "two epochs of two steps each: first uses are in the first epoch"
    later = FirstUse(tasks).carried(uses, 5)
    assert sum(later.at(i) is not None for i in tasks[1].train.ids) == 16 and later.at(tasks[4].train.ids[0]) is None
