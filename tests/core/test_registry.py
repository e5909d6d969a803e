"""Names, near names, collisions, and lines read without importing."""

from __future__ import annotations

import sys

import pytest

from clkit.errors import ConfigError
from clkit.registry import Registry


def test_an_unknown_name_says_what_is_near_and_what_exists():
    registry: Registry[object] = Registry("strategy", "clkit.strategies")
    with pytest.raises(ConfigError, match=r"Unknown strategy 'naiv'\. Did you mean 'naive'\? Known: .*lwf"):
        registry.get("naiv")


def test_two_targets_under_one_name_are_an_error_that_shows_both():
    registry: Registry[object] = Registry("thing", "clkit.nothing")
    registry.register("a", "one.module:A")
    registry.register("a", "one.module:A")
    with pytest.raises(ConfigError, match=r"registered twice: by one\.module:A and by two\.module:B"):
        registry.register("a", "two.module:B")


@pytest.mark.parametrize("name", ["Upper", "with space", "with.dot", ""])
def test_names_are_lower_case_identifiers(name):
    with pytest.raises(ConfigError, match="lower case"):
        Registry("thing", "clkit.nothing").register(name, "m:A")


def test_the_decorator_registers_the_object_itself():
    registry: Registry[type] = Registry("thing", "clkit.nothing")

    @registry.register("mine")
    class Mine:
        """What it is."""

    assert registry.get("mine") is Mine
    assert registry.describe("mine") == "What it is."


def test_a_target_that_can_not_be_imported_names_its_origin():
    registry: Registry[object] = Registry("thing", "clkit.nothing")
    registry.register("broken", "no_such_package.module:A")
    with pytest.raises(ConfigError, match=r"no_such_package\.module:A.*can't be imported"):
        registry.get("broken")


def test_a_line_on_a_target_is_read_without_importing_its_module():
    registry: Registry[object] = Registry("thing", "clkit.nothing")
    registry.register("tabs", "this:d")  # importing `this` would print the Zen of Python
    registry.register("gone", "no_such_package:A")
    assert isinstance(registry.describe("tabs"), str)
    assert "this" not in sys.modules
    assert registry.describe("gone").startswith("(broken")
    line = registry.describe("tabs")
    registry.get("tabs")
    assert registry.describe("tabs") == line
