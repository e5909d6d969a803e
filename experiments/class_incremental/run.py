"""Class-incremental learning on real images: every method of a configuration, over splits and seeds, in one table.

    python experiments/class_incremental/run.py [CONFIG] [--classes 2 4] [--seeds 0 1 2] [--only dkvb] [--finished]
    python experiments/class_incremental/run.py CONFIG --budgets 1.75 4     the areas under accuracy over memory too
    python experiments/class_incremental/run.py CONFIG --curves             accuracy after each task too
    python experiments/class_incremental/run.py CONFIG --pictures FOLDER    the same, drawn

A seed also gives the order of the classes. Runs that are finished are read, runs that were cut resume. Seconds are
processor time of a whole run, features cached. MiB are model (heads and statistics too) and exemplars after the last
task.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clkit import api, resolve
from clkit.config import RunConfig
from clkit.metrics.continual import budget_auc
from clkit.report.figures import Drawing, axis, styles
from clkit.report.history import History

HERE = Path(__file__).parent
COLUMNS = {
    "average_incremental_accuracy": "average accuracy",
    "average_accuracy": "last accuracy",
    "forgetting": "forgetting",
}
AREAS = {"average_incremental_accuracy": "AUC-A", "average_accuracy": "AUC-L"}
Rows = dict[str, list[dict[str, Any]]]


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(HERE / "cifar100_20.yaml"))
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 4], help="classes per task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="methods whose name contains this")
    parser.add_argument("--finished", action="store_true", help="the table of what is finished, nothing new")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[], help="MiB of a strategy's first, second, ... row"
    )
    parser.add_argument("--curves", action="store_true", help="a table of the accuracy after each task")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw it as FOLDER/NAME-CLASSES.png")
    arguments = parser.parse_args()
    for classes in arguments.classes:
        rows: Rows = {}
        strategies: dict[str, list[str]] = {}
        for seed in arguments.seeds:
            base = resolve.read(arguments.config)
            overrides = [f"seed={seed}", f"tasks.classes_per_task={classes}"]
            overrides += [f"tasks.order_seed={seed}", f"output_dir={base['output_dir']}/{classes}-{seed}"]
            content = resolve.merge(base, overrides)
            for config in api.expand(resolve.validate(content, origin=arguments.config), content):
                here = (Path(config.output_dir) / "metrics.json").exists()
                if arguments.only in config.name and (here or not arguments.finished):
                    rows.setdefault(config.name, []).append({"seed": seed, **one(config)})
                    strategies.setdefault(config.strategy.name, [])
                    if config.name not in strategies[config.strategy.name]:
                        strategies[config.strategy.name].append(config.name)
        if not rows:
            print(f"{classes} classes per task: no such run" + " is finished" * arguments.finished, flush=True)
            continue
        print(table(f"{classes} classes per task", rows), flush=True)
        if arguments.curves:
            print(curves(rows), flush=True)
        if arguments.pictures:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
            picture(arguments.pictures / f"{base['name']}-{classes}.png", rows)
        if arguments.budgets:
            print(areas(arguments.budgets, strategies, rows), flush=True)


def one(config: RunConfig) -> dict[str, Any]:
    """Metrics, mean accuracy over the tasks seen after each, processor seconds and MiB of one run."""
    result = api.run(config)
    print(f"{config.output_dir}: {result.metrics['average_accuracy']:.3f}", flush=True)
    found = {name: result.metrics[name] for name in COLUMNS}
    directory = Path(config.output_dir)
    spent, cost = json.loads((directory / "status.json").read_text())["cost"], History.read(directory).last_cost
    return {
        **found,
        "curve": [float(row[: k + 1].mean()) for k, row in enumerate(result.matrix)],
        "seconds": spent["cpu_seconds"],
        "mib": (cost["model_bytes"] + cost["exemplar_bytes"]) / 2**20,
    }


def table(title: str, rows: Rows) -> str:
    """Markdown: mean and standard deviation over seeds, in percent."""
    lines = [
        f"\n### {title}\n",
        f"| method | {' | '.join(COLUMNS.values())} | MiB | seconds | seeds |",
        "|---" * 7 + "|",
    ]
    for name, found in rows.items():
        cells = [spread([100 * f[column] for f in found if f[column] is not None], 1) for column in COLUMNS]
        seconds, mib = (statistics.median(f[key] for f in found) for key in ("seconds", "mib"))
        lines.append(f"| {name} | {' | '.join(cells)} | {mib:.2f} | {seconds:.0f} | {len(found)} |")
    return "\n".join(lines)


def curves(rows: Rows) -> str:
    """Markdown: mean accuracy in percent over the tasks seen so far, after each task, mean over seeds."""
    tasks = max(len(f["curve"]) for found in rows.values() for f in found)
    lines = [f"\n| after task | {' | '.join(str(k + 1) for k in range(tasks))} |", "|---" * (tasks + 1) + "|"]
    for name, found in rows.items():
        means = [statistics.mean(f["curve"][k] for f in found) for k in range(tasks)]
        lines.append(f"| {name} | {' | '.join('-' if m != m else f'{100 * m:.1f}' for m in means)} |")
    return "\n".join(lines)


def picture(path: Path, rows: Rows) -> None:
    """What :func:`curves` says, as lines with bands of a standard deviation."""

    def draw(axes: Any) -> None:
        for (name, found), style in zip(rows.items(), styles(len(rows)), strict=True):
            values = 100 * np.array([f["curve"] for f in found])
            mean, spread = values.mean(axis=0), values.std(axis=0, ddof=min(1, len(values) - 1))
            after = np.arange(1, len(mean) + 1)
            axes.plot(after, mean, label=name, marker="o", **style)
            axes.fill_between(after, mean - spread, mean + spread, color=style["color"], alpha=0.12, linewidth=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axis(axes, "tasks learned", "accuracy over classes seen, %")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3.5)

    title = "Accuracy over all classes seen so far, mean and standard deviation over seeds"
    Drawing(path.stem, title, title, draw, (620, 300)).figure().savefig(path, dpi=80)


def areas(budgets: Sequence[float], strategies: dict[str, list[str]], rows: Rows) -> str:
    """Markdown: area under accuracy (a fraction) over MiB, of the strategies with a row for each budget.

    Only seeds count of which the runs under all budgets are there.
    """
    lines = [f"\n| strategy, {budgets} MiB | {' | '.join(AREAS.values())} |", "|---" * 3 + "|"]
    for strategy, names in strategies.items():
        if len(names) == len(budgets):
            found = [{f["seed"]: f for f in rows[name]} for name in names]
            seeds = [seed for seed in found[0] if all(seed in under for under in found)]
            cells = [spread([budget_auc(budgets, [u[seed][a] for u in found]) for seed in seeds], 3) for a in AREAS]
            lines.append(f"| {strategy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation; a dash where nothing was measured."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


if __name__ == "__main__":
    main()
