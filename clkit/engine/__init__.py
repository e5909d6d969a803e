"""Engines: how one optimisation step is executed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clkit.registry import Registry

if TYPE_CHECKING:
    from clkit.engine.base import Engine

ENGINES: Registry[type[Engine]] = Registry("engine", "clkit.engines")
