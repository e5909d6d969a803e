"""The site is built without a warning, and everything public is in it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import clkit
from clkit.config import RunConfig
from clkit.evaluation import SCORERS
from clkit.metrics.continual import DEFINITIONS
from clkit.registry import STRATEGIES
from clkit.resolve import validate
from clkit.tasks import SOURCES

pytest.importorskip("mkdocs", reason="the site needs mkdocs-material: pip install 'clkit[docs]'")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def text(site: Path, page: str) -> str:
    return (site / page / "index.html").read_text()


def test_every_public_name_has_its_docstring_on_the_python_page(site):
    page = text(site, "reference/python")
    for name in clkit.__all__:
        thing = getattr(clkit, name)
        assert (thing.__doc__ or "").strip(), f"clkit.{name} has no docstring"
        assert f"clkit.{name}" in page, name
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if not member.startswith("_") and (inspect.isfunction(function) or isinstance(value, property)):
                assert (inspect.getdoc(getattr(thing, member)) or "").strip(), f"clkit.{name}.{member} has no docstring"


def test_every_option_is_on_the_options_page(site):
    page = text(site, "reference/options")
    plugins = [("strategy", STRATEGIES), ("tasks", SOURCES)]
    for registry in (STRATEGIES, SOURCES):
        for name in registry.names():
            assert f'id="{name}' in page, name
    shown = re.findall(r"<h3[^>]*>([\w-]+)", page)
    for name in STRATEGIES.names():
        assert shown.count(name) == (2 if name in SOURCES.names() else 1), name
    for cls, prefix in [
        (RunConfig, ""),
        *((r.get(n).config_class, f"{p}.") for p, r in plugins for n in r.names()),
    ]:
        for field in dataclasses.fields(cls):
            assert f"{prefix}{field.name}" in page, (cls, field.name)
            assert field.metadata.get("help") or prefix == "" or field.name == "replay", (cls, field.name)


def test_every_metric_is_on_the_metrics_page(site):
    page = text(site, "reference/metrics")
    for name in [*DEFINITIONS, *SCORERS.names()]:
        assert f"<code>{name}</code>" in page, name


def test_every_strategy_is_named_on_a_page_of_its_own_kind(site):
    pages = "".join(p.read_text() for p in (site / "strategies").rglob("index.html"))
    pages += "".join(p.read_text() for p in (site / "methods").rglob("index.html"))
    for name in STRATEGIES.names():
        assert f"<code>{name}" in pages or f">{name}<" in pages or f"strategy={name}" in pages, name


def test_the_papers_configurations_are_valid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs" / "papers.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 7
    for block in blocks:
        content = yaml.safe_load(block)
        root = Path(content["tasks"].get("root", "."))
        root.mkdir(exist_ok=True)
        if content["tasks"]["source"] == "image-folder":
            for name in range(100):
                (root / "train" / str(name)).mkdir(parents=True)
                (root / "test" / str(name)).mkdir(parents=True)
        for name in content["tasks"].get("tasks", []):
            file = root / name if name.endswith(".jsonl") else root / name / "train.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text("")
        validate(content)


def test_option_tables_are_those_of_the_dataclass(site):
    page = text(site, "strategies/baselines")
    assert "<!-- options" not in page
    for field in dataclasses.fields(STRATEGIES.get("ewc").config_class):
        assert field.name == "replay" or f"<code>{field.name}</code>" in page, field.name


# What a strategy's page says, and how it may say it.
PARTS = {
    "equations with the function that computes each": r"[Cc]omputed by|`\w+\.\w+`|^## Equations",
    "defaults": r"[Dd]efaults|<!-- options|^## Options|strategy.replay|Avalanche's",
    "what differs": r"[Dd]iffers",
    "evidence": r"Evidence",
    "when not to use it": r"[Nn]ot (for|when|where|without|until|`)|not to use it|not for \|",
}
PAGES = ROOT / "docs" / "strategies"
PLAIN = {"naive", "joint", "cumulative", "replay"}  # nothing was published for them to differ from


def about(name):
    """Its page and README; or its section of a page on several, with what stands above the sections."""
    readme = ROOT / "strategies" / name / "README.md"
    if (PAGES / f"{name}.md").is_file():
        return (PAGES / f"{name}.md").read_text() + readme.read_text()
    for page in sorted(PAGES.glob("*.md")):
        head, *sections = re.split(r"^(?=## )", page.read_text(), flags=re.M)
        for section in sections:
            if re.search(rf"\b{name}\b", section.split("\n")[0], flags=re.I):
                return head + section
        if re.search(rf"^\|.*`{name}`", page.read_text(), flags=re.M):
            further = ROOT / "strategies" / page.stem / "README.md"
            return page.read_text() + (further.read_text() if further.is_file() else "")
    return ""


@pytest.mark.parametrize("name", sorted(STRATEGIES.names()))
def test_the_page_of_a_strategy_lacks_no_part(name):
    text = about(name)
    lacking = [p for p, form in PARTS.items() if not re.search(form, text, flags=re.M)]
    assert not [p for p in lacking if not (name in PLAIN and p == "what differs")], name
