"""Processes of one run: what the launcher said about this one, and starting several on this machine."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from clkit.errors import ClkitError, ProcessError

_LAUNCHED = "CLKIT_LAUNCHED"


def rank() -> int:
    """This process's number among those of the run, from 0, as torchrun, DeepSpeed's launcher or ours set it."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def running() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ


def own(device: Any) -> Any:
    """The device of this process, where a user named only its kind."""
    import torch

    return torch.device("cuda", local_rank()) if device.type == "cuda" and device.index is None else device


def join(device: Any, minutes: int = 30) -> Any:
    """Meet the other processes; returns their group. A process that was started by itself is a group of one."""
    import torch
    import torch.distributed as dist

    from clkit.engine.group import TorchGroup

    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(minutes=minutes)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            library: Any = dist  # whose annotations leave this class out
            dist.init_process_group(backend, store=library.HashStore(), rank=0, world_size=1, timeout=timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return TorchGroup(device)


def quiet() -> None:
    """Under :func:`start`, leave an unexpected error to the process that started this one instead of printing it."""
    if os.environ.get(_LAUNCHED):
        sys.excepthook = _last_words


def _last_words(*error: Any) -> NoReturn:
    _leave("".join(traceback.format_exception(*error)))
    end(1)


def end(code: int) -> NoReturn:
    """Exit with ``code``; one of several processes without taking Python down.

    DeepSpeed and torch keep their groups, and so gloo's threads, as long as the process lives. A thread that frees a
    tensor when Python has gone would end a finished run with SIGABRT.
    """
    if not running():
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def report(error: ClkitError) -> None:
    """Show an error once.

    Under :func:`start` that process does it, else the first process of the run; what only another one met, torchrun
    names as the root cause.
    """
    if os.environ.get(_LAUNCHED):
        _leave(f"clkit: {error}")
    elif rank() == 0:
        print(f"clkit: {error}", file=sys.stderr)
    elif "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    else:
        print(f"clkit: process {rank()}: {error}", file=sys.stderr)


def _leave(text: str) -> None:
    Path(os.environ[_LAUNCHED], f"{rank()}.txt").write_text(text, encoding="utf-8")


def start(count: int, arguments: Sequence[str]) -> None:
    """Run ``clkit ARGUMENTS`` in ``count`` processes on this machine, through torch's own launcher.

    The first process keeps the terminal. When one dies the launcher ends the others, and its error is shown alone.

    Raises:
        ProcessError: a process failed; carries that error.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="clkit-") as notes:
        os.environ.setdefault("OMP_NUM_THREADS", f"{max(1, (os.cpu_count() or 1) // count)}")
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(notes, redirects=dict.fromkeys(range(1, count), Std.ALL)),
        )
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it would show errors again
        os.environ[_LAUNCHED] = notes
        sys.stdout.flush()
        try:
            elastic_launch(config, sys.executable)("-m", "clkit.cli", *arguments)
        except ChildFailedError as error:
            codes = {number: failure.exitcode for number, failure in error.failures.items()}
            raise _cause(codes, Path(notes), error) from None
        except SignalException:  # the launcher has passed it on, and the processes have saved what they had
            raise KeyboardInterrupt from None
        finally:
            del os.environ[_LAUNCHED]


def _cause(codes: dict[int, int], notes: Path, error: Any) -> ProcessError:
    """What to show of several failures: a death by signal first, because the others then lose their connection."""
    texts = {int(p.stem): p.read_text(encoding="utf-8") for p in sorted(notes.glob("*.txt"))}
    killed = {n: -c for n, c in codes.items() if c < 0 and -c != signal.SIGTERM}
    for number, code in killed.items():
        return ProcessError(
            f"process {number} was killed by {signal.Signals(code).name} (out of memory?), and the others were ended. "
            "The same command goes on from the last checkpoint."
        )
    told = [text.removeprefix("clkit: ") for _, text in sorted(texts.items()) if text.startswith("clkit: ")]
    if told:
        shown = ProcessError(told[0])
        shown.exit_code = max(2, *codes.values())
        return shown
    first = error.get_first_failure()[0]
    number = first if first in texts or not texts else min(texts)
    text = texts.get(number, f"exit code {codes.get(number)}")
    return ProcessError(f"process {number} failed, and the others were ended:\n{text}")
