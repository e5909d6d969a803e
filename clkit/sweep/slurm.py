"""Runs as Slurm jobs, through submitit; its local executor runs the same jobs on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clkit.errors import CapabilityError
from clkit.sweep.config import LauncherConfig
from clkit.sweep.launchers import Launcher, spec
from clkit.sweep.plan import Run
from clkit.sweep.worker import Outcome, Spec, perform

_POLL_SECONDS = {"slurm": 10.0, "local": 0.2}


class Job:
    """What runs inside a job. At its time limit, and where Slurm tells it of preemption, it goes on in a new one."""

    def __call__(self, spec: Spec) -> Outcome:
        """Do the run."""
        return perform(spec)

    def checkpoint(self, spec: Spec) -> Any:
        """Called by submitit before the job is taken away; the run itself resumes from its last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, spec)


class Slurm(Launcher):
    """One job per run; Slurm decides when each starts, at most ``jobs`` at a time.

    When the sweep is interrupted its jobs go on; the same command again submits what is not finished, and a job whose
    run another one is doing hands it back at once.
    """

    def __init__(self, config: LauncherConfig, sweep_directory: os.PathLike[str]) -> None:
        try:
            import submitit
        except ImportError as error:
            raise CapabilityError(
                "sweep.launcher: slurm needs submitit, which is not installed: pip install 'clkit[slurm]'"
            ) from error
        self._config = config
        folder = Path(sweep_directory).absolute() / "jobs"
        try:
            self._executor = submitit.AutoExecutor(folder=str(folder), cluster=config.cluster)
        except RuntimeError as error:
            raise CapabilityError(f"sweep.launcher: {error}. Is this a machine from which Slurm jobs start?") from error
        self._executor.update_parameters(**self._parameters())

    def _parameters(self) -> dict[str, Any]:
        config = self._config
        found: dict[str, Any] = {
            "name": "clkit-sweep",
            "timeout_min": config.minutes,
            "cpus_per_task": config.threads,
            **({"gpus_per_node": config.gpus} if config.gpus else {}),
            **({"mem_gb": config.memory_gib} if config.memory_gib else {}),
        }
        if config.cluster == "slurm":
            found["slurm_array_parallelism"] = config.jobs
            found |= config.slurm
        return found

    def launch(self, runs: Sequence[Run]) -> Iterator[tuple[Run, Outcome]]:
        """See :class:`Launcher`."""
        waiting, going = list(runs), dict[Any, Run]()
        window = len(runs) if self._config.cluster == "slurm" else self._config.jobs
        while waiting or going:
            free = window - len(going)
            batch, waiting = waiting[:free], waiting[free:]
            if batch:
                jobs = self._executor.map_array(Job(), [spec(run, self._config) for run in batch])
                going |= dict(zip(jobs, batch, strict=True))
            ended = [job for job in going if job.done()]
            for job in ended:
                yield going.pop(job), self._outcome(job)
            if not ended:
                time.sleep(_POLL_SECONDS[self._config.cluster])

    @staticmethod
    def _outcome(job: Any) -> Outcome:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            outcome: Outcome = job.result()
        except (FailedJobError, UncompletedJobError) as error:
            return Outcome("failed", f"job {job.job_id}: {str(error).strip().splitlines()[0]}")
        if outcome.state == "interrupted":  # the job was, not the sweep, whose other jobs go on
            return Outcome("failed", f"job {job.job_id}: was told to stop (cancelled or preempted); its state is saved")
        return outcome
