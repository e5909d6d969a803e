"""Serve requests to forget TOFU authors by every method of settings.yaml, and compare what is left and what it cost.

    python experiments/unlearning/run.py --out runs/unlearning
    python experiments/unlearning/run.py --out runs/unlearning --methods retrain npo --forget 2 --seeds 0
    python experiments/unlearning/run.py --out runs/unlearning --summary
    python experiments/unlearning/run.py --out runs/small --settings experiments/unlearning/small.yaml

For each base of the settings and each seed: one run learns the authors (OUT/BASE-SEED/full), from a protected base of
its own (OUT/BASE-SEED/m0) where the settings describe one; with `rewrite` that base learns the texts as the model
itself rewrote them (dp_prompt), in the place of noise. For each number of authors and each method a request goes to it
through `clkit unlearn`, with a ledger of its own. Then measure.py looks at every model. All with one thread; what is
finished is skipped, what was killed goes on. Writes OUT/summary.csv and OUT/summary.md: model utility, forget quality
against retraining on the same base (a protected base names which), membership inference, extraction, relearning,
rounded weights, and cost in CPU time: of the base before any request (phase 1, and what is deployed), of the whole
request, and of its training alone, both of these also as fractions of retraining.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import tofu
import torch

from clkit import build, cli, resolve
from clkit.errors import ClkitError, ConfigError, did_you_mean
from clkit.metrics.unlearning import forget_quality
from clkit.models.lora import base_model
from clkit.strategies.dp2unlearning import rewritten as rewriting
from clkit.strategies.dp2unlearning.rewrite import DpPrompt

HERE = Path(__file__).parent
COLUMNS = (
    "name", "base", "forget", "seed", "model_utility", "forget_quality", "ks_distance", "ks_bound", "p_forget",
    "auc_loss", "auc_reference", "extraction", "p_8_bit", "p_4_bit", "relearn_before", "relearn_after",
    "protect_s", "deploy_s", "cpu_s", "train_s", "cost_ratio", "train_ratio",
)  # fmt: skip
NOTHING = "none"  # a method of the settings: the model before any request
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
    def certificate(self) -> Path | None:
        """Of the run without the authors, once there is one."""
        return next((self.folder / "ledger").glob("*/certificate.json"), None)

    @property
    def new_run(self) -> Path | None:
        """The run without the authors, once it is certified; that with them where no method takes them out."""
        if self.method == NOTHING:
            return self.source
        found = self.certificate
        return None if found is None else found.parent / str(json.loads(found.read_text())["new_run"]["path"])


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


def execute(work: Callable[[list[str]], int], arguments: Sequence[str | Path], folder: Path, step: str) -> bool:
    """Do a piece of work as from the command line; adds its CPU time to cost.json. Whether it succeeded.

    Ledgers stand below ``folder``; what is printed goes to a log of the step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["CLKIT_LEDGER"] = str(folder / "ledger")
    since = time.process_time()
    with (folder / f"{step}.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            code = work([str(a) for a in arguments])
        except (ClkitError, OSError, RuntimeError, ValueError):  # the others go on
            traceback.print_exc()
            code = 1
    file = folder / "cost.json"
    costs = json.loads(file.read_text()) if file.exists() else {}
    costs[step] = round(costs.get(step, 0.0) + time.process_time() - since, 1)
    file.write_text(json.dumps(costs))
    if code == 130:  # the command was interrupted, and with it this script
        raise KeyboardInterrupt
    return code == 0


def learn(request: Request, settings: dict[str, Any], overrides: Sequence[str]) -> bool:
    """The run that learns the authors, after the protected base that it starts from, if any."""
    base, folder = settings["bases"][request.base], request.source.parent
    tasks = tofu.write_tasks(folder / "data", settings, base["tasks"])
    common = [f"seed={request.seed}", "tracking.progress=false", *settings.get("overrides", ()), *overrides]
    steps = {"learn": (request.source, tasks, base["overrides"])}
    if "protected" in base:
        m0, rewritten = folder / "m0", folder / "rewritten"
        deployed = [*base["overrides"], "strategy=dp2unlearning", f"strategy.base={m0}"]
        steps = {
            "protect": (m0, tasks, [*settings.get("protected", ()), *base["protected"]]),
            "learn": (request.source, tasks, deployed),
        }
        if "rewrite" in base:
            if not (rewritten / rewriting.NAME).exists():
                given = [str(rewritten), str(base["rewrite"]["epsilon"]), str(base["rewrite"]["tokens"])]
                if not execute(rewrite, [*given, _tasks(tasks), *common], folder, "rewrite"):
                    return False
            steps["protect"] = m0, [rewritten / task.name for task in tasks], base["protected"]
    for step, (target, read, own) in steps.items():
        command = ["run", HERE / "base.yaml", _tasks(read), *common, *own, f"output_dir={target}", "--quiet"]
        done = (target / "metrics.json").exists()
        if not done and not execute(cli.main, command, folder, step):
            return False
    return True


def _tasks(folders: Sequence[Path]) -> str:
    return f"tasks.tasks=[{','.join(map(str, folders))}]"


def rewrite(arguments: list[str]) -> int:
    """Let the model rewrite the training texts: OUT, epsilon per token, longest text, overrides of base.yaml."""
    config = resolve.load(HERE / "base.yaml", arguments[3:])
    tasks = build.make_tasks(config)
    model: Any = build.make_model(config.model, tasks, config.seed, print)
    found = DpPrompt(base_model(model.module), model.tokenizer, float(arguments[1]), max_new_tokens=int(arguments[2]))
    print(rewriting.write_tasks(tasks, Path(arguments[0]), found))
    return 0


def serve(request: Request, settings: dict[str, Any]) -> bool:
    """The request, in a ledger of its own: what one method forgot does not hold for the next."""
    if request.new_run is not None:
        return True
    file = request.folder / "request.json"
    tofu.write_request(file, settings, request.forget)
    command = ["unlearn", "--run", request.source, "--request", file, "--method", request.method, *OPEN_GATES]
    command += ["--set", *request.options] if request.options else []
    return execute(cli.main, command, request.folder, "serve")


def look(request: Request, settings: Path) -> bool:
    """Figures of the new model."""
    output = request.folder / "figures.json"
    if output.exists():
        return True
    command = [request.new_run or "", "--forget", str(request.forget)]
    command += ["--settings", settings, "--output", output]
    command += [] if request.certificate is None else ["--certificate", request.certificate]
    return execute(measure.main, command, request.folder, "measure")


def row(request: Request, reference: Request | None) -> dict[str, Any] | None:
    """The figures of one request, or None when there are none yet; ``reference`` is retraining on the same base."""
    file = request.folder / "figures.json"
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    cost, before = _costs(request.folder).get("serve", 0.0), _costs(request.source.parent)
    result: dict[str, Any] = {
        "name": request.name, "base": request.base, "forget": request.forget, "seed": request.seed,
        "model_utility": found["model_utility"], "p_forget": found["sets"]["forget"]["probability"],
        "auc_loss": found["membership"]["loss"]["auc"][0], "auc_reference": found["membership"]["reference"]["auc"][0],
        "extraction": found["extraction"]["forgotten"], "cpu_s": cost,
        "p_8_bit": found.get("rounded", {}).get("8"), "p_4_bit": found.get("rounded", {}).get("4"),
        "relearn_before": found["relearning"]["before"], "relearn_after": found["relearning"]["after"],
        "protect_s": before.get("protect", 0.0) + before.get("rewrite", 0.0),
        "deploy_s": before["learn"], "train_s": trained(request),
    }  # fmt: skip
    if reference is not None and (reference.folder / "figures.json").exists():
        other = json.loads((reference.folder / "figures.json").read_text())
        quality = forget_quality(found["sets"]["forget"]["ratios"], other["sets"]["forget"]["ratios"])
        if quality is not None:
            names = ("forget_quality", "ks_distance", "ks_bound")
            result |= dict(zip(names, (quality.p_value, quality.distance, quality.bound), strict=True))
        result["cost_ratio"] = cost / _costs(reference.folder)["serve"]
        result["train_ratio"] = result["train_s"] / trained(reference)
    return result


def trained(request: Request) -> float:
    """CPU seconds of the new run alone: loading, training and its scores; no gates, and no accounting."""
    found: float = json.loads(((request.new_run or Path()) / "status.json").read_text())["cost"]["cpu_seconds"]
    return found


def _costs(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "cost.json").read_text())
    return found


def write(out: Path, requests: Sequence[Request], bases: dict[str, Any]) -> None:
    """Write and print what is finished."""
    retrained = {(r.base, r.forget, r.seed): r for r in requests if r.method == "retrain"}
    against = {r: (bases[r.base].get("reference", r.base), r.forget, r.seed) for r in requests}
    rows = [found for r in requests if (found := row(r, retrained.get(against[r])))]
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
    settings = tofu.read_settings(arguments.settings)
    torch.set_num_threads(1)
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
        write(arguments.out.absolute(), requests, settings["bases"])
    except ClkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
