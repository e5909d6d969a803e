"""Run the settings of settings.yaml over task orders and seeds, and compare each with its control.

    python experiments/text_sequence/run.py --out runs/text_sequence
    python experiments/text_sequence/run.py --out runs/text_sequence --settings naive replay --orders a --seeds 0
    python experiments/text_sequence/run.py --out runs/text_sequence --summary

Each run is an ordinary run directory OUT/SETTING/ORDER-SEED, made by `clkit run` in a process of its own with one
thread; finished ones are skipped (with other options than those asked for they are refused), killed ones go on where
they stopped. Writes OUT/summary.csv (one row per run) and
OUT/summary.md (one row per setting: mean and standard deviation over runs, difference from the control on the same
orders and seeds).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clkit import build, resolve
from clkit.errors import ClkitError, ConfigError, Problem, did_you_mean
from clkit.result import RunResult
from clkit.rundir import RunDirectory

HERE = Path(__file__).parent
METRICS = ("average_accuracy", "learning_accuracy", "forgetting", "bwt")


@dataclass(frozen=True)
class Run:
    """One setting on one order of the tasks with one seed."""

    setting: str
    order: str
    seed: int
    overrides: tuple[str, ...]
    directory: Path

    @property
    def finished(self) -> bool:
        """Whether its result is there."""
        return (self.directory / "metrics.json").exists() and (self.directory / "matrix.json").exists()


def plan(arguments: argparse.Namespace, content: dict[str, Any]) -> list[Run]:
    """All runs that are asked for, in the order of the seeds, then of the settings.

    Raises:
        ConfigError: a setting or an order is not in settings.yaml.
    """
    settings, orders = content["settings"], content["orders"]
    for asked, known, what in ((arguments.settings, settings, "setting"), (arguments.orders, orders, "order")):
        for name in asked or ():
            if name not in known:
                raise ConfigError(
                    f"--{what}s: unknown {what} '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}"
                )
    runs = []
    for seed, order, name in itertools.product(
        arguments.seeds, arguments.orders or orders, arguments.settings or settings
    ):
        setting = settings[name]
        overrides = [*setting["overrides"], *(content["rehearsal"] if setting.get("rehearsal") else [])]
        directory = arguments.out / name / f"{order}-{seed}"
        overrides += [f"tasks.tasks=[{','.join(orders[order])}]", f"seed={seed}", f"name={name}"]
        overrides += [f"output_dir={directory}", "tracking.progress=false", *arguments.override]
        runs.append(Run(name, order, seed, tuple(overrides), directory))
    return runs


def check(runs: Sequence[Run]) -> None:
    """Refuse finished runs that are not those asked for.

    Raises:
        ConfigError: with every such run, and in what it differs.
    """
    problems = []
    for run in runs:
        if run.finished:
            config = resolve.to_dict(build.located(resolve.load(HERE / "base.yaml", run.overrides)))
            directory = RunDirectory(run.directory)
            facts = directory.read("run.json") or {}
            problems += [Problem(str(run.directory), c) for c in directory.differences(config, facts.get("data", {}))]
    if problems:
        raise ConfigError.collect("Finished runs are not those asked for; delete them or give another --out:", problems)


def execute(run: Run) -> str:
    """Run one in a process of its own; adds what it cost to cost.json. Returns a line to print."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    run.directory.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (run.directory.parent / f"{run.directory.name}.log").open("a") as log:
        command = "import sys; from clkit.cli import main; sys.exit(main(sys.argv[1:]))"
        process = subprocess.Popen(
            [sys.executable, "-c", command, "run", str(HERE / "base.yaml"), *run.overrides],
            env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall, cpu = time.monotonic() - start, usage.ru_utime + usage.ru_stime
    path = run.directory / "cost.json"
    before = json.loads(path.read_text()) if path.exists() else {"wall_s": 0.0, "cpu_s": 0.0, "peak_mib": 0.0}
    cost = {
        "wall_s": round(before["wall_s"] + wall, 1),
        "cpu_s": round(before["cpu_s"] + cpu, 1),
        "peak_mib": max(before["peak_mib"], round(usage.ru_maxrss / 1024)),
    }
    path.write_text(json.dumps(cost))
    outcome = "finished" if process.returncode == 0 else f"failed with exit code {process.returncode}, see its .log"
    return f"{run.setting} {run.order}-{run.seed}: {outcome} after {wall:.0f} s ({cpu:.0f} s of CPU time)"


def collect(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per finished run."""
    rows = []
    for run in runs:
        if run.finished:
            result, cost = RunResult.load(run.directory), run.directory / "cost.json"
            row = {"setting": run.setting, "order": run.order, "seed": run.seed}
            row |= {key: result.metrics.get(key) for key in METRICS}
            rows.append(row | (json.loads(cost.read_text()) if cost.exists() else {}))
    return rows


def table(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Markdown: one row per setting that has a finished run."""
    titles = ["setting", "runs", "average accuracy", "learning accuracy", "forgetting", "control"]
    titles += ["difference of average accuracy", "of forgetting", "CPU s"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, setting in settings.items():
        mine = {(r["order"], r["seed"]): r for r in rows if r["setting"] == name}
        if not mine:
            continue
        control = setting.get("control", "")
        pairs = [
            (r, c) for r in mine.values() for c in rows
            if c["setting"] == control and (c["order"], c["seed"]) == (r["order"], r["seed"])
        ]  # fmt: skip
        cpu = [r["cpu_s"] for r in mine.values() if r.get("cpu_s")]
        cells = [name, str(len(mine)), *(_mean([r[k] for r in mine.values()]) for k in METRICS[:3]), control]
        cells += [_difference(pairs, "average_accuracy"), _difference(pairs, "forgetting")]
        cells.append(f"{statistics.fmean(cpu):.0f}" if cpu else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    spread = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.3f}{spread}" if known else ""


def _difference(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], key: str) -> str:
    gaps = [a[key] - b[key] for a, b in pairs if a[key] is not None and b[key] is not None]
    if not gaps:
        return ""
    spread = f" ({min(gaps):+.3f} to {max(gaps):+.3f})" if len(gaps) > 1 else ""
    return f"{statistics.fmean(gaps):+.3f}{spread}"


def write(arguments: argparse.Namespace, runs: Sequence[Run], settings: dict[str, Any]) -> None:
    """Write and print what is finished."""
    rows = collect(runs)
    if not rows:
        print(f"no finished run in {arguments.out}")
        return
    columns = ["setting", "order", "seed", *METRICS, "wall_s", "cpu_s", "peak_mib"]
    with (arguments.out / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    text = table(rows, settings)
    (arguments.out / "summary.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, run what is not finished, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/text_sequence"), help="default runs/text_sequence")
    parser.add_argument("--settings", nargs="+", help="names in settings.yaml; default all")
    parser.add_argument("--orders", nargs="+", help="names in settings.yaml; default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default 2)")
    parser.add_argument(
        "--override", nargs="+", default=[], help="key=value for all runs, such as tasks.eval_limit=200"
    )
    parser.add_argument("--summary", action="store_true", help="run nothing, compare what is finished")
    arguments = parser.parse_args(argv)
    content = yaml.safe_load((HERE / "settings.yaml").read_text(encoding="utf-8"))
    try:
        runs = plan(arguments, content)
        failed = False
        if not arguments.summary:
            check(runs)
            with ThreadPoolExecutor(arguments.jobs) as pool:
                for line in pool.map(execute, [r for r in runs if not r.finished]):
                    print(line, flush=True)
                    failed |= "failed" in line
        write(arguments, runs, content["settings"])
    except ClkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
