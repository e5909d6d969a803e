"""What the benchmarks measure with: work in turn on two clocks, and peak memory in processes of their own."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

CLOCKS = {"wall": time.perf_counter, "CPU": time.process_time}
"""CPU time is that of all threads of this process; other processes disturb it far less than wall time."""

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": "0"}
"""With these in its environment the C library gives every block above 64 KiB back as soon as it is freed, so that a
process holds what the tensors in use take."""

Times = dict[str, dict[str, list[float]]]
"""Clock, then variant: seconds of each round."""


def in_turn(variants: dict[str, Callable[[], object]], rounds: int) -> Times:
    """Run every variant once per round, each round beginning with another; a first round warms up and is dropped."""
    times: Times = {clock: {name: [] for name in variants} for clock in CLOCKS}
    names = list(variants)
    for index in range(rounds + 1):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            since = {clock: now() for clock, now in CLOCKS.items()}
            variants[name]()
            taken = {clock: now() - since[clock] for clock, now in CLOCKS.items()}
            if index:
                for clock, seconds in taken.items():
                    times[clock][name].append(seconds)
    return times


def summary(values: Sequence[float], digits: int = 2) -> str:
    """Median and quartiles."""
    ranked = sorted(values)
    low, high = ranked[len(ranked) // 4], ranked[3 * len(ranked) // 4]
    return f"{statistics.median(ranked):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(times: Times, clock: str, name: str, unit: str) -> list[float]:
    """Time of a variant over that of another in the same round."""
    return [a / b for a, b in zip(times[clock][name], times[clock][unit], strict=True)]


def machine() -> str:
    """Threads, load and versions, for the head of a report."""
    import peft
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    return f"{torch.get_num_threads()} thread(s), load {load()}, {versions}"


def load() -> str:
    """How many processes wanted a core in the last minute; a question mark where the system does not say."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "?"


def peak_of(work: Callable[[], object]) -> float:
    """MiB at the highest point of a call above what was held before; 0 where it can't be told.

    Of the allocator on a GPU, else of the process (Linux): call it in a process that :func:`alone` started.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return 0.0
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory still counts as held
    reset.write_text("5", encoding="ascii")  # the process's high-water mark becomes what it holds now
    before = held()
    work()
    return _status("VmHWM") / 1024 - before


def held() -> float:
    """MiB that this process holds now (Linux)."""
    return _status("VmRSS") / 1024


def alone(arguments: Sequence[str]) -> float:
    """The number that this script prints last when a fresh process runs it with other arguments.

    It runs with :data:`GIVE_BACK`.
    """
    command = [sys.executable, sys.argv[0], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **GIVE_BACK})
    return float(done.stdout.split()[-1])


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])
