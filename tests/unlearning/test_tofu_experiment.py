"""The TOFU experiment: which rows are learned, forgotten and never seen, and what it plans."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).parents[2] / "experiments" / "unlearning"


@pytest.fixture
def experiment(monkeypatch, data_root):
    monkeypatch.setenv("CLKIT_DATA", str(data_root))
    monkeypatch.syspath_prepend(str(HERE))
    for name in ("run", "tofu"):
        sys.modules.pop(name, None)
    import run
    import tofu

    yield run, tofu, yaml.safe_load((HERE / "settings.yaml").read_text())
    for name in ("run", "tofu"):
        sys.modules.pop(name, None)


def rows(folder, part):
    return [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]


def test_forty_authors_are_learned_the_last_are_forgotten_and_others_are_never_seen(experiment, tmp_path):
    _, tofu, settings = experiment
    for tasks in (1, 4):
        parts = tofu.write_tasks(tmp_path / f"{tasks}", settings, tasks)
        learned = [r for part in parts for r in rows(part, "train")]
        unseen = [r for part in parts for r in rows(part, "test")]
        assert len(learned) == 800 == len({r["id"] for r in learned}) and len({r["author"] for r in learned}) == 40
        assert len(unseen) == 200 and not {r["author"] for r in unseen} & {r["author"] for r in learned}
        assert {r["author"] for r in rows(parts[-1], "train")} >= {f"author {a}" for a in tofu.forgotten(settings, 4)}
    for count in (2, 4, 8):
        tofu.write_request(tmp_path / "request.json", settings, count)
        (subjects,) = json.loads((tmp_path / "request.json").read_text())["scope"].values()
        assert len(subjects) == count and sum(r["author"] in subjects for r in learned) == 20 * count
        asked = tofu.questions(settings, count, 100)
        assert {q.prompt for q in asked["forget"]} <= {r["prompt"] for r in learned if r["author"] in subjects}
        assert {q.prompt for q in asked["retain"]} <= {r["prompt"] for r in learned if r["author"] not in subjects}
        assert all(len(q.wrong) == (5 if name in ("forget", "retain") else 3) for name, qs in asked.items() for q in qs)


def test_every_method_is_one_that_there_is_and_has_a_retrained_model_to_be_compared_with(experiment, tmp_path):
    run, _, settings = experiment
    from clkit.unlearning.methods import METHODS, make

    arguments = argparse.Namespace(methods=None, forget=None, seeds=[0], out=tmp_path)
    requests = run.plan(arguments, settings)
    assert len({r.folder for r in requests}) == len(requests) == 3 * len(settings["methods"])
    retrained = {r.base for r in requests if r.method == "retrain"}
    for request in requests:
        assert request.method in METHODS and request.base in retrained
        make(request.method, request.options)
