"""The TOFU experiment: which rows are learned, forgotten and never seen, and what it plans."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).parents[2] / "experiments" / "unlearning"


@pytest.fixture
def experiment(monkeypatch, data_root):
    monkeypatch.setenv("CLKIT_DATA", str(data_root))
    monkeypatch.syspath_prepend(str(HERE))
    for name in ("run", "measure", "tofu"):
        sys.modules.pop(name, None)
    import run
    import tofu

    yield run, tofu, yaml.safe_load((HERE / "settings.yaml").read_text())
    for name in ("run", "measure", "tofu"):
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


def test_a_smaller_experiment_uses_the_shortest_rows_of_each_author_everywhere(experiment, tmp_path):
    _, tofu, _ = experiment
    settings = yaml.safe_load((HERE / "small.yaml").read_text())
    (part,) = tofu.write_tasks(tmp_path, settings, 1)
    learned = {r["prompt"]: r["author"] for r in rows(part, "train")}
    assert len(learned) == 100 and set(Counter(learned.values()).values()) == {10}
    asked = tofu.questions(settings, 2, 100)
    gone = {f"author {a}" for a in tofu.forgotten(settings, 2)}
    assert len(asked["forget"]) == 20 and {learned[q.prompt] for q in asked["forget"]} == gone
    assert asked["retain"] and not {learned[q.prompt] for q in asked["retain"]} & gone
    assert len(tofu.forgotten_rows(settings, 2)) == 20
    three = tofu.write_tasks(tmp_path / "sequence", settings, 3)
    assert [len(rows(part, "train")) for part in three] == [30, 30, 40]
    assert [len(rows(part, "test")) for part in three] == [6, 7, 7], "too few authors for one each"
    assert not gone & {r["author"] for r in rows(three[0], "train")}


def test_settings_that_extend_others_say_what_differs(experiment):
    _, tofu, _ = experiment
    small, more = (tofu.read_settings(HERE / f"{name}.yaml") for name in ("small", "authors"))
    assert more["methods"] == small["methods"] and more["overrides"] == small["overrides"] and "extends" not in more
    assert more["forget"] == [2, 4, 8] and len(tofu.forgotten_rows(more, 8)) == 80
    asked = tofu.questions(more, 8, 12)
    assert len(asked["forget"]) == 80 and len(asked["retain"]) <= 12


@pytest.mark.parametrize("name", ["settings", "small", "authors"])
def test_every_method_is_one_that_there_is_and_has_a_retrained_model_to_be_compared_with(name, experiment, tmp_path):
    run, tofu, _ = experiment
    from clkit import resolve
    from clkit.unlearning.methods import METHODS, make

    settings = tofu.read_settings(HERE / f"{name}.yaml")
    arguments = argparse.Namespace(methods=None, forget=None, seeds=[0], out=tmp_path)
    requests = run.plan(arguments, settings)
    assert len({r.folder for r in requests}) == len(requests) == len(settings["forget"]) * len(settings["methods"])
    retrained = {r.base for r in requests if r.method == "retrain"}
    for request in requests:
        base = settings["bases"][request.base]
        assert base.get("reference", request.base) in retrained
        assert ("protected" in base) == (request.method == "dp2unlearning")
        if request.method != run.NOTHING:
            assert request.method in METHODS
            make(request.method, request.options)
    for base in settings["bases"].values():
        tasks = tofu.write_tasks(tmp_path / "data", settings, 1)
        common = [*settings.get("overrides", ()), f"tasks.tasks=[{tasks[0]}]"]
        resolve.load(HERE / "base.yaml", [*common, *base["overrides"]])
        if "protected" in base:
            shared = [] if "rewrite" in base else settings["protected"]
            resolve.load(HERE / "base.yaml", [*common, *shared, *base["protected"]])
