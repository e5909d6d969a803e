"""Scoring tasks. The registry of metrics is here and imports nothing heavy; ``base.evaluate`` does the work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clkit.registry import Registry

if TYPE_CHECKING:
    from clkit.evaluation.base import Scorer

SCORERS: Registry[type[Scorer]] = Registry("metric", "clkit.metrics")
