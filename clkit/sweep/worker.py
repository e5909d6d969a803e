"""Does runs one after another: in this process, in a process of its own (``python -m clkit.sweep.worker``), in a job.

As a process it reads one run a line from standard input and answers each with a line on standard output. What a run
prints goes to ``log.txt`` in its directory. When standard input ends, the sweep is over or its process died: a run that
is going on is saved and stops.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from clkit.errors import BusyError, ClkitError

State = Literal["finished", "failed", "busy", "interrupted"]

_GIB = 2**30


@dataclass(frozen=True)
class Outcome:
    """What came of one run.

    Attributes:
        state: busy = another process works in its directory.
        reason: why it failed.
    """

    state: State
    reason: str = ""


@dataclass(frozen=True)
class Spec:
    """One run, as it is handed to another process.

    Attributes:
        config: the resolved configuration.
        directory: the run directory, absolute.
        threads: of torch and of the libraries below it.
        memory_gib: most memory for data; 0 = no limit.
    """

    config: Mapping[str, Any]
    directory: str
    threads: int = 1
    memory_gib: float = 0.0

    def dumps(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))


def execute(config: Mapping[str, Any]) -> Outcome:
    """Do one run in this process.

    What fails as a run (wrong input, an error in torch, too little memory) is an outcome; anything else is a defect and
    is raised.
    """
    import traceback

    from clkit import api, resolve

    try:
        api.run(resolve.validate(config, origin="run"))
    except BusyError as error:
        return Outcome("busy", str(error))
    except (ClkitError, RuntimeError, MemoryError) as error:
        if not isinstance(error, ClkitError):
            traceback.print_exc()
        return Outcome("failed", (str(error) or type(error).__name__).strip().splitlines()[0])
    except KeyboardInterrupt:
        return Outcome("interrupted")
    return Outcome("finished")


def perform(spec: Spec) -> Outcome:
    """Do one run under its limits, with what it prints in its log."""
    import torch

    torch.set_num_threads(spec.threads)
    limit_memory(spec.memory_gib)
    with logged(Path(spec.directory) / "log.txt"):
        outcome = execute(spec.config)
    if spec.memory_gib and ("can't allocate memory" in outcome.reason or outcome.reason == "MemoryError"):
        allowed = f"needs more than the {spec.memory_gib:g} GiB of sweep.launcher.memory_gib"
        return Outcome(outcome.state, f"{allowed} ({outcome.reason})")
    return outcome


def limit_memory(gib: float) -> None:
    """Make this process fail to allocate above a limit, instead of taking the memory of others; 0 = none.

    The limit is on data (RLIMIT_DATA), not on the address space, of which libraries reserve far more than they use.
    """
    if not gib:
        return
    import resource

    limit = int(gib * _GIB)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


@contextmanager
def logged(file: Path) -> Iterator[None]:
    """Within the context standard output and error of this process, and of what it calls, are appended to a file.

    They stay there when the context ends by an error, of which Python then prints the traceback.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with file.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    yield
    sys.stdout.flush()
    sys.stderr.flush()
    for target, descriptor in zip((1, 2), saved, strict=True):
        os.dup2(descriptor, target)
        os.close(descriptor)


def main() -> None:
    """Serve one sweep until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed between runs must not be taken for an answer
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    while (line := lines.get()) is not None:
        outcome = perform(Spec(**json.loads(line)))
        try:
            answers.write(json.dumps(asdict(outcome)) + "\n")
            answers.flush()
        except BrokenPipeError:  # the sweep died; what it was told is in the run's directory
            os._exit(0)


def _listen(lines: queue.Queue[str | None]) -> None:
    for line in sys.stdin:
        lines.put(line)
    lines.put(None)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
