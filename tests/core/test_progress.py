"""Progress bars: what they show on a terminal, and that elsewhere there are none."""

from __future__ import annotations

import io
import re
import sys

from clkit import api, resolve
from clkit.progress import Progress


class Terminal(io.StringIO):
    """Keeps what is written to it."""

    def isatty(self):
        return True


def terminal(monkeypatch) -> Terminal:
    """Standard error from now on; not a fixture, because pytest puts its own in place when the test begins."""
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    return made


def plain(shown: Terminal) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())


def test_a_run_shows_steps_loss_terms_by_name_throughput_and_the_time_that_is_left(monkeypatch, text_content):
    content = {**text_content, "strategy": "lwf", "eval": {**text_content["eval"], "every_steps": 2}}
    watched = terminal(monkeypatch)
    api.run(resolve.validate(content), progress=Progress())
    shown = plain(watched)
    assert re.search(
        r"\[2/3\] blue .*4/4 \d:\d\d:\d\d cross_entropy \d+\.\d{4} distillation \d+\.\d{4}  [\d,]+/s", shown
    )
    assert "scoring after blue" in shown and "step 2 of blue: red 0." in shown


def test_a_bar_within_a_bar_is_drawn_by_one_display_and_leaves_nothing(monkeypatch):
    watched = terminal(monkeypatch)
    progress = Progress()
    for _ in range(2):
        with progress.task("outer", 4) as outer:
            outer.advance(1)
            with progress.task("inner", 2) as inner:
                inner.advance(2)
            outer.advance(3)
    assert watched.getvalue().count("\x1b[?25l") == 2, "the cursor is hidden once for each outer bar"
    assert re.search(r"outer .* 4/4 ", plain(watched)) and "inner" in plain(watched)
    last = plain(watched).replace("\r", "\n").strip().splitlines()[-1]
    assert "inner" not in last


def test_no_bars_where_nobody_watches(monkeypatch):
    watched = terminal(monkeypatch)
    for progress in (Progress(bars=False), Progress(enabled=False)):
        with progress.task("outer", 4) as bar:
            bar.advance(4)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress().task("outer", 4) as bar:
        bar.advance(4)
    assert watched.getvalue() == sys.stderr.getvalue() == ""
