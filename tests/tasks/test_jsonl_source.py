"""The jsonl source on good data."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from clkit.errors import ConfigError, DataError
from clkit.tasks import build_tasks
from clkit.tasks.base import content_id


def write(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return str(path)


def qa(count: int, word: str = "q") -> list[dict]:
    return [{"prompt": f"{word} {i}?", "answer": f"a{i}"} for i in range(count)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_records(tmp_path, suffix):
    rows = [
        {"prompt": "Größe, of what?", "answer": "NA", "id": "7", "subject": "x\u2028y"},
        {"prompt": 'with "quotes"\nand lines', "answer": "001", "id": "8", "subject": "z"},
    ]
    file = write(tmp_path / f"x{suffix}", rows)
    tasks = build_tasks("jsonl", {"tasks": [file], "eval_fraction": 0.5})
    records = sorted([*tasks[0].train.records, *tasks[0].eval.records], key=lambda r: r.id)
    assert [(r.prompt, r.answer, r.id, r.subject) for r in records] == [tuple(r.values()) for r in rows]
    assert tasks.files == (Path(file),)


def test_a_folder_has_its_own_evaluation_file_and_test_wins_over_dev(tmp_path):
    write(tmp_path / "law" / "train.jsonl", qa(4))
    write(tmp_path / "law" / "test.csv", qa(2, "t"))
    write(tmp_path / "law" / "dev.jsonl", qa(3, "d"))
    tasks = build_tasks("jsonl", {"root": str(tmp_path), "tasks": ["law"]})
    assert tasks[0].name == "law"
    assert [r.prompt for r in tasks[0].eval.records] == ["t 0?", "t 1?"]
    assert [f.name for f in tasks.files] == ["train.jsonl", "test.csv"]


def test_ids_are_the_given_ones_or_made_from_the_content(tmp_path):
    rows = [*qa(3), {"prompt": "q 1?", "answer": "a1"}, {"prompt": "p", "answer": "x", "id": 12}]
    file = write(tmp_path / "x.jsonl", rows)
    task = build_tasks("jsonl", {"tasks": [file], "eval_fraction": 0.2})[0]
    ids = {*task.train.ids, *task.eval.ids}
    same = content_id({"prompt": "q 1?", "answer": "a1"})
    assert len(ids) == 5 and {same, f"{same}-2", "12"} < ids
    assert task.metadata["duplicates"] + task.metadata["overlap"] == 1


@pytest.mark.parametrize("kind", ["text", "classification"])
def test_copies_of_records_that_are_held_out_are_not_learned(tmp_path, kind):
    rows = [{**row, "label": "ab"[int(row["answer"][1:]) % 2]} for row in qa(10)]
    file = write(tmp_path / "x.jsonl", rows * 4)
    task = build_tasks("jsonl", {"tasks": [file], "kind": kind})[0]
    assert (len(task.train), len(task.eval)) == ((36, 4) if kind == "text" else (32, 8))
    assert task.metadata["overlap"] == 0 and not {*task.train.ids} & {*task.eval.ids}


def test_unlabelled_rows_of_a_parquet_file_are_no_class_of_their_own(tmp_path):
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["entailment", "neutral"])
    features = datasets.Features({"prompt": datasets.Value("string"), "label": label})
    rows = [{"prompt": f"p{i}", "label": i % 3 - 1} for i in range(12)]
    path, config = tmp_path / "x.parquet", {"kind": "classification", "classes_per_task": 1}
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    with pytest.raises(DataError, match=r"x.parquet:1: has neither 'label' nor 'answer'"):
        build_tasks("jsonl", {"tasks": [str(path)], **config})
    datasets.Dataset.from_list([r for r in rows if r["label"] >= 0], features=features).to_parquet(path)
    assert [t.metadata["class_names"] for t in build_tasks("jsonl", {"tasks": [str(path)], **config})] == [["0"], ["1"]]


def test_training_ids_are_unique_over_tasks(tmp_path):
    files = [write(tmp_path / f"{n}.jsonl", qa(4)) for n in "ab"]
    tasks = build_tasks("jsonl", {"tasks": files})
    ids = [i for t in tasks for i in t.train.ids]
    assert len(set(ids)) == len(ids)


def test_overlap_of_train_and_eval_by_content_is_counted(tmp_path):
    write(tmp_path / "t" / "train.jsonl", qa(4))
    write(tmp_path / "t" / "test.jsonl", [*qa(2), {"prompt": "new", "answer": "n"}])
    task = build_tasks("jsonl", {"tasks": [str(tmp_path / "t")]})[0]
    assert task.metadata == {"duplicates": 0, "overlap": 2}


def test_labels_become_options_and_decide_the_metric(tmp_path):
    rows = [{"prompt": f"p{i}", "answer": ["no", "yes"][i % 2], "label": ["no", "yes"][i % 2]} for i in range(6)]
    files = [write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", qa(4))]
    tasks = build_tasks("jsonl", {"tasks": files})
    assert [t.metric for t in tasks] == ["option-loglik", "exact-match"]
    assert {r.options for r in tasks[0].train.records} == {("no", "yes")}
    assert build_tasks("jsonl", {"tasks": files[:1], "options": "none"})[0].train.records[0].options is None
    assert build_tasks("jsonl", {"tasks": files, "metric": "rouge-l"})[0].metric == "rouge-l"


def test_an_answer_that_is_not_its_label_gets_no_options(tmp_path):
    rows = [{"prompt": f"p{i}", "answer": f"{'AB'[i % 2]} because", "label": "AB"[i % 2]} for i in range(6)]
    task = build_tasks("jsonl", {"tasks": [write(tmp_path / "a.jsonl", rows)]})[0]
    assert task.metric == "exact-match" and task.eval.records[0].options is None


def test_options_of_a_csv_are_separated_by_bars_or_json(tmp_path):
    rows = [{"prompt": "p", "answer": "a", "options": "a | b"}, {"prompt": "q", "answer": "b", "options": '["a", "b"]'}]
    task = build_tasks("jsonl", {"tasks": [write(tmp_path / "x.csv", rows)], "eval_fraction": 0.5})[0]
    assert {r.options for r in [*task.train.records, *task.eval.records]} == {("a", "b")}


def test_limits_choose_a_stable_nested_subset(tmp_path):
    file = write(tmp_path / "x.jsonl", qa(40))

    def ids(limit: int, seed: int = 0) -> list[str]:
        return list(build_tasks("jsonl", {"tasks": [file], "train_limit": limit}, seed)[0].train.ids)

    assert len(ids(10)) == 10 and set(ids(5)) < set(ids(10)) and ids(10) == ids(10)
    assert ids(10) != ids(10, seed=1)
    every = ids(0)
    assert ids(10) == [i for i in every if i in set(ids(10))]  # the order of the file is kept


def test_holdout_is_scored_and_never_trained_on(tmp_path):
    write(tmp_path / "h" / "train.jsonl", qa(5, "h"))
    write(tmp_path / "h" / "test.jsonl", qa(3, "e"))
    files = [write(tmp_path / "a.jsonl", qa(10)), write(tmp_path / "g.jsonl", qa(2, "g"))]
    tasks = build_tasks("jsonl", {"tasks": files[:1], "holdout": [str(tmp_path / "h"), files[1]]})
    assert [(t.name, len(t.train), len(t.eval)) for t in tasks.holdout] == [("h", 0, 3), ("g", 0, 2)]


def test_edits_are_scored_on_the_edits_that_are_made(tmp_path):
    rows = [
        {"question": f"q{i}", "target_new": "t", "rephrase_prompt": f"r{i}", "locality_prompt": "l", "gold": "g"}
        for i in range(5)
    ]
    rows[0]["rephrase_prompt"] = ""
    config = {
        "tasks": [write(tmp_path / "e.json", rows)],
        "kind": "edit",
        "prompt_field": "question",
        "locality_answer_field": "gold",
        "train_limit": 3,
        "eval_limit": 2,
    }
    task = build_tasks("jsonl", config)[0]
    assert (task.kind, task.metric, len(task.train), len(task.eval)) == ("edit", "edit-exact", 3, 2)
    assert set(task.eval.ids) < set(task.train.ids)
    everything = build_tasks("jsonl", {**config, "train_limit": 0, "eval_limit": 0})[0].train.records
    assert everything[0].rephrase_prompt is None and everything[1].rephrase_prompt == "r1"
    assert everything[1].locality_answer == "g"


def classified(labels: str) -> list[dict]:
    return [{"prompt": f"{c} {i}", "label": c} for i, c in enumerate(labels)]


def test_classification_files_number_their_classes_in_task_order(tmp_path):
    files = [write(tmp_path / "1.jsonl", classified("zyzyzyzy")), write(tmp_path / "2.jsonl", classified("abcabcabc"))]
    tasks = build_tasks("jsonl", {"tasks": files, "kind": "classification"})
    assert tasks.scenario == "class" and tasks.num_classes == 5
    assert [t.classes for t in tasks] == [(0, 1), (2, 3, 4)]
    assert [t.metadata["class_names"] for t in tasks] == [["y", "z"], ["a", "b", "c"]]
    first = tasks[0].train
    assert all(prompt[0] == "yz"[k] for prompt, k in zip(first.inputs, first.labels.tolist(), strict=True))
    limited = build_tasks("jsonl", {"tasks": files, "kind": "classification", "train_limit": 1})
    assert [len(t.train) for t in limited] == [2, 3]


def test_domain_files_share_their_classes(tmp_path):
    files = [write(tmp_path / f"{n}.jsonl", classified("abababab")) for n in "xy"]
    tasks = build_tasks("jsonl", {"tasks": files, "kind": "classification", "scenario": "domain"})
    assert [t.classes for t in tasks] == [(0, 1), (0, 1)] and tasks.scenario == "domain"


def test_one_classification_file_is_split_by_class(tmp_path):
    file = write(tmp_path / "x.jsonl", classified("abcde" * 4))
    tasks = build_tasks("jsonl", {"tasks": [file], "kind": "classification", "class_order": list("edcba")})
    assert [t.metadata["class_names"] for t in tasks] == [["e", "d"], ["c", "b"], ["a"]]


def test_classes_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    rows = [{"prompt": f"text {i}", "label": i % 12} for i in range(48)]
    file = write(tmp_path / "x.jsonl", rows)
    tasks = build_tasks("jsonl", {"tasks": [file], "kind": "classification", "num_tasks": 1})
    assert tasks[0].metadata["class_names"] == [str(k) for k in range(12)]
    shuffled = build_tasks("jsonl", {"tasks": [file], "kind": "classification", "num_tasks": 12, "order_seed": 1993})
    expected = np.random.RandomState(1993).permutation(12).tolist()
    assert [t.metadata["class_names"] for t in shuffled] == [[str(k)] for k in expected]


def test_options_that_are_wrong_are_all_told_before_anything_is_read(tmp_path):
    write(tmp_path / "news.jsonl", qa(2))
    write(tmp_path / "only" / "test.jsonl", qa(2))
    write(tmp_path / "two" / "train.jsonl", qa(2))
    write(tmp_path / "two" / "train.csv", qa(2))
    write(tmp_path / "x.txt", qa(1))
    config = {
        "root": str(tmp_path),
        "tasks": ["nws.jsonl", "only", "two", "x.txt", "news.jsonl", "news.jsonl"],
        "prompt_field": "",
    }
    with pytest.raises(ConfigError) as error:
        build_tasks("jsonl", config)
    text = str(error.value)
    assert "nws.jsonl' does not exist. Did you mean 'news.jsonl'?" in text
    assert "only' has no train file" in text
    assert "has train.jsonl and train.csv; keep one" in text
    assert "x.txt' has an unknown type" in text
    assert "two entries make a task named 'news'" in text
    assert "tasks.prompt_field: must name a column" in text
    with pytest.raises(ConfigError, match=r"tasks\.root: folder .* does not exist\. Did you mean 'only'"):
        build_tasks("jsonl", {"root": str(tmp_path / "onyl"), "tasks": ["a"]})
    with pytest.raises(ConfigError, match=r"tasks\.tasks: is empty"):
        build_tasks("jsonl", {})
    with pytest.raises(ConfigError, match=r"tasks\.metric: classification is scored by accuracy"):
        build_tasks("jsonl", {"root": str(tmp_path), "tasks": ["news.jsonl"], "kind": "classification", "metric": "x"})
    with pytest.raises(ConfigError, match=r"tasks\.num_tasks: .* with several of them each is a task"):
        both = ["news.jsonl", "two"]
        build_tasks("jsonl", {"root": str(tmp_path), "tasks": both, "kind": "classification", "num_tasks": 2})
    for key, value in (("classes_per_task", 5), ("domain", "permute")):
        with pytest.raises(ConfigError, match=rf"tasks\.{key}: .* with several of them each is a task"):
            build_tasks("jsonl", {"root": str(tmp_path), "tasks": both, "kind": "classification", key: value})
    with pytest.raises(ConfigError, match=r"tasks\.order_seed: .* kind 'text' has no classes"):
        build_tasks("jsonl", {"root": str(tmp_path), "tasks": ["news.jsonl"], "order_seed": 0})
    with pytest.raises(ConfigError, match=r"tasks\.holdout: works for kind text"):
        config = {"tasks": ["news.jsonl"], "holdout": ["only"], "kind": "classification"}
        build_tasks("jsonl", {"root": str(tmp_path), **config})
