"""What a person sees while a run goes on: progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any


class Bar:
    """A bar that shows nothing; the base of the one that does."""

    def advance(self, count: int) -> None:
        """``count`` more are done."""

    def show(self, losses: dict[str, float], rate: float) -> None:
        """Loss terms by name, and throughput in tokens (or labels) per second."""


class _RichBar(Bar):
    # Redrawing costs far more than a small model's step, so counts are handed on at most ten times a second.
    _EVERY = 0.1

    def __init__(self, display: Any, task: Any) -> None:
        self._display, self._task = display, task
        self._pending, self._next = 0, 0.0

    def advance(self, count: int) -> None:
        self._pending += count
        now = time.monotonic()
        if now >= self._next:
            self.flush()
            self._next = now + self._EVERY

    def flush(self) -> None:
        """Hand on what was counted."""
        self._display.advance(self._task, self._pending)
        self._pending = 0

    def remove(self) -> None:
        """Take it off the display."""
        self._display.remove_task(self._task)

    def show(self, losses: dict[str, float], rate: float) -> None:
        terms = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
        self._display.update(self._task, detail=f"{terms}  {rate:,.0f}/s")


class Progress:
    """Says what happens on standard error, with bars when that is a terminal.

    Args:
        enabled: False says nothing at all.
        bars: whether bars may be drawn.
    """

    def __init__(self, enabled: bool = True, bars: bool = True) -> None:
        self._enabled = enabled
        self._bars = enabled and bars and sys.stderr.isatty()
        self._display: Any = None  # where bars are drawn, while there are any

    def say(self, text: str) -> None:
        """One line for the user."""
        if self._enabled:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def task(self, title: str, total: int, done: int = 0) -> Iterator[Bar]:
        """A bar from ``done`` to ``total``, gone when the context ends; within another one's it stands below that."""
        if not self._bars:
            yield Bar()
            return
        within = self._display is not None
        with self._shown() as display:
            bar = _RichBar(display, display.add_task(title, total=total, completed=done, detail=""))
            try:
                yield bar
                bar.flush()
            finally:
                if within:
                    bar.remove()

    @contextlib.contextmanager
    def _shown(self) -> Iterator[Any]:
        """The display; two at a time would draw over each other."""
        if self._display is not None:
            yield self._display
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
        )
        with RichProgress(*columns, console=Console(stderr=True), transient=True) as display:
            self._display = display
            try:
                yield display
            finally:
                self._display = None
