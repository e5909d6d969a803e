"""``clkit sweep``: do the runs of a sweep and print what they say together."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clkit.errors import ConfigError, RunsFailed

_EXAMPLES = """examples:
  clkit sweep sweep.yaml --dry-run                     list the runs, start nothing
  clkit sweep sweep.yaml sweep.launcher.jobs=2         two processes at a time
  clkit sweep sweep.yaml sweep.launcher=slurm          as Slurm jobs (pip install 'clkit[slurm]')
  clkit sweep sweep.yaml 'sweep.axes.train.learning_rate=[0.01,0.1]' sweep.seeds=5
  clkit sweep sweep.yaml --retry-failed                the same command resumes; this one does failed runs again
  clkit sweep --summary runs/my_sweep                  print the tables again

exit code: 0 all runs finished, 2 something to mend before any starts, 3 some runs failed, 130 interrupted"""


def add_sweep_command(commands: Any, add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    sweep = add(
        commands,
        "sweep",
        _sweep,
        "do a run for each setting and seed of a sweep, and compare them; the same command again resumes",
        "",
    )
    sweep.epilog = _EXAMPLES
    sweep.add_argument("config", metavar="CONFIG", nargs="?", help="a YAML file with a `sweep` section")
    sweep.add_argument(
        "overrides", nargs="*", metavar="key=value", help="options to change, such as train.epochs=3 or sweep.seeds=5"
    )
    sweep.add_argument("--small", action="store_true", help="apply the overrides in `sweep.small` first")
    sweep.add_argument("--dry-run", action="store_true", help="list the runs and what is known of them, start nothing")
    sweep.add_argument("--retry-failed", action="store_true", help="also do runs again that failed before")
    sweep.add_argument("--yes", action="store_true", help="more than 500 runs are meant")
    sweep.add_argument(
        "--summary", metavar="DIR", type=Path, help="print the tables of a sweep's directory, run nothing"
    )
    sweep.add_argument("--quiet", action="store_true", help="print nothing but errors and the tables")


def _sweep(arguments: Any) -> None:
    if arguments.summary is not None:
        if arguments.config is not None:
            raise ConfigError("--summary: reads a sweep's directory; leave CONFIG out")
        _summary(arguments.summary)
        return
    if arguments.config is None:
        raise ConfigError("CONFIG: give a YAML file with a `sweep` section, or --summary DIR")
    from clkit.progress import Progress
    from clkit.sweep.plan import load

    sweep = load(arguments.config, arguments.overrides, small=arguments.small, yes=arguments.yes)
    if arguments.dry_run:
        _dry_run(sweep)
        return
    progress = Progress(enabled=not arguments.quiet)
    if sweep.options.search.trials:
        from clkit.sweep.search import search

        failed = search(sweep, progress)
    else:
        from clkit.sweep.drive import run_all

        failed = run_all(sweep, retry_failed=arguments.retry_failed, progress=progress)
    if len(failed) < len(sweep.runs) or not sweep.runs:
        _summary(sweep.directory)
    if failed:
        lines = [f"  {run.directory}: {reason}" for run, reason in failed.items()]
        again = "" if sweep.options.search.trials else "; --retry-failed does them again"
        raise RunsFailed(f"{len(failed)} runs failed{again}:\n" + "\n".join(lines))


def _dry_run(sweep: Any) -> None:
    from clkit.sweep.drive import state_of
    from clkit.sweep.plan import check

    if sweep.options.search.trials:
        print(f"{sweep.name}: a search of {sweep.options.search.trials} trials x {len(sweep.seeds)} seeds, over:")
        for axis in sweep.axes:
            print(f"  {', '.join(axis.keys)}: {', '.join(axis.names)}")
        return
    hashes = check(sweep.runs, sweep.origin)
    width = max(len(str(run)) for run in sweep.runs)
    for run in sweep.runs:
        print(f"{run!s:<{width}}  {hashes[run]}  {state_of(run)[0]:<11}  {run.directory}")
    print(f"{len(sweep.runs)} runs: {len(sweep.runs) // len(sweep.seeds)} settings x {len(sweep.seeds)} seeds")


def _summary(directory: Path) -> None:
    from clkit.sweep.summary import summarise
    from clkit.sweep.tables import markdown, write

    summary = summarise(directory)
    print(f"\n{markdown(summary)}\n")
    print("Written: " + ", ".join(str(path) for path in write(summary, directory)))
    print(f"To look at: clkit report --sweep {shlex.quote(str(directory))}")
