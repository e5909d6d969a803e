"""Task sources as plug-ins: found by name, imported only when used, one contract for all."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from clkit.errors import ConfigError
from clkit.tasks import SOURCES, build_tasks
from clkit.tasks.facts import FactsConfig
from clkit.tasks.source import TaskSource

NAMES = ["avalanche", "digits", "facts", "hf", "image-folder", "jsonl", "mosaic"]


def test_the_shipped_sources_are_found():
    assert set(NAMES) <= set(SOURCES.names())


def test_importing_and_listing_sources_imports_neither_torch_nor_a_source():
    code = (
        "import sys; from clkit.tasks import SOURCES; [SOURCES.describe(n) for n in SOURCES.names()]; "
        "print([m for m in ('torch', 'datasets', 'avalanche', 'clkit.tasks.jsonl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_are_loaded_from_the_package_when_asked_for():
    import clkit.tasks
    from clkit.tasks.base import TaskSequence

    assert clkit.tasks.TaskSequence is TaskSequence and clkit.tasks.TaskSource is TaskSource
    with pytest.raises(AttributeError, match="no attribute 'Tsk'"):
        clkit.tasks.Tsk  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
def test_every_source_describes_itself_and_its_options(name):
    source = SOURCES.get(name)
    assert issubclass(source, TaskSource)
    assert SOURCES.describe(name).endswith(".")
    for field in dataclasses.fields(source.config_class):
        assert field.metadata["help"], field.name
    source.config_class()


@pytest.mark.parametrize("name", ["avalanche", "hf", "image-folder", "jsonl", "mosaic"])
def test_a_source_that_needs_data_says_so_before_it_reads(name):
    problems = SOURCES.get(name).check(SOURCES.get(name).config_class())
    assert problems and all(p.where.startswith("tasks.") for p in problems)


def test_unknown_sources_and_options_are_told_with_near_names():
    with pytest.raises(ConfigError, match="Unknown task source 'fact'. Did you mean 'facts'"):
        build_tasks("fact")
    with pytest.raises(ConfigError) as error:
        build_tasks("facts", {"peple": 3, "split": "relations", "people": "many", "num_tasks": 0})
    assert [p.where for p in error.value.problems] == ["tasks.peple", "tasks.split", "tasks.people", "tasks.num_tasks"]
    assert "Did you mean 'people'?" in str(error.value)


def test_options_can_be_given_as_an_object():
    tasks = build_tasks("facts", FactsConfig(people=4), seed=1)
    assert [len(t.train) for t in tasks] == [8, 8, 8]
    with pytest.raises(ConfigError, match="unknown relation"):
        build_tasks("facts", FactsConfig(relations=["x"]))


def test_a_third_party_source_can_be_registered():
    from clkit.registry import Registry

    class Mine(TaskSource):
        """Mine."""

        config_class = FactsConfig

        @classmethod
        def check(cls, config):
            return []

        @classmethod
        def build(cls, config, seed):
            return build_tasks("facts", config, seed)

    registry = Registry("task source", "clkit.none")
    registry.register("mine", Mine)
    assert registry.get("mine").build(FactsConfig(), 0)[0].name == "city"
