"""What replay and I-LoRA cost in plain LoRA steps, and their peak memory, interleaved in one process.

    python experiments/benchmarks/ilora_cost.py --rounds 15
    python experiments/benchmarks/ilora_cost.py --model llama.gguf --length 512 --device cuda

One step each, in rotating order: ``plain`` (b new rows), ``replay`` (b new and b replayed rows in one batch), ``ilora``
(the same and the consistency of all layers), ``last`` (of the last layer only), ``published`` (the forward of the
published code: two fast passes and a slow one, output layer at every position, all hidden states kept). A ratio is the
median over rounds of step / plain step of the same round. Peak memory is that of one step above what is held between
steps: of the allocator on a GPU, of the process on Linux with glibc (VmHWM).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from clkit.config import (
    CheckpointConfig,
    EngineConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    ReplayConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from clkit.engine.local import LocalEngine
from clkit.models import load_model
from clkit.models.base import Model
from clkit.modes import evaluating
from clkit.strategies.ilora.strategy import ILoRA, ILoRAConfig
from clkit.strategy import Losses, Strategy
from clkit.tasks.base import Task, TaskSequence, TextExamples, TextRecord
from clkit.tasks.batch import Batch, Encoded
from clkit.trainer import SequentialTrainer


class Tokens(Encoded):
    """Random sequences of one length; the last ``answer`` tokens of each are targets."""

    def __init__(self, rows: int, length: int, answer: int, vocabulary: int) -> None:
        self.tokens = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
        self.labels = self.tokens.clone()
        self.labels[:, :-answer] = -100
        self.ids = [str(i) for i in range(rows)]

    def batch(self, indices: Tensor) -> Batch:
        """Rows."""
        tokens, labels = self.tokens[indices], self.labels[indices]
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        return Batch(inputs, labels, int((labels[:, 1:] != -100).sum()), indices, self)


class Published(ILoRA):
    """The arithmetic of the published code on the same learners: three passes, everything kept."""

    def loss(self, batch: Batch) -> Losses:
        """Two cross entropies and the one-sided distance of all hidden states."""
        rows, module = batch.replayed, self.run.model.module
        if rows is None:
            return super().loss(batch)
        new, old = batch.rows(~rows), batch.rows(rows)
        options = {"use_cache": False, "output_hidden_states": True}
        current = module(**new.inputs, labels=new.labels, use_cache=False).loss
        fast = module(**old.inputs, labels=old.labels, **options)
        with torch.no_grad(), evaluating(module), self.learner("slow"):
            slow = module(**old.inputs, **options)
        plastic, stable = torch.stack(fast.hidden_states), torch.stack(slow.hidden_states)
        target = torch.where(plastic > stable, plastic, stable)
        return {"ce": (current + fast.loss) / 2, "consistency": torch.nn.functional.mse_loss(plastic, target)}


def make_step(model: Model, strategy: Strategy, batch: Batch, config: RunConfig, device: str) -> Callable[[], None]:
    """One optimiser step of a strategy on a given batch, through the trainer."""
    records = TextExamples((TextRecord("x", "y", "0"),))
    tasks = TaskSequence([Task(name, records, records, "text", "perplexity") for name in ("old", "new")])
    trainer = SequentialTrainer(model, strategy, config, engine=LocalEngine(EngineConfig(device=device)))
    trainer.prepare(tasks)
    trainer.position.stage = 1
    trainer.engine.start(strategy.parameters(), config.train, 1000)

    def step() -> None:
        trainer._step(batch, tasks[1])
        if trainer.engine.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def peak_bytes(step: Callable[[], None]) -> int:
    """Largest memory during one step above that before it; 0 where it can't be told."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return 0
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory still counts as held
    reset.write_text("5")  # the process's high-water mark becomes what it holds now
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def main() -> None:
    """Parse the arguments, time, measure memory, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto", help="auto = bfloat16 where the hardware is fast at it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, default=4, help="new rows per step (default 4)")
    parser.add_argument("--length", type=int, default=128, help="tokens per row (default 128)")
    parser.add_argument("--answer", type=int, default=8, help="targets per row (default 8)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = RunConfig(
        train=TrainConfig(batch_size=arguments.rows, learning_rate=1e-4),
        eval=EvalConfig(initial=False),
        checkpoint=CheckpointConfig(every_steps=0),
        tracking=TrackingConfig(progress=False),
    )
    lora = LoraConfig(r=arguments.rank)
    model_config = ModelConfig(name=arguments.model, dtype=arguments.dtype, lora=lora)
    model = load_model(model_config, generator=torch.Generator().manual_seed(0), say=print)
    source = Tokens(2 * arguments.rows, arguments.length, arguments.answer, 40_000)
    joint = source.batch(torch.arange(2 * arguments.rows))
    joint.replayed = torch.arange(len(joint)) >= arguments.rows
    replay = ReplayConfig(size=arguments.rows)
    strategies = {
        "plain": Strategy(),
        "replay": Strategy(),
        "ilora": ILoRA(ILoRAConfig(replay=replay)),
        "last": ILoRA(ILoRAConfig(replay=replay, layers=[-1])),
        "published": Published(ILoRAConfig(replay=replay, compat=True)),
    }
    new = joint.rows(~joint.replayed)
    new.replayed = None
    steps = {
        name: make_step(model, strategy, new if name == "plain" else joint, config, arguments.device)
        for name, strategy in strategies.items()
    }
    names = list(steps)
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(arguments.rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            since = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - since)
    dtype = next(p.dtype for n, p in model.module.named_parameters() if "lora" not in n)
    print(f"{arguments.model}, {dtype}, {arguments.rows} x {arguments.length} tokens, {arguments.rounds} rounds")
    for name in names:
        ratios = sorted(a / b for a, b in zip(seconds[name], seconds["plain"], strict=True))
        peak = peak_bytes(steps[name])
        print(
            f"{name:10} {statistics.median(seconds[name]):.3f} s, {statistics.median(ratios):.2f} plain steps "
            f"(quartiles {ratios[len(ratios) // 4]:.2f} to {ratios[3 * len(ratios) // 4]:.2f}), "
            f"peak {peak / 2**20:.0f} MiB above rest",
            flush=True,
        )


if __name__ == "__main__":
    main()
