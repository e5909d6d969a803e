"""Class-incremental learning on real images: every method of a configuration, over splits and seeds, in one table.

    python experiments/class_incremental/run.py [CONFIG] [--classes 2 4] [--seeds 0 1 2] [--only dkvb] [--finished]

A seed also gives the order of the classes. Runs that are finished are read, runs that were cut resume. Seconds are
processor time of a whole run in this process, features cached.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from clkit import api, resolve

HERE = Path(__file__).parent
COLUMNS = {
    "average_incremental_accuracy": "average accuracy",
    "average_accuracy": "last accuracy",
    "forgetting": "forgetting",
}


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(HERE / "cifar100_20.yaml"))
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 4], help="classes per task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="methods whose name contains this")
    parser.add_argument("--finished", action="store_true", help="the table of what is finished, nothing new")
    arguments = parser.parse_args()
    for classes in arguments.classes:
        rows: dict[str, list[dict[str, float]]] = {}
        for seed in arguments.seeds:
            base = resolve.read(arguments.config)
            overrides = [f"seed={seed}", f"tasks.classes_per_task={classes}"]
            overrides += [f"tasks.order_seed={seed}", f"output_dir={base['output_dir']}/{classes}-{seed}"]
            content = resolve.merge(base, overrides)
            for config in api.expand(resolve.validate(content, origin=arguments.config), content):
                here = (Path(config.output_dir) / "metrics.json").exists()
                if arguments.only in config.name and (here or not arguments.finished):
                    rows.setdefault(config.name, []).append(one(config))
        print(table(f"{classes} classes per task", rows), flush=True)


def one(config) -> dict[str, float]:
    """Metrics and processor seconds of one run."""
    since = time.process_time()
    result = api.run(config)
    file = Path(config.output_dir) / "seconds.json"
    if not file.exists():
        file.write_text(json.dumps(time.process_time() - since))
    print(f"{config.output_dir}: {result.metrics['average_accuracy']:.3f}", flush=True)
    found = {name: result.metrics[name] for name in COLUMNS}
    return {**found, "seconds": json.loads(file.read_text())}


def table(title: str, rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: mean and standard deviation over seeds, in percent."""
    lines = [f"\n### {title}\n", f"| method | {' | '.join(COLUMNS.values())} | seconds |", "|---" * 5 + "|"]
    for name, found in rows.items():
        cells = []
        for column in COLUMNS:
            values = [100 * f[column] for f in found if f[column] is not None]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "-")
        seconds = statistics.median(f["seconds"] for f in found)
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
