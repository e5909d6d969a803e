"""Registries of named plug-ins, loaded only when used, open to other packages by entry point."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from clkit.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names and what they stand for.

    Targets are ``"package.module:attribute"`` strings, imported on first use, or the objects themselves. Every
    distribution can add one through the entry-point group, with no change here::

        [project.entry-points."clkit.strategies"]
        mine = "my_package.my_module:MyStrategy"
    """

    def __init__(self, what: str, group: str) -> None:
        self.what = what
        self.group = group
        self._targets: dict[str, str | T] = {}
        self._origins: dict[str, str] = {}
        self._places: dict[str, str] = {}
        self._scanned = False

    def register(self, name: str, target: str | T | None = None) -> Callable[[T], T]:
        """Register ``target`` under ``name``; without a target, return a decorator that does.

        Raises:
            ConfigError: the name is not lower case, or it is taken by something else.
        """

        def add(found: T) -> T:
            self._add(name, found, getattr(found, "__module__", "this process"))
            return found

        if target is not None:
            self._add(name, target, target if isinstance(target, str) else getattr(target, "__module__", ""))
        return add

    def _add(self, name: str, target: str | T, origin: str) -> None:
        if name != name.lower() or not name.replace("-", "_").isidentifier():
            raise ConfigError(f"{self.what} name '{name}' must be lower case letters, digits, '-' and '_'")
        if name in self._targets and self._targets[name] != target:
            raise ConfigError(
                f"{self.what} '{name}' is registered twice: by {self._origins[name]} and by {origin}. "
                "Rename one, or uninstall the package you do not need."
            )
        self._targets[name] = target
        self._origins[name] = origin
        if isinstance(target, str):
            self._places[name] = target

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        for point in entry_points(group=self.group):
            dist = point.dist.name if point.dist is not None else "an unknown package"
            self._add(point.name, point.value, f"{dist} ({point.value})")

    def names(self) -> list[str]:
        """All known names, sorted. Imports nothing."""
        self._scan()
        return sorted(self._targets)

    def __contains__(self, name: object) -> bool:
        self._scan()
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def unknown(self, name: str) -> str:
        """The message for a name that is not registered: what is near, and what exists."""
        known = self.names()
        return f"Unknown {self.what} '{name}'.{did_you_mean(name, known)} Known: {', '.join(known) or 'none'}."

    def get(self, name: str) -> T:
        """Import and return what ``name`` stands for.

        Raises:
            ConfigError: the name is unknown, or its module can't be imported.
        """
        self._scan()
        if name not in self._targets:
            raise ConfigError(self.unknown(name))
        target = self._targets[name]
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        try:
            loaded = cast(T, getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{self.what} '{name}' ({self._origins[name]}) can't be imported: {error}") from error
        self._targets[name] = loaded
        return loaded

    def names_of(self, target: T) -> list[str]:
        """The names that stand for an object, which is imported already. Imports nothing."""
        self._scan()
        found = []
        for name, known in self._targets.items():
            loaded: Any = known
            if isinstance(known, str):
                module, _, attribute = known.partition(":")
                loaded = getattr(sys.modules.get(module), attribute, None)
            if loaded is target:
                found.append(name)
        return found

    def describe(self, name: str) -> str:
        """One line on ``name``, read from its source without importing it.

        The first line of the module's docstring, or of the target's own where several names share the module.
        """
        self._scan()
        place = self._places.get(name)
        if place is None:
            return (self._targets[name].__doc__ or "").strip().partition("\n")[0]
        module, _, attribute = place.partition(":")
        shared = sum(other.partition(":")[0] == module for other in self._places.values()) > 1
        try:
            spec = importlib.util.find_spec(module)
            if spec is None or spec.origin is None:
                return f"(broken: no module named '{module}')"
            source = Path(spec.origin).read_text(encoding="utf-8")
            if not shared and source.startswith('"""'):  # `clkit ls` reads dozens of modules: parsing takes its time
                return source[3:].partition("\n")[0].removesuffix('"""').strip()
            tree = ast.parse(source)
        except (ImportError, OSError, SyntaxError) as error:
            return f"(broken: {error})"
        own = [n for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == attribute]
        text = ast.get_docstring(own[0]) if shared and own else ast.get_docstring(tree)
        return (text or "").partition("\n")[0]


STRATEGIES: Registry[Any] = Registry("strategy", "clkit.strategies")
"""Continual-learning methods: subclasses of :class:`clkit.strategy.Strategy`."""
