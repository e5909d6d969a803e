"""Float16 under DeepSpeed: the loss scale, the updates that are skipped and the losses are the local engine's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from half_worker import SCALER
from processes import talk
from test_deepspeed_numbers import content, deepspeed, run_of, steps

from clkit import api, resolve
from clkit.checkpoint import read_checkpoint

__all__ = ["content"]  # a fixture
# Adapters on a float16 base; the same with another micro-batch on the local engine; all weights.
KINDS: dict[str, dict] = {"adapter": {}, "parts": {}, "weights": {"lora": {"r": 0}}}
OFFLOAD = {"offload_optimizer": "cpu"}


def half(content: dict, kind: str, where: str, engine: dict, micro_batch: int = 0) -> dict:
    """Twelve steps."""
    train = {"epochs": 2, "learning_rate": 0.001, "micro_batch": micro_batch}
    run = run_of(content, "naive", f"{where}/{kind}", engine, **train)
    return run | {"model": content["model"] | {"dtype": "float16"} | KINDS[kind]}


def scaler(run_dir: Path) -> dict:
    return read_checkpoint(sorted((run_dir / "checkpoints").glob("[0-9]*"))[-1])["engine"]["scaler"]


@pytest.mark.slow
def test_losses_scale_and_skipped_updates_are_those_of_one_process(content, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", SCALER)
    for kind in KINDS:
        parts = {"micro_batch": 1} if kind == "parts" else {}
        api.run(resolve.validate(half(content, kind, "half-local", {"name": "local"}, **parts)))
    runs = [half(content, kind, f"half{stage}", deepspeed(content, stage)) for stage in range(4) for kind in KINDS]
    runs += [half(content, "adapter", f"half{stage}-cpu", deepspeed(content, stage) | OFFLOAD) for stage in (2, 3)]
    found = talk("half_worker.py", runs, 2)
    for run, kept in zip(runs, found[0]["kept"], strict=True):
        ours = Path(run["output_dir"])
        theirs = Path(content["folder"], "half-local", *ours.parts[-2:])
        losses = [[next(iter(step.values())) for step in steps(d)] for d in (ours, theirs)]
        # Gradients are rounded to 11 bits on each process, so 12 updates can't agree to more than about 1e-4.
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert scaler(ours) == scaler(theirs), "the scale has been halved and doubled in the same steps"
        frozen = [] if ours.parent.name == "weights" else ["torch.float16"]
        assert kept == {"frozen": frozen, "trained": ["torch.float32"]}, "ZeRO-3 loads into the type that was asked for"
