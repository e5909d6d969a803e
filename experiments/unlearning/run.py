"""Serve requests to forget TOFU authors by every method of settings.yaml, and compare what is left and what it cost.

    python experiments/unlearning/run.py --out runs/unlearning
    python experiments/unlearning/run.py --out runs/unlearning --methods retrain npo --forget 2 --seeds 0
    python experiments/unlearning/run.py --out runs/unlearning --summary

For each base of the settings and each seed: one run learns the authors (OUT/BASE-SEED/full). For each number of authors
and each method a request goes to it through `clkit unlearn`, with a ledger of its own. Then measure.py looks at every
model. Each of these is a process with one thread; what is finished is skipped, what was killed goes on. Writes
OUT/summary.csv and OUT/summary.md: model utility, forget quality against retraining on the same base, membership
inference, extraction, relearning, and the cost of the request as a fraction of retraining in CPU time.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tofu
import yaml

from clkit.errors import ClkitError, ConfigError, did_you_mean
from clkit.metrics.unlearning import forget_quality

HERE = Path(__file__).parent
COLUMNS = (
    "method", "base", "forget", "seed", "model_utility", "forget_quality", "ks_distance", "ks_bound", "p_forget",
    "auc_loss", "auc_reference", "extraction", "relearned", "cpu_s", "cost_ratio",
)  # fmt: skip
CLI = [sys.executable, "-c", "import sys; from clkit.cli import main; sys.exit(main(sys.argv[1:]))"]
# Figures are wanted of models that fail too, so nothing is stopped by a gate.
OPEN_GATES = ["--max-utility-loss=1e9", "--max-membership=1", "--max-extraction=1", "--keep-near-duplicates"]


@dataclass(frozen=True)
class Request:
    """One request served by one method."""

    name: str
    method: str
    base: str
    options: tuple[str, ...]
    forget: int
    seed: int
    out: Path

    @property
    def source(self) -> Path:
        """The run that learned the authors."""
        return self.out / f"{self.base}-{self.seed}" / "full"

    @property
    def folder(self) -> Path:
        """Ledger, log, costs and figures of this request."""
        return self.source.parent / f"{self.name}-{self.forget}"

    @property
    def new_run(self) -> Path | None:
        """The run without the authors, once it is certified."""
        found = sorted((self.folder / "ledger").glob("*/certificate.json"))
        if not found:
            return None
        return found[0].parent / str(json.loads(found[0].read_text())["new_run"]["path"])


def plan(arguments: argparse.Namespace, settings: dict[str, Any]) -> list[Request]:
    """Everything that is asked for, seed by seed.

    Raises:
        ConfigError: a method is not in the settings.
    """
    methods = settings["methods"]
    for name in arguments.methods or ():
        if name not in methods:
            raise ConfigError(
                f"--methods: unknown method '{name}'.{did_you_mean(name, methods)} Known: {', '.join(methods)}"
            )
    found = []
    for seed, count, name in itertools.product(
        arguments.seeds, arguments.forget or settings["forget"], arguments.methods or methods
    ):
        entry = methods[name]
        options = tuple(entry.get("set", ()))
        found.append(
            Request(name, entry.get("method", name), entry["base"], options, count, seed, arguments.out.absolute())
        )
    return found


def execute(command: Sequence[str | Path], folder: Path, step: str, **environment: str) -> bool:
    """Run a process; adds its CPU time to cost.json under ``step``. Whether it succeeded."""
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    with (folder / f"{step}.log").open("a") as log:
        process = subprocess.Popen([str(c) for c in command], env=env, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    file = folder / "cost.json"
    costs = json.loads(file.read_text()) if file.exists() else {}
    costs[step] = round(costs.get(step, 0.0) + usage.ru_utime + usage.ru_stime, 1)
    file.write_text(json.dumps(costs))
    return process.returncode == 0


def learn(request: Request, settings: dict[str, Any], overrides: Sequence[str]) -> bool:
    """The run that learns the authors."""
    if (request.source / "metrics.json").exists():
        return True
    base = settings["bases"][request.base]
    tasks = tofu.write_tasks(request.source.parent / "data", settings, base["tasks"])
    arguments = [f"tasks.tasks=[{','.join(map(str, tasks))}]", f"seed={request.seed}", "tracking.progress=false"]
    arguments += [f"output_dir={request.source}", *base["overrides"], *overrides]
    command = [*CLI, "run", HERE / "base.yaml", *arguments, "--quiet"]
    return execute(command, request.source.parent, "learn", CLKIT_LEDGER=str(request.source.parent / "none"))


def serve(request: Request, settings: dict[str, Any]) -> bool:
    """The request, in a ledger of its own: what one method forgot does not hold for the next."""
    if request.new_run is not None:
        return True
    file = request.folder / "request.json"
    tofu.write_request(file, settings, request.forget)
    command = [*CLI, "unlearn", "--run", request.source, "--request", file, "--method", request.method, *OPEN_GATES]
    command += ["--set", *request.options] if request.options else []
    return execute(command, request.folder, "serve", CLKIT_LEDGER=str(request.folder / "ledger"))


def look(request: Request, settings: Path) -> bool:
    """Figures of the new model."""
    output = request.folder / "figures.json"
    if output.exists():
        return True
    command = [sys.executable, HERE / "measure.py", request.new_run or "", "--forget", str(request.forget)]
    command += ["--settings", settings, "--output", output]
    return execute(command, request.folder, "measure", CLKIT_LEDGER=str(request.folder / "ledger"))


def row(request: Request, reference: Request | None) -> dict[str, Any] | None:
    """The figures of one request, or None when there are none yet; ``reference`` is retraining on the same base."""
    file = request.folder / "figures.json"
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    cost = json.loads((request.folder / "cost.json").read_text())["serve"]
    result: dict[str, Any] = {
        "method": request.method, "base": request.base, "forget": request.forget, "seed": request.seed,
        "model_utility": found["model_utility"], "p_forget": found["sets"]["forget"]["probability"],
        "auc_loss": found["membership"]["loss"]["auc"][0], "auc_reference": found["membership"]["reference"]["auc"][0],
        "extraction": found["extraction"]["forgotten"], "cpu_s": cost,
        "relearned": found["relearning"]["after"] - found["relearning"]["before"],
    }  # fmt: skip
    if reference is not None and (reference.folder / "figures.json").exists():
        other = json.loads((reference.folder / "figures.json").read_text())
        quality = forget_quality(found["sets"]["forget"]["ratios"], other["sets"]["forget"]["ratios"])
        if quality is not None:
            names = ("forget_quality", "ks_distance", "ks_bound")
            result |= dict(zip(names, (quality.p_value, quality.distance, quality.bound), strict=True))
        result["cost_ratio"] = cost / json.loads((reference.folder / "cost.json").read_text())["serve"]
    return result


def write(out: Path, requests: Sequence[Request]) -> None:
    """Write and print what is finished."""
    retrained = {(r.base, r.forget, r.seed): r for r in requests if r.method == "retrain"}
    rows = [found for r in requests if (found := row(r, retrained.get((r.base, r.forget, r.seed))))]
    if not rows:
        print(f"no figures in {out}")
        return
    with (out / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(_cell(found.get(c)) for c in COLUMNS)} |" for found in rows]
    (out / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, do what is not finished, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/unlearning"), help="default runs/unlearning")
    parser.add_argument("--settings", type=Path, default=HERE / "settings.yaml", help="default: beside this file")
    parser.add_argument("--methods", nargs="+", help="names in the settings; default all")
    parser.add_argument("--forget", nargs="+", type=int, help="numbers of authors; default those of the settings")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default 0")
    parser.add_argument("--override", nargs="+", default=[], help="key=value for the runs that learn")
    parser.add_argument("--summary", action="store_true", help="run nothing, compare what is finished")
    arguments = parser.parse_args(argv)
    settings = yaml.safe_load(arguments.settings.read_text(encoding="utf-8"))
    failed = False
    try:
        requests = plan(arguments, settings)
        for request in [] if arguments.summary else requests:
            done = (
                learn(request, settings, arguments.override)
                and serve(request, settings)
                and look(request, arguments.settings)
            )
            failed |= not done
            outcome = "done" if done else f"failed, see the logs in {request.folder} and {request.source.parent}"
            print(f"{request.name} {request.forget} authors, seed {request.seed}: {outcome}", flush=True)
        write(arguments.out.absolute(), requests)
    except ClkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
