"""What happens around a directory of edits: other places, interrupts, full disks, copies, readers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quickly import METHOD, request

import clkit
from clkit.editing.journal import Journal
from clkit.errors import CheckpointError


@pytest.fixture
def load(tiny_llama):
    def make(where=None, **options):
        return clkit.Editor.load(where or tiny_llama, METHOD, device="cpu", **({"prompt": "plain"} | options))

    return make


def test_relative_paths_mean_the_same_wherever_the_process_goes(load, tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny_llama)
    editor = load("model", directory="edits")
    editor.edit([request(0)])
    assert load(tmp_path / "edits", directory="edits").directory == editor.directory
    monkeypatch.chdir("elsewhere")
    editor.edit([request(1)])
    assert not list(Path().iterdir()), "nothing is written in another place"
    assert list(load("../edits").records) == ["e0", "e1"]
    assert json.loads(Path("../edits/edits.json").read_text())["model"]["name"] == str(tiny_llama)


def test_what_a_full_disk_kept_out_of_the_journal_is_in_a_copy_made_elsewhere(load, tmp_path, monkeypatch):
    editor = load(directory=tmp_path / "full")
    editor.edit([request(0)])

    def full(path, line):
        raise CheckpointError(f"{path}: can't write")

    with monkeypatch.context() as patch:
        patch.setattr("clkit.editing.journal.append_line", full)
        with pytest.raises(CheckpointError, match="can't write"):
            editor.edit([request(1)])
    editor.save(tmp_path / "copy")
    assert list(load(tmp_path / "copy").records) == ["e0", "e1"]
    assert [e["id"] for e in Journal.open(tmp_path / "copy" / "journal.jsonl").entries] == ["e0", "e1"]
    editor.edit([request(2)])
    assert [e["number"] for e in Journal.open(tmp_path / "full" / "journal.jsonl").entries] == [1, 2, 3]
