"""Rows that were computed once are found again, whatever happened to the files in between."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from clkit.cache import CHUNK, RowCache, Rows

RECIPE = {"what": "square"}


def names(values):
    return [int(v).to_bytes(16, "little") for v in values]


class Square:
    """Squares of the values, and how many were asked for."""

    def __init__(self, values):
        self.values, self.asked = torch.as_tensor(values, dtype=torch.float64), 0

    def __call__(self, rows):
        self.asked += len(rows)
        return Rows(self.values[rows].square().unsqueeze(1), torch.ones(len(rows), dtype=torch.long))


def squares(root, values, recipe=RECIPE):
    work = Square(values)
    found = RowCache(root).rows(recipe, names(values), work)
    assert found.flat.flatten().tolist() == [float(v) ** 2 for v in values]
    return work.asked


def test_a_row_is_computed_once_whatever_set_and_order_it_comes_in(tmp_path):
    assert squares(tmp_path, [1, 2, 3]) == 3
    assert squares(tmp_path, [3, 1, 3, 4]) == 1
    assert squares(tmp_path, [4, 4, 2]) == 0
    assert squares(tmp_path, [1], recipe={"what": "another"}) == 1


def test_without_a_place_nothing_is_kept(tmp_path):
    cache, work = RowCache(None), Square([5.0])
    for _ in range(2):
        assert cache.rows(RECIPE, names([5]), work).flat.item() == 25
    assert work.asked == 2


def test_rows_of_several_vectors_keep_their_lengths(tmp_path):
    def compute(rows):
        return Rows(torch.cat([torch.full((int(r) + 1, 2), float(r)) for r in rows]), rows + 1)

    first = RowCache(tmp_path).rows(RECIPE, names(range(4)), compute)
    again = RowCache(tmp_path).rows(RECIPE, names([2, 0]), compute)
    assert first.lengths.tolist() == [1, 2, 3, 4]
    assert again.lengths.tolist() == [3, 1]
    assert again.flat[:, 0].tolist() == [2, 2, 2, 0]


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "not ours"])
def test_a_damaged_file_is_noticed_and_computed_again(tmp_path, damage):
    squares(tmp_path, [1, 2, 3])
    (file,) = tmp_path.rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "one bit":
        content[-1] ^= 1
    file.write_bytes({"truncated": content[:-4], "one bit": content, "empty": b"", "not ours": b"x" * 100}[damage])
    with pytest.warns(RuntimeWarning, match=r"damaged; its rows are computed again"):
        assert squares(tmp_path, [1, 2, 3]) == 3
    assert squares(tmp_path, [1, 2, 3]) == 0


def test_a_place_that_can_not_be_written_costs_a_warning_and_no_result(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache, work = RowCache(tmp_path / "file"), Square([1, 2])
    with pytest.warns(RuntimeWarning, match=r"can't write.*kept in memory only"):
        assert cache.rows(RECIPE, names([1, 2]), work).flat.flatten().tolist() == [1, 4]
    assert cache.rows(RECIPE, names([2, 1]), work).flat.flatten().tolist() == [4, 1]
    assert work.asked == 2


def test_a_large_set_is_written_in_parts(tmp_path):
    values = range(CHUNK + 10)
    assert squares(tmp_path, values) == len(values)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert squares(tmp_path, values) == 0


def test_what_a_killed_process_left_is_cleared_away_after_a_day(tmp_path):
    squares(tmp_path, [1])
    (folder,) = tmp_path.iterdir()
    old, new = folder / ".a.tmp", folder / ".b.tmp"
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 100_000,) * 2)
    squares(tmp_path, [1])
    assert new.exists() and not old.exists()


def _fill(root):
    return squares(root, range(500))


def test_processes_that_compute_the_same_rows_at_once_do_not_disturb_each_other(tmp_path):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        asked = list(pool.map(_fill, [tmp_path] * 4))
    assert 500 <= sum(asked) <= 4 * 500
    assert squares(tmp_path, range(500)) == 0
    assert not list(tmp_path.rglob("*.tmp"))
