"""RegLoRA: a fresh LoRA per task, kept away from the entries in which earlier tasks' updates were largest."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clkit.strategies.reglora.config import RegLoRAConfig as RegLoRAConfig
    from clkit.strategies.reglora.sparse import Pattern as Pattern
    from clkit.strategies.reglora.sparse import masked_l1 as masked_l1
    from clkit.strategies.reglora.strategy import RegLoRA as RegLoRA
    from clkit.strategies.reglora.top import top_entries as top_entries

# Imported on first use: listing the strategies imports this package and must not import torch.
_HOMES = {
    "Pattern": "sparse",
    "RegLoRA": "strategy",
    "RegLoRAConfig": "config",
    "masked_l1": "sparse",
    "top_entries": "top",
}
__all__ = ["Pattern", "RegLoRA", "RegLoRAConfig", "masked_l1", "top_entries"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
