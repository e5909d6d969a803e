"""WISE with its router switched off: the control that says what routing adds."""

from __future__ import annotations

from dataclasses import dataclass

from clkit.config import opt
from clkit.strategies.wise.config import WISEConfig
from clkit.strategies.wise.strategy import WISE


@dataclass
class MaskNoneConfig(WISEConfig):  # type: ignore[misc]  # strategies are untyped to each other
    """Options of WISE, without a router."""

    routing: str = opt("none", "every sequence goes through a memory", choices=("none",))


class MaskNone(WISE):  # type: ignore[misc]
    """Memories learned exactly as WISE learns them, margins included, through which every sequence goes."""

    config_class = MaskNoneConfig
