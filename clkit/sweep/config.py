"""The `sweep` section: its options, their defaults and their help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clkit.config import opt
from clkit.errors import Problem, did_you_mean
from clkit.metrics.continual import DEFINITIONS


@dataclass
class LauncherConfig:
    """How runs are started."""

    name: str = opt(
        "local",
        "in-process: one after another here; local: in processes on this machine; slurm: as jobs (through submitit)",
        choices=("in-process", "local", "slurm"),
    )
    jobs: int = opt(1, "runs at a time", min=1)
    threads: int = opt(1, "threads of each run, and cores of each job", min=1)
    memory_gib: float = opt(0.0, "memory that each run may take; 0 = no limit", min=0)
    gpus: int = opt(0, "GPUs of each run", min=0)
    minutes: int = opt(60, "slurm: time limit of a job; a run that reaches it goes on in a new job", min=1)
    cluster: str = opt("slurm", "slurm: where jobs go; local = processes on this machine", choices=("slurm", "local"))
    slurm: dict[str, Any] = opt({}, "slurm: further parameters of submitit, such as {slurm_partition: gpu}")


@dataclass
class SearchConfig:
    """Search through Optuna instead of a grid; the axes are the space."""

    trials: int = opt(0, "settings to try; 0 = no search, all of the grid", min=0)
    sampler: str = opt("tpe", "how the next setting is chosen", choices=("tpe", "random"))
    prune: bool = opt(True, "stop a setting whose average accuracy over seen tasks is below the median of the others")
    warmup_trials: int = opt(4, "settings that are finished before any is stopped", min=1)
    seed: int = opt(0, "seed of the search", min=0)


@dataclass
class SweepConfig:
    """What is swept, beside `axes`, `zip` and `seeds`, and what is made of it."""

    small: list[str] = opt([], "key=value overrides that `--small` applies")
    metrics: list[str] = opt(
        ["average_accuracy", "average_incremental_accuracy", "forgetting"], "metrics of the printed table"
    )
    best: str = opt("average_accuracy", "the metric that settings are chosen by and strategies compared in")
    launcher: LauncherConfig = opt(LauncherConfig, "how runs are started")
    search: SearchConfig = opt(SearchConfig, "search instead of a grid")


def cross_checks(config: SweepConfig) -> list[Problem]:
    """Problems between options."""
    problems = [
        Problem(f"sweep.{key}", f"unknown metric '{name}'.{did_you_mean(name, DEFINITIONS)} Known: {known}")
        for key, names in (("metrics", config.metrics), ("best", [config.best]))
        for name in names
        if name not in DEFINITIONS and (known := ", ".join(DEFINITIONS))
    ]
    launcher = config.launcher
    if launcher.name == "in-process":
        for key in ("jobs", "threads"):
            if getattr(launcher, key) > 1:
                problems.append(
                    Problem(
                        f"sweep.launcher.{key}", "runs in this process come one at a time, without limits; take local"
                    )
                )
        for key in ("memory_gib", "gpus"):
            if getattr(launcher, key):
                problems.append(
                    Problem(f"sweep.launcher.{key}", "a run in this process has no limits of its own; take local")
                )
    if config.search.trials and launcher.name != "local":
        problems.append(
            Problem("sweep.launcher.name", f"a search runs in local processes (got {launcher.name}, expected local)")
        )
    return problems
