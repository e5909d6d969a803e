"""The hf source, on data sets saved to disk."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from clkit.build import located
from clkit.errors import ConfigError, DataError
from clkit.resolve import validate
from clkit.tasks import build_tasks

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def save(path, features=None, **splits) -> str:
    parts = {k: datasets.Dataset.from_list(rows, features=features) for k, rows in splits.items()}
    datasets.DatasetDict(parts).save_to_disk(str(path))
    return str(path)


def questions(count: int, group: str = "a") -> list[dict]:
    return [{"question": f"{group} {i}?", "reply": f"r{i}", "group": group} for i in range(count)]


COLUMNS = {"prompt_field": "question", "answer_field": "reply"}


def test_each_data_set_is_a_task_with_mapped_columns(tmp_path):
    paths = [save(tmp_path / n, train=questions(4, n), test=questions(2, n + "t")) for n in ("law", "art")]
    tasks = build_tasks("hf", {"datasets": paths, **COLUMNS})
    assert [(t.name, len(t.train), len(t.eval)) for t in tasks] == [("law", 4, 2), ("art", 4, 2)]
    assert tasks[0].train.records[1].prompt == "law 1?" and tasks[0].metric == "exact-match"
    assert len(tasks.files) == 4 and all(f.is_file() for f in tasks.files)


def test_directories_are_written_down_so_that_they_are_found_from_elsewhere(tmp_path, monkeypatch):
    save(tmp_path / "law", train=questions(4), test=questions(2))
    monkeypatch.chdir(tmp_path)
    content = {"tasks": {"source": "hf", "datasets": ["law", "user/name"], **COLUMNS}}
    found = located(validate(content, origin="test")).tasks.config.datasets
    assert found == [str(tmp_path / "law"), "user/name"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [t.name for t in build_tasks("hf", {"datasets": found[:1], **COLUMNS})] == ["law"]


@pytest.mark.parametrize("eval_split", ["test", ""])
def test_a_column_cuts_one_data_set_into_tasks(tmp_path, eval_split):
    rows = [*questions(4, "y"), *questions(6, "x")]
    path = save(tmp_path / "d", train=rows, test=rows)
    tasks = build_tasks("hf", {"datasets": [path], "task_column": "group", "eval_split": eval_split, **COLUMNS})
    assert [t.name for t in tasks] == ["x", "y"]
    assert all(r.prompt.startswith(t.name) for t in tasks for r in t.train.records)
    assert [len(t.eval) for t in tasks] == ([6, 4] if eval_split else [1, 1])


@pytest.mark.parametrize("kind", [int, str])
def test_numbers_in_the_column_are_tasks_in_the_order_of_the_numbers(tmp_path, kind):
    rows = [{**row, "group": kind(month)} for month in (10, 9, 12, 1, 2) for row in questions(2, f"m{month}")]
    path = save(tmp_path / "d", train=rows)
    tasks = build_tasks("hf", {"datasets": [path], "task_column": "group", "eval_split": "", **COLUMNS})
    assert [t.name for t in tasks] == ["1", "2", "9", "10", "12"]


def test_class_labels_are_read_by_name(tmp_path):
    label = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(8)]
    path = save(tmp_path / "d", features, train=rows, test=rows)
    config = {"datasets": [path], "prompt_field": "text", "kind": "classification", "classes_per_task": 1}
    tasks = build_tasks("hf", config)
    assert [t.metadata["class_names"] for t in tasks] == [["neg"], ["pos"]]
    assert tasks[1].train.inputs == ("t1", "t3", "t5", "t7")
    as_text = build_tasks("hf", {"datasets": [path], "prompt_field": "text", "answer_field": "label"})
    assert as_text[0].train.records[1].answer == "pos" and as_text[0].metric == "option-loglik"


def images(count: int, sizes=((6, 6),)) -> tuple[list[dict], np.ndarray]:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        pixels = rng.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8)
        buffer = io.BytesIO()
        PILImage.fromarray(pixels).save(buffer, "PNG")
        rows.append({"img": {"bytes": buffer.getvalue(), "path": None}, "label": i % 3})
    return rows, pixels


FEATURES = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
IMAGES = {"kind": "classification", "image_field": "img"}


@pytest.mark.parametrize("eval_split", ["test", ""])
def test_images_become_one_tensor_split_by_class(tmp_path, eval_split):
    rows, last = images(12)
    path = save(tmp_path / "d", FEATURES, train=rows, test=rows[:3])
    tasks = build_tasks("hf", {"datasets": [path], **IMAGES, "eval_split": eval_split, "eval_fraction": 0.25})
    assert [t.metadata["class_names"] for t in tasks] == [["a", "b"], ["c"]]
    assert tasks[0].train.inputs.dtype == torch.uint8 and tasks[0].train.inputs.shape[1:] == (3, 6, 6)
    assert [len(t.eval) for t in tasks] == [2, 1]
    seen = torch.cat([t.train.inputs for t in tasks])
    if eval_split:
        assert np.array_equal(tasks[1].train.inputs[-1].numpy(), last.transpose(2, 0, 1))
        assert len(seen) == 12


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_the_order_and_the_numbers_of_classes_are_those_of_the_data_set(tmp_path, kind):
    labels = datasets.ClassLabel(names=["trouser", "bag", "coat"])
    if kind == "images":
        rows, _ = images(12)
        features, options = datasets.Features({"img": datasets.Image(), "label": labels}), IMAGES
    else:
        rows = [{"prompt": f"text {i}", "label": i % 3} for i in range(12)]
        features = datasets.Features({"prompt": datasets.Value("string"), "label": labels})
        options = {"kind": "classification"}
    path = save(tmp_path / "d", features, train=rows, test=rows)
    options = {"datasets": [path], "classes_per_task": 1, **options}
    tasks = build_tasks("hf", options)
    assert [t.metadata["class_names"] for t in tasks] == [["trouser"], ["bag"], ["coat"]]
    chosen = build_tasks("hf", {**options, "class_order": [2, 0, 1]})
    assert [t.metadata["class_names"] for t in chosen] == [["coat"], ["trouser"], ["bag"]]
    assert [t.metadata["source_classes"] for t in chosen] == [[2], [0], [1]]


def test_broken_unlabelled_and_unequal_images_are_all_listed(tmp_path):
    rows, _ = images(5, sizes=((6, 6), (6, 7)))
    rows[2]["img"]["bytes"] = b"no image"
    rows[4]["label"] = -1
    path = save(tmp_path / "d", FEATURES, train=rows, test=rows[:1])
    with pytest.raises(DataError) as error:
        build_tasks("hf", {"datasets": [path], **IMAGES})
    found = [str(p) for p in error.value.problems]
    assert [p.partition(":")[2][:1] for p in found] == ["2", "3", "4", "5"], found
    assert "is 7 x 6 pixels, the first image 6 x 6; set image_size" in found[0]
    assert "can't be decoded" in found[1] and "'label' is empty" in found[3]
    rows[2], rows[4]["label"] = rows[0], 1
    good = save(tmp_path / "e", FEATURES, train=rows * 2, test=rows)
    tasks = build_tasks("hf", {"datasets": [good], **IMAGES, "image_size": 4, "image_mode": "L"})
    assert tasks[0].train.inputs.shape[1:] == (1, 4, 4)


def test_malformed_rows_and_missing_columns_are_data_errors(tmp_path):
    bad = {"question": "q", "reply": None, "group": "g"}
    path = save(tmp_path / "d", train=[*questions(2), bad], test=[*questions(1), {**bad, "reply": "r"}])
    with pytest.raises(DataError, match=r"d\[train\]:3: 'reply' is empty"):
        build_tasks("hf", {"datasets": [path], **COLUMNS})
    with pytest.raises(DataError, match=r"d\[train\]:3: 'reply' is empty"):  # the row of the data set, not the task
        build_tasks("hf", {"datasets": [path], **COLUMNS, "task_column": "group"})
    with pytest.raises(DataError, match=r"field 'reply_' is missing\. Did you mean 'reply'"):
        build_tasks("hf", {"datasets": [path], **COLUMNS, "answer_field": "reply_"})
    with pytest.raises(DataError, match=r"has no column 'grup'\. Did you mean 'group'"):
        build_tasks("hf", {"datasets": [path], **COLUMNS, "task_column": "grup"})
    with pytest.raises(DataError, match=r"column 'reply' has empty values"):
        build_tasks("hf", {"datasets": [path], **COLUMNS, "task_column": "reply"})
    with pytest.raises(DataError, match=r"has no column 'img'"):
        build_tasks("hf", {"datasets": [path], **IMAGES})
    with pytest.raises(DataError, match=r"column 'question' holds no images"):
        build_tasks("hf", {"datasets": [path], **IMAGES, "image_field": "question", "label_field": "reply"})


def test_missing_splits_and_data_sets_are_data_errors(tmp_path):
    path = save(tmp_path / "d", train=questions(2), validation=questions(2))
    with pytest.raises(DataError, match=r"has no split 'test'\. It has: train, validation\. With eval_split ''"):
        build_tasks("hf", {"datasets": [path], **COLUMNS})
    with pytest.raises(DataError, match=r"has no split 'trian'\. Did you mean 'train'"):
        build_tasks("hf", {"datasets": [path], **COLUMNS, "train_split": "trian"})
    with pytest.raises(DataError, match="nobody/nothing: can't be loaded"):
        build_tasks("hf", {"datasets": ["nobody/nothing"], **COLUMNS})
    rows = [*questions(2, "x"), *questions(2, "y")]
    path = save(tmp_path / "e", train=rows, test=rows[:2])
    with pytest.raises(DataError, match="in one split only: y"):
        build_tasks("hf", {"datasets": [path], **COLUMNS, "task_column": "group"})


def test_a_directory_of_data_files_is_a_data_set_and_scripts_are_never_run(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.csv").write_text("question,reply\na,b\nc,d\n")
    (folder / "test.csv").write_text("question,reply\ne,f\n")
    tasks = build_tasks("hf", {"datasets": [str(folder)], **COLUMNS})
    assert [r.answer for r in tasks[0].train.records] == ["b", "d"]
    script = tmp_path / "scripted"
    script.mkdir()
    (script / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match="can't be loaded"):
        build_tasks("hf", {"datasets": [str(script)], **COLUMNS})
    assert not (tmp_path / "ran").exists()


def test_a_single_data_set_on_disk_is_held_out_from(tmp_path):
    datasets.Dataset.from_list(questions(10)).save_to_disk(str(tmp_path / "d"))
    tasks = build_tasks("hf", {"datasets": [str(tmp_path / "d")], **COLUMNS, "eval_fraction": 0.3})
    assert (len(tasks[0].train), len(tasks[0].eval)) == (7, 3)


def test_wrong_options_are_told(tmp_path):
    with pytest.raises(ConfigError, match=r"tasks\.datasets: is empty"):
        build_tasks("hf")
    with pytest.raises(ConfigError, match=r"folder './nowhere' does not exist"):
        build_tasks("hf", {"datasets": ["./nowhere"]})
    with pytest.raises(ConfigError) as error:
        build_tasks("hf", {"datasets": ["a", "b"], "task_column": "x", "image_field": "img"})
    assert "cuts one data set into tasks (got 2 data sets)" in str(error.value)
    assert "needs kind classification (got 'text')" in str(error.value)
