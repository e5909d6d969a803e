"""Ctrl-C and SIGTERM: stop at the end of a step, with the state saved."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM arrived; the state was saved at the end of the step. Its text says where, and how to go on."""


class stop_on_signal:
    """Within the context SIGINT and SIGTERM ask for a stop at the end of the step; a second one stops at once."""

    def __init__(self, request: Callable[[], None]) -> None:
        self._request = request
        self._old: dict[int, Any] = {}

    def _handle(self, number: int, frame: Any) -> None:
        self._request()
        signal.signal(number, self._old[number] or signal.SIG_DFL)

    def __enter__(self) -> None:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        except ValueError:  # signals can be set in the main thread only; elsewhere the caller's handling stays
            self._old = {}

    def __exit__(self, *error: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
