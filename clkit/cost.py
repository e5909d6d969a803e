"""What a run costs: seconds, processor seconds and memory, over all processes that worked on it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_RESET_PEAK = "5"  # written to clear_refs it sets the peak of resident memory to what is resident now (man 5 proc_pid)


class Meter:
    """Counts from now on, on top of what an earlier process counted.

    Anywhere but on Linux a process's peak memory is a maximum over its whole life: that of the second run in one
    process is at least that of the first.

    Args:
        before: an earlier :meth:`total` of the same run.

    Example:
        >>> Meter({"wall_seconds": 60.0, "cpu_seconds": 50.0, "peak_memory_bytes": 0}).total()["wall_seconds"] >= 60
        True
    """

    def __init__(self, before: Mapping[str, Any] | None = None) -> None:
        self._before = before if isinstance(before, Mapping) else {}
        self._wall, self._cpu = time.monotonic(), time.process_time()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        if (gpu := _gpu()) is not None:
            gpu.reset_peak_memory_stats()

    def total(self) -> dict[str, float]:
        """``wall_seconds``, ``cpu_seconds`` and ``peak_memory_bytes``; ``peak_gpu_bytes`` where there is a GPU."""
        wall, cpu = time.monotonic() - self._wall, time.process_time() - self._cpu
        found: dict[str, float] = {
            "wall_seconds": round(self._counted("wall_seconds") + wall, 3),
            "cpu_seconds": round(self._counted("cpu_seconds") + cpu, 3),
            "peak_memory_bytes": max(int(self._counted("peak_memory_bytes")), peak_memory()),
        }
        if (gpu := _gpu()) is not None:
            found["peak_gpu_bytes"] = max(int(self._counted("peak_gpu_bytes")), int(gpu.max_memory_allocated()))
        return found

    def _counted(self, key: str) -> float:
        value = self._before.get(key, 0.0)
        return float(value) if isinstance(value, (int, float)) else 0.0


def peak_memory() -> int:
    """Bytes of resident memory that this process had at most."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _gpu() -> Any:
    """``torch.cuda`` where it is in use; a run that loads no torch has no GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
