"""Trackers: the numbers of ``events.jsonl`` also go to TensorBoard, Weights & Biases or MLflow, under the same names.

================================= =======================================================
``loss/<term>``                   a term of the loss
``learning_rate``                 of the step
``score/<task>/<metric>``         a task's score, with the weights that serve
``score/<task>/<metric>/<name>``  with other weights
``value/<name>``                  what the strategy logs
``edits/<aspect>``                means over all edits so far, after each task of edits
``cost/<name>``                   parameters, bytes and peak memory, after each task
``metric/<name>``                 the metrics of the finished run
================================= =======================================================
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from clkit.errors import ConfigError, Problem
from clkit.files import disk_errors
from clkit.rundir import RunDirectory

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
State = Literal["finished", "failed", "interrupted"]
_ENDED: dict[State, str] = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}  # as MLflow says it
_COSTS = ("parameters", "trainable_parameters", "model_bytes", "exemplars", "exemplar_bytes", "peak_memory_bytes")


def scalars(kind: str, fields: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one event, by the name under which every tracker shows them.

    >>> scalars("step", {"losses": {"cross_entropy": 0.5}, "learning_rate": 0.1, "step": 3})
    {'loss/cross_entropy': 0.5, 'learning_rate': 0.1}
    """
    found: dict[str, Any] = {}
    if kind == "step":
        found = {f"loss/{name}": value for name, value in fields["losses"].items()}
        found |= {k: fields[k] for k in ("learning_rate",) if k in fields}
    elif kind == "score":
        place = ["score", fields["task"], fields["metric"], *([fields["weights"]] if "weights" in fields else [])]
        found = {"/".join(place): fields["value"]}
    elif kind == "value":
        found = {f"value/{fields['name']}": fields["value"]}
    elif kind == "edits":
        found = {f"edits/{name}": value for name, value in fields["means"].items()}
    elif kind == "cost":
        found = {f"cost/{name}": fields[name] for name in _COSTS}
    elif kind == "metrics":
        found = {f"metric/{name}": value for name, value in fields["values"].items()}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


class Tracker(ABC):
    """Where numbers go."""

    @abstractmethod
    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Take some numbers of one step."""

    @abstractmethod
    def close(self, state: State) -> None:
        """Write what is still held back, and how the run ended."""


class TensorBoard(Tracker):
    """Event files in ``tensorboard/``; what was written after the checkpoint of a resume is hidden."""

    def __init__(self, directory: RunDirectory, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = str(directory.path / "tensorboard")
        # What was written at this step and later is hidden; a finished task's scores are at the checkpoint's own step.
        self._writer = SummaryWriter(folder, purge_step=step + 1)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """One scalar each."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, state: State) -> None:
        """Flush and close the file."""
        self._writer.close()


class WandB(Tracker):
    """A W&B run in ``wandb/``: offline unless WANDB_MODE says otherwise; ``wandb sync`` sends it."""

    def __init__(self, directory: RunDirectory, name: str, config: Mapping[str, Any], identity: str) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        project = os.environ.get("WANDB_PROJECT", "clkit")
        settings = wandb.Settings(silent=True)
        more: dict[str, Any] = {"resume": "allow"} if mode == "online" else {}
        self._run = wandb.init(
            project=project,
            name=name,
            id=identity,
            mode=mode,
            dir=str(directory.path),
            config=dict(config),
            settings=settings,
            **more,
        )
        self._run.define_metric("*", step_metric="total_steps")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """One record; W&B's own step only grows, so ours is a number beside the others."""
        if numbers:
            self._run.log({**numbers, "total_steps": step})

    def close(self, state: State) -> None:
        """End the run; W&B knows whether it failed by an exit code."""
        self._run.finish(exit_code=0 if state == "finished" else 1)


class MLflow(Tracker):
    """A run in an MLflow file store: MLFLOW_TRACKING_URI, else ``mlruns/`` in the run directory."""

    def __init__(self, directory: RunDirectory, name: str, config: Mapping[str, Any], identity: str | None) -> None:
        # MLflow 3 asks for this before it writes plain files.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        place = os.environ.get("MLFLOW_TRACKING_URI")
        if not place:
            # MLflow makes its folders once in a process, and remembers that it did when --fresh has deleted them.
            folder = (directory.path / "mlruns").absolute()
            with disk_errors(folder):
                (folder / ".trash").mkdir(parents=True, exist_ok=True)
            place = folder.as_uri()
        self._client = MlflowClient(tracking_uri=place)
        if identity is None:
            found = self._client.get_experiment_by_name("clkit")
            experiment = found.experiment_id if found else self._client.create_experiment("clkit")
            identity = str(self._client.create_run(experiment, run_name=name).info.run_id)
            for key, value in _flat(config).items():
                self._client.log_param(identity, key, str(value)[:500])
        else:
            self._client.update_run(identity, status="RUNNING")
        self.identity = identity

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """One metric each."""
        for name, value in numbers.items():
            self._client.log_metric(self.identity, _allowed(name), value, step=step)

    def close(self, state: State) -> None:
        """Mark the run with how it ended."""
        self._client.set_terminated(self.identity, _ENDED[state])


def problems(names: Iterable[str]) -> list[Problem]:
    """Trackers whose package is missing."""
    return [
        Problem("tracking.to", f"{name}: the package {package} is not installed; pip install 'clkit[{name}]'")
        for name in names
        if (package := _PACKAGES[name]) and importlib.util.find_spec(package) is None
    ]


def open_trackers(
    names: Iterable[str], directory: RunDirectory, name: str, config: Mapping[str, Any], step: int
) -> list[Tracker]:
    """The trackers of a run, gone on with where there were some before; ``step`` is where the run goes on.

    Raises:
        ConfigError: a package is missing.
    """
    names = list(names)
    if missing := problems(names):
        raise ConfigError.collect("The trackers can't be used:", missing)
    known = (directory.read("tracking.json") or {}) if names else {}
    made: list[Tracker] = []
    for tracker in names:
        if tracker == "tensorboard":
            made.append(TensorBoard(directory, step))
        elif tracker == "wandb":
            known.setdefault("wandb", secrets.token_hex(4))
            made.append(WandB(directory, name, config, known["wandb"]))
        else:
            made.append(mlflow := MLflow(directory, name, config, known.get("mlflow")))
            known["mlflow"] = mlflow.identity
    if known:
        directory.write("tracking.json", known)
    return made


def _allowed(name: str) -> str:
    """A name as MLflow takes it: few characters, and no part that means another place as a path.

    >>> _allowed("score/Q&A, law/accuracy"), _allowed("score/../f1(x)")
    ('score/Q_A_ law/accuracy', 'score/_/f1_x_')
    """
    parts = re.sub(r"[^\w.\- :/]", "_", name).split("/")
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted names."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
