"""The tutorials run as they stand, block after block in one directory; a tiny model takes the language model's place."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from clkit.cli import main
from clkit.registry import STRATEGIES

PAGES = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
WRITES = {
    "llm": ["compare.html", "my_adapter/README.md"],
    "images": ["digits.html"],
    "editing": ["edited/report.html", "edited/journal.jsonl"],
    "deletion": ["runs/unlearning/ledger.sqlite"],
    "general_ability": ["watched.html"],
    "own_strategy": ["runs/anchor/matrix.json"],
    "scaling": ["processes.html", "runs/two/matrix.json"],
}


@pytest.fixture
def registry(monkeypatch):
    """What a tutorial registers is forgotten."""
    STRATEGIES.names()  # entry points are found first
    for table in ("_targets", "_origins", "_places"):
        monkeypatch.setattr(STRATEGIES, table, dict(getattr(STRATEGIES, table)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_tutorial_runs(page, tiny_llama, tmp_path, monkeypatch, capsys, registry):
    if page.stem == "general_ability":
        pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'clkit[lm-eval]'")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    blocks = BLOCK.findall(page.read_text())
    assert blocks
    for language, code in blocks:
        code = code.replace("smollm2-135m", str(tiny_llama))
        if language == "python":
            exec(compile(code, page.name, "exec"), names)
            continue
        for line in code.splitlines():
            command, *arguments = shlex.split(line, comments=True)
            assert command == "clkit"
            assert main(arguments) == 0, capsys.readouterr().err
    for name in WRITES[page.stem]:
        assert (tmp_path / name).is_file()


def test_every_tutorial_says_what_it_writes():
    assert {page.stem for page in PAGES} == WRITES.keys()
