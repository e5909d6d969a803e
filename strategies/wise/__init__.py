"""WISE: edits in side memories beside one projection, found again by a router that looks at the prompt."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clkit.strategies.wise.config import WISEConfig as WISEConfig
    from clkit.strategies.wise.core import Wise as Wise
    from clkit.strategies.wise.merge import merge as merge
    from clkit.strategies.wise.router import Decision as Decision
    from clkit.strategies.wise.strategy import WISE as WISE

# Imported on first use: listing the strategies imports this package and must not import torch.
_HOMES = {"Decision": "router", "WISE": "strategy", "WISEConfig": "config", "Wise": "core", "merge": "merge"}
__all__ = ["WISE", "Decision", "WISEConfig", "Wise", "merge"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
