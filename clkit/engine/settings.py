"""What DeepSpeed is told: every key that changes numbers is written, and a user's file may not contradict the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clkit.config import EngineConfig, RunConfig, opt
from clkit.errors import Problem

# Sections that stand for something which the run's configuration says already.
_OURS = {
    "optimizer": "train.optimizer, train.learning_rate, ...",
    "scheduler": "train.schedule",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "activation_checkpointing": "model.gradient_checkpointing",
}

# DeepSpeed's defaults, in numbers: what is sent at once, and under ZeRO-3 what is fetched at once and stays whole.
BUCKET, PREFETCH, LIVE = 500_000_000, 50_000_000, 1_000_000_000


@dataclass
class DeepSpeedConfig(EngineConfig):
    """Options of the DeepSpeed engine."""

    zero_stage: int = opt(
        2,
        "what is split over the processes: 0 nothing, 1 the optimiser's state, 2 gradients too, 3 weights too",
        min=0,
        max=3,
    )
    offload_optimizer: str = opt(
        "none", "where the optimiser's state lives and is updated; needs stage 1 or more", choices=("none", "cpu")
    )
    offload_parameters: str = opt("none", "where idle weights live; needs stage 3", choices=("none", "cpu"))
    config_file: str = opt("", "a DeepSpeed JSON file with further settings, such as bucket sizes")


def own_problems(config: DeepSpeedConfig) -> list[Problem]:
    """What is wrong with the section by itself."""
    problems = []
    if config.offload_optimizer != "none" and config.zero_stage == 0:
        problems.append(Problem("engine.offload_optimizer", "got cpu, which needs engine.zero_stage=1, 2 or 3 (got 0)"))
    if config.offload_parameters != "none" and config.zero_stage != 3:
        problems.append(
            Problem("engine.offload_parameters", f"got cpu, which needs engine.zero_stage=3 (got {config.zero_stage})")
        )
    if config.config_file:
        _, wrong = read_settings(config.config_file)
        problems += wrong
    return problems


def read_settings(path: str) -> tuple[dict[str, Any], list[Problem]]:
    """The content of a DeepSpeed file, or why it can't be read."""
    where = "engine.config_file"
    if not path:
        return {}, []
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        return {}, [Problem(where, f"{path}: can't be read ({error.strerror})")]
    except ValueError as error:
        return {}, [Problem(where, f"{path}: is not JSON ({error})")]
    if not isinstance(content, dict):
        return {}, [Problem(where, f"{path}: got a {type(content).__name__}, expected an object")]
    return content, []


def conflicts(config: RunConfig, given: Mapping[str, Any]) -> list[Problem]:
    """Where a user's DeepSpeed settings say something else than the run; ``auto`` and equal values are fine."""
    engine: DeepSpeedConfig = config.engine.config
    train = config.train
    zero = given.get("zero_optimization", {})
    zero = zero if isinstance(zero, Mapping) else {}
    expected = {
        "train_batch_size": (given.get("train_batch_size"), train.batch_size, "train.batch_size"),
        "train_micro_batch_size_per_gpu": (
            given.get("train_micro_batch_size_per_gpu"),
            train.micro_batch,
            "train.micro_batch",
        ),
        "gradient_accumulation_steps": (
            given.get("gradient_accumulation_steps"),
            None,
            "train.batch_size and train.micro_batch, from which it follows",
        ),
        "gradient_clipping": (given.get("gradient_clipping"), train.clip, "train.clip"),
        "zero_optimization.stage": (zero.get("stage"), engine.zero_stage, "engine.zero_stage"),
        "zero_optimization.offload_optimizer.device": (
            _device(zero.get("offload_optimizer")),
            engine.offload_optimizer,
            "engine.offload_optimizer",
        ),
        "zero_optimization.offload_param.device": (
            _device(zero.get("offload_param")),
            engine.offload_parameters,
            "engine.offload_parameters",
        ),
    }
    found = []
    for key, (got, ours, option) in expected.items():
        if got not in (None, "auto", ours):
            told = "" if ours is None else f" (here {ours})"
            found.append(Problem(f"engine.config_file:{key}", f"got {got}; that is set by {option}{told}; drop one"))
    for key, option in _OURS.items():
        section = given.get(key)
        off = section is None or (isinstance(section, Mapping) and section.get("enabled") in (False, "auto"))
        if not off:
            found.append(Problem(f"engine.config_file:{key}", f"is set by {option}; drop the section"))
    return found


def _device(section: Any) -> Any:
    return section.get("device") if isinstance(section, Mapping) else section


def settings(config: DeepSpeedConfig, given: Mapping[str, Any], trained: int = 0) -> dict[str, Any]:
    """The whole configuration for ``deepspeed.initialize``; ``trained`` is how many numbers are trained.

    Scaling, clipping and types are off here, because the engine does them itself, as the local one does: DeepSpeed
    clips at 1.0 unless it is told not to.
    """
    zero = {k: v for k, v in dict(given.get("zero_optimization") or {}).items() if v != "auto"}
    zero["stage"] = config.zero_stage
    if trained:  # DeepSpeed sets a bucket of its full size aside: 2 GB for a few megabytes of adapters
        zero.setdefault("reduce_bucket_size", min(BUCKET, trained))
    for key, device in (("offload_optimizer", config.offload_optimizer), ("offload_param", config.offload_parameters)):
        if device != "none":
            section = zero.get(key)
            zero[key] = {**(section if isinstance(section, Mapping) else {}), "device": device}
    return {
        "wall_clock_breakdown": False,
        **{k: v for k, v in given.items() if k not in _OURS},
        # How a batch is cut is decided step by step (``Engine.backward``); these two only have to be there.
        "train_batch_size": None,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "prescale_gradients": False,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
