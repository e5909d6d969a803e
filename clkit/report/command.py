"""What ``clkit report`` does: write the page and its figures, or serve the page of a run that goes on."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clkit.errors import ConfigError


def add_report_command(commands: Any, add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = add(
        commands,
        "report",
        _report,
        "write report.html for one run, or one that compares several",
        "clkit report runs/quickstart/naive runs/quickstart/replay --output report.html",
    )
    parser.add_argument(
        "run_dirs", metavar="RUN", nargs="*", type=Path, help="run directories, or directories of `clkit edit`"
    )
    parser.add_argument("--sweep", metavar="DIR", type=Path, help="all finished runs below a directory")
    parser.add_argument("--output", type=Path, help="the file to write (default: report.html in the first directory)")
    parser.add_argument("--no-figures", action="store_true", help="don't write the figures as SVG and PNG files too")
    parser.add_argument("--live", action="store_true", help="serve the page of one run and follow it as it goes on")
    parser.add_argument("--port", type=int, default=8008, help="of --live (default: %(default)s; 0 = any)")


def _report(arguments: Any) -> None:
    if arguments.live:
        if len(arguments.run_dirs) != 1 or arguments.sweep or arguments.output:
            raise ConfigError("--live: follows one run and writes nothing; give one run directory and no other option")
        from clkit.report.live import serve

        serve(arguments.run_dirs[0], arguments.port)
        return
    from clkit.report import load, runs_below, write_report

    paths = [*arguments.run_dirs, *(runs_below(arguments.sweep) if arguments.sweep else [])]
    if not paths:
        raise ConfigError("clkit report: give run directories, or --sweep DIR")
    results, edits = load(paths)
    first = arguments.run_dirs[0] if arguments.run_dirs else arguments.sweep
    target = arguments.output or first / "report.html"
    figures = None if arguments.no_figures else target.with_name(f"{target.stem}_figures")
    title = "" if arguments.run_dirs else f"Sweep {arguments.sweep.absolute().name}"
    write_report(results, target, edits=edits, figures=figures, title=title)
    print(target)
    if figures is not None:
        print(f"{figures}: the figures as SVG and PNG")
