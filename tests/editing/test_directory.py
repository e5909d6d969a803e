"""What happens around a directory of edits: other places, interrupts, full disks, copies, readers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quickly import METHOD, request

import clkit


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
