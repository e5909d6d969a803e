"""The report: one self-contained page for a run, or for several side by side, and its figures as files.

Nothing heavy is imported until it is used, so that the command line answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["load", "render", "runs_below", "so_far", "write_report"]

if TYPE_CHECKING:
    from clkit.report.page import load, render, runs_below, so_far, write_report


def __getattr__(name: str) -> Any:
    if name in __all__:
        from clkit.report import page

        return getattr(page, name)
    raise AttributeError(f"module 'clkit.report' has no attribute '{name}'")
