"""MEMO: shared shallow blocks, one copy of the deep blocks per task, exemplars counted with the model in one budget."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clkit.strategies.memo.config import MemoConfig as MemoConfig
    from clkit.strategies.memo.strategy import Memo as Memo

# Imported on first use: listing the strategies imports this package and must not import torch.
_HOMES = {"Memo": "strategy", "MemoConfig": "config"}
__all__ = ["Memo", "MemoConfig"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
