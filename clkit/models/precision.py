"""Which floating-point type a model is kept and computed in."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from functools import lru_cache
from pathlib import Path

import torch

from clkit.errors import CheckpointError
from clkit.files import write_json
from clkit.models.store import cache_root
from clkit.tasks.base import content_id

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# A CPU must be this much faster in bfloat16 than in float32 before we give up digits for it.
_WORTH = 0.7


def pick_dtype(name: str, device: torch.device | None = None) -> torch.dtype:
    """The type that ``model.dtype`` means: ``auto`` is bfloat16 where the hardware is fast at it, else float32.

    Args:
        name: auto, float32, bfloat16 or float16.
        device: where the model will run; None = a GPU when there is one.
    """
    if name != "auto":
        return DTYPES[name]
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and cpu_prefers_bfloat16() else torch.float32


@lru_cache(maxsize=1)
def cpu_prefers_bfloat16() -> bool:
    """Measured once per machine and kept in the cache, so that every run on it decides alike.

    The instruction flags do not tell: some processors with avx512_bf16 are slower in bfloat16 than in float32.
    """
    key = f"{_processor()} torch {torch.__version__}"
    file = cache_root() / "bfloat16.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if key not in known:
        known[key] = _time_in_float32_units() <= _WORTH
        with contextlib.suppress(OSError, CheckpointError):  # then it is measured again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, known)
    return bool(known[key])


def _time_in_float32_units() -> float:
    """Time of a layer's forward and backward products in bfloat16 over the same in float32; the best of five each."""
    return min(_seconds(torch.bfloat16) for _ in range(5)) / min(_seconds(torch.float32) for _ in range(5))


def _seconds(dtype: torch.dtype) -> float:
    x, weight = torch.ones(256, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    out = torch.nn.functional.linear(x, weight)  # the first call of a type sets its kernels up
    since = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    torch.mm(out, weight)
    return time.perf_counter() - since


def _processor() -> str:
    """This kind of processor: its instruction flags tell machines apart better than its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()} {content_id(flags)}"


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """Half precision widened; float32 and float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
