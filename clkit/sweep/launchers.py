"""Launchers: in this process, in local processes, as Slurm jobs. Each takes runs and hands back what came of them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import IO, cast

from clkit import resolve
from clkit.sweep.config import LauncherConfig
from clkit.sweep.plan import Run
from clkit.sweep.worker import Outcome, Spec, execute

# What the libraries under torch take their number of threads from.
_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


class Launcher(ABC):
    """Starts runs."""

    @abstractmethod
    def launch(self, runs: Sequence[Run]) -> Iterator[tuple[Run, Outcome]]:
        """Start all runs, and hand out each with its outcome as it ends.

        Closing the iterator, as an interrupt does, stops what is going on with its state saved.
        """


def make_launcher(config: LauncherConfig, sweep_directory: os.PathLike[str]) -> Launcher:
    """The launcher that the options name."""
    if config.name == "in-process":
        return InProcess()
    if config.name == "local":
        return Local(config)
    from clkit.sweep.slurm import Slurm

    return Slurm(config, sweep_directory)


def spec(run: Run, config: LauncherConfig) -> Spec:
    """A run as another process gets it."""
    plain = resolve.to_dict(run.config)
    plain["tracking"] |= {"progress": False}
    return Spec(plain, str(run.directory.absolute()), config.threads, config.memory_gib)


class InProcess(Launcher):
    """One after another in this process; what they share in memory (imports, caches of the system) is paid once."""

    def launch(self, runs: Sequence[Run]) -> Iterator[tuple[Run, Outcome]]:
        """See :class:`Launcher`."""
        for run in runs:
            outcome = execute(resolve.to_dict(run.config))
            if outcome.state == "interrupted":
                raise KeyboardInterrupt
            yield run, outcome


class Local(Launcher):
    """A few processes, each doing one run after another."""

    def __init__(self, config: LauncherConfig) -> None:
        self._config = config

    def launch(self, runs: Sequence[Run]) -> Iterator[tuple[Run, Outcome]]:
        """See :class:`Launcher`."""
        count = min(self._config.jobs, len(runs))
        free: SimpleQueue[Worker] = SimpleQueue()
        workers = [Worker(self._config, slot) for slot in range(count)]
        for worker in workers:
            free.put(worker)

        def one(run: Run) -> Outcome:
            worker = free.get()
            try:
                return worker.perform(spec(run, self._config))
            finally:
                free.put(worker)

        pool = ThreadPoolExecutor(max(1, count))
        try:
            waiting: dict[Future[Outcome], Run] = {pool.submit(one, run): run for run in runs}
            while waiting:
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(done), done.result()
        finally:
            for worker in workers:
                worker.stop()
            pool.shutdown(cancel_futures=True)
            for worker in workers:
                worker.join()


class Worker:
    """A process of its own that does runs (``clkit.sweep.worker``); started when there is a first one.

    Args:
        config: its limits.
        slot: which of the workers it is; decides which GPUs it sees.
    """

    def __init__(self, config: LauncherConfig, slot: int) -> None:
        self._environment = environment(config, slot)
        self._process: subprocess.Popen[str] | None = None
        self._stopped = self._ending = False
        self._guard = threading.Lock()

    def perform(self, spec: Spec) -> Outcome:
        """Do one run; a process that dies over it is a failed run, and the next one gets a new process."""
        with self._guard:
            if self._stopped:
                return Outcome("interrupted")
            if self._ending:  # an interrupt that came when its run had just ended
                self._end()
            process = self._process = self._process or self._start()
        try:
            cast(IO[str], process.stdin).write(spec.dumps() + "\n")
            cast(IO[str], process.stdin).flush()
            answer = cast(IO[str], process.stdout).readline()
        except (BrokenPipeError, ValueError):  # it died before, or was stopped
            answer = ""
        if answer and not self._ending:
            return Outcome(**json.loads(answer))
        asked, code = self._ending, self._end()
        if answer:
            return Outcome(**json.loads(answer))
        if asked:
            return Outcome("interrupted")
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return Outcome("failed", f"its process died ({how}; out of memory?), see its log.txt")

    def _start(self) -> subprocess.Popen[str]:
        # In a session of its own, so that Ctrl-C reaches the sweep only, which then asks it to stop.
        return subprocess.Popen(
            [sys.executable, "-m", "clkit.sweep.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
            start_new_session=True,
        )

    def interrupt(self) -> None:
        """Ask it to save the run that it does and stop it; the next run gets a new process."""
        with self._guard:
            if self._process is not None:
                self._ending = True
                cast(IO[str], self._process.stdin).close()

    def stop(self) -> None:
        """Ask it to save the run that it does and end for good."""
        self.interrupt()
        self._stopped = True

    def join(self) -> None:
        """Wait until it has ended."""
        self._end()

    def _end(self) -> int:
        """Wait for the process and forget it; returns its exit code."""
        process, self._process, self._ending = self._process, None, False
        if process is None:
            return 0
        code = process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):  # what was still to be written to a process that died
                cast(IO[str], stream).close()
        return code


def environment(config: LauncherConfig, slot: int) -> dict[str, str]:
    """What a worker's libraries see: its threads and its GPUs."""
    found = {**os.environ, **dict.fromkeys(_THREADS, str(config.threads)), "TOKENIZERS_PARALLELISM": "false"}
    if config.gpus:
        visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
        devices = range(slot * config.gpus, (slot + 1) * config.gpus)
        found["CUDA_VISIBLE_DEVICES"] = ",".join(visible[d] if d < len(visible) else str(d) for d in devices)
    return found
