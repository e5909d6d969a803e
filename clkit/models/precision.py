"""Which floating-point type a model is kept and computed in."""

from __future__ import annotations

from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    return torch.bfloat16 if device.type == "cpu" and _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    # Only with these instructions: elsewhere bfloat16 on the CPU is emulated, and several times slower than float32.
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))
