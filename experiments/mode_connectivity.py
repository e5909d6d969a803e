"""Accuracy on old, new and all tasks along the path between two adapters (mode connectivity, as in the I-LoRA paper).

The first adapter has learned the old tasks, the second those and then the new ones, for example:

    clkit run runs.yaml output_dir=runs/old  tasks.tasks='[law.jsonl]'
    clkit run runs.yaml output_dir=runs/both tasks.tasks='[law.jsonl, medicine.jsonl]'
    python experiments/mode_connectivity.py runs/old/export runs/both/export --points 11 --out connectivity

Model, tasks and scoring are those of the second adapter's run (the config.yaml beside it, or --config); its last task
is the new one unless --new says how many are. Writes connectivity.csv (one row per space and point; a task called like
another column, such as `new`, stands in one called `task new`) and connectivity.png. A straight line between the ends
means nothing is gained in between; a bulge in `all` towards better scores is a point that trades old for new better
than either end.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from clkit import build, resolve
from clkit.analysis import check_adapter, interpolate, save_adapter
from clkit.errors import ClkitError, ConfigError
from clkit.evaluation import SCORERS
from clkit.evaluation.base import evaluate
from clkit.loader import Encodings


def score_path(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """One row per space and point: weight, score of each task, and means over old, new and all tasks.

    And whether higher scores are better.
    """
    config = resolve.load(arguments.config or arguments.b.parent / "config.yaml")
    tasks = build.make_tasks(config)
    directions = {bool(SCORERS.get(task.metric).higher_is_better) for task in tasks}
    if len(directions) > 1:
        metrics = ", ".join(f"{task.name} by {task.metric}" for task in tasks)
        raise ConfigError(
            f"Of some tasks a higher score is better, of others a lower one ({metrics}): no mean tells which."
        )
    first_new = len(tasks) - arguments.new
    if first_new < 1 or arguments.new < 1 or arguments.points < 2:
        raise ConfigError(
            f"--new {arguments.new}, --points {arguments.points}: expected 1 to {len(tasks) - 1} new tasks "
            f"(the run has {len(tasks)} tasks) and at least 2 points."
        )
    model = build.make_model(config.model, tasks, config.seed, print)
    build.make_engine(config.engine).prepare(model)
    base: Any = model.module
    for adapter in (arguments.a, arguments.b):
        check_adapter(adapter, base)
    base = base.unload()  # the frozen model in the type it was trained with, without the fresh adapter
    encodings = Encodings(model, tasks)
    rows = []
    for space in ("factor", "delta") if arguments.space == "both" else (arguments.space,):
        for i in range(arguments.points):
            weight = i / (arguments.points - 1)
            with tempfile.TemporaryDirectory() as folder:
                save_adapter(interpolate(arguments.a, arguments.b, weight, space), folder, like=arguments.a)
                model.module = PeftModel.from_pretrained(base, folder).to(model.device)
            scores = [evaluate(model, t, encodings.eval(t), metric=t.metric, options=config.eval).value for t in tasks]
            model.module.unload()
            means = {
                "old": statistics.fmean(scores[:first_new]),
                "new": statistics.fmean(scores[first_new:]),
                "all": statistics.fmean(scores),
            }
            row = {"space": space, "weight": round(weight, 4), **means}
            names = [f"task {t.name}" if t.name in row else t.name for t in tasks]
            rows.append({**row, **dict(zip(names, scores, strict=True))})
            print(f"{space} {weight:.2f}: " + "  ".join(f"{k} {v:.3f}" for k, v in means.items()), flush=True)
    return rows, directions.pop()


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Old, new and all over the weight; delta space dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5))
    for space, line in (("factor", "-"), ("delta", "--")):
        mine = [r for r in rows if r["space"] == space]
        for key, colour in (("old", "tab:blue"), ("new", "tab:orange"), ("all", "black")):
            if mine:
                axes.plot(
                    [r["weight"] for r in mine],
                    [r[key] for r in mine],
                    line,
                    color=colour,
                    marker=".",
                    label=f"{key} ({space})",
                )
    axes.set_xlabel("weight of the second adapter")
    axes.set_ylabel("score")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, score the path, write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, help="adapter directory after the old tasks")
    parser.add_argument("b", type=Path, help="adapter directory after old and new tasks")
    parser.add_argument("--config", type=Path, help="run configuration; default: config.yaml beside the second adapter")
    parser.add_argument("--new", type=int, default=1, help="how many of the run's last tasks are new (default 1)")
    parser.add_argument("--points", type=int, default=11, help="points on the path, both ends included (default 11)")
    parser.add_argument("--space", choices=("factor", "delta", "both"), default="both", help="default both")
    parser.add_argument("--out", type=Path, default=Path("connectivity"), help="path of the files, without extension")
    arguments = parser.parse_args(argv)
    try:
        rows, higher = score_path(arguments)
    except ClkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table = arguments.out.with_suffix(".csv")
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, arguments.out.with_suffix(".png"))
    best = (max if higher else min)(rows, key=lambda r: r["all"])
    print(f"best mean over all tasks: {best['all']:.3f} at {best['weight']} in {best['space']} space; table in {table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
