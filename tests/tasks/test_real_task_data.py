"""The real data sets, where they are present."""

from __future__ import annotations

import json

import torch

from clkit.tasks import build_tasks


def test_the_text_tasks_load_completely_with_options_where_labels_allow(data_root):
    names = [entry["task"] for entry in json.loads((data_root / "textcl" / "index.json").read_text())]
    tasks = build_tasks("jsonl", {"root": str(data_root / "textcl"), "tasks": names})
    assert len(tasks) == 8 and all((len(t.train), len(t.eval)) == (600, 200) for t in tasks)
    metrics = {t.name: t.metric for t in tasks}
    assert metrics.pop("scienceqa") == "exact-match"
    assert set(metrics.values()) == {"option-loglik"}
    index = {entry["task"]: entry for entry in json.loads((data_root / "textcl" / "index.json").read_text())}
    for task in tasks:
        if task.name != "scienceqa":
            assert list(task.eval.records[0].options) == index[task.name]["labels"]
    ids = [i for t in tasks for i in t.train.ids]
    assert len(set(ids)) == len(ids)


def test_cifar_tiles_load_with_their_classes_in_the_given_order(data_root):
    root = data_root / "images" / "cifar100_20"
    tasks = build_tasks("mosaic", {"root": str(root), "classes_per_task": 6, "order_seed": 1993})
    assert [len(t.classes) for t in tasks] == [6, 6, 6, 2]
    assert [len(t.train) for t in tasks] == [3000, 3000, 3000, 1000]
    assert tasks[0].train.inputs.shape == (3000, 3, 32, 32) and tasks[0].train.inputs.dtype == torch.uint8
    names = [n for t in tasks for n in t.metadata["class_names"]]
    assert sorted(names) == json.loads((root / "train.json").read_text())["classes"]
    # Photographs: neighbouring pixels are alike, which a wrong cut would break at tile borders.
    pixels = tasks[0].train.inputs[:200].float()
    assert (pixels[..., 1:] - pixels[..., :-1]).abs().mean() < 20
    ids = [i for t in tasks for i in t.train.ids]
    assert len(set(ids)) == 10_000


def test_zsre_edits_load_by_column_names(data_root):
    config = {
        "root": str(data_root / "editing"),
        "tasks": ["zsre_edit_1000.json"],
        "kind": "edit",
        "id_field": "case_id",
        "locality_answer_field": "locality_ground_truth",
    }
    task = build_tasks("jsonl", config)[0]
    assert len(task.train) == len(task.eval) == 1000
    first = task.train.records[0]
    assert (first.id, first.subject, first.target_new) == ("0", "Epaspidoceras", "Noctuidae")
    assert first.locality_answer == "Michael" and first.rephrase_prompt == "What family are Epaspidoceras?"


def test_tofu_loads_as_text(data_root):
    config = {"root": str(data_root / "tofu"), "tasks": ["full.jsonl"], "prompt_field": "question", "id_field": "row"}
    task = build_tasks("jsonl", config)[0]
    assert (len(task.train), len(task.eval)) == (3600, 400)
    assert {*task.train.ids, *task.eval.ids} == {str(i) for i in range(4000)}
