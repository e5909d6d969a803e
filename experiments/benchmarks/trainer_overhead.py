"""What the trainer costs above a hand-written PyTorch loop, in interleaved pairs in one process.

    OMP_NUM_THREADS=1 python experiments/benchmarks/trainer_overhead.py mlp
    python experiments/benchmarks/trainer_overhead.py llm

``mlp``: 64-256-10, batch 32, 12,000 vectors, SGD with momentum; the hand loop slices shuffled tensors.
``llm``: SmolLM2-135M, LoRA r=8 on q and v, 4 sequences of 64 tokens (all of them targets), AdamW, clipping at 1.
Each round runs both, in alternating order; the ratio is the median over rounds of trainer / hand loop.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from clkit.config import CheckpointConfig, EvalConfig, LoraConfig, ModelConfig, RunConfig, TrackingConfig, TrainConfig
from clkit.models import load_model
from clkit.models.base import Model
from clkit.strategy import Strategy
from clkit.tasks.base import LabelledExamples, Task, TaskSequence, TextExamples, TextRecord
from clkit.tasks.batch import Batch, Encoded
from clkit.trainer import SequentialTrainer


def settings(**train: object) -> RunConfig:
    """Only training: no scoring, no checkpoints in between, little logging."""
    return RunConfig(
        train=TrainConfig(**train),  # type: ignore[arg-type]
        eval=EvalConfig(initial=False),
        checkpoint=CheckpointConfig(every_steps=0),
        tracking=TrackingConfig(log_every=100, progress=False),
    )


def train_only(model: Model, config: RunConfig, tasks: TaskSequence) -> float:
    """Seconds of the trainer's own loop over the first task, optimiser set-up included."""
    trainer = SequentialTrainer(model, Strategy(), config)
    trainer.prepare(tasks)
    since = time.perf_counter()
    trainer._learn(tasks[0])
    return time.perf_counter() - since


def pairs(hand: Callable[[], float], ours: Callable[[], float], rounds: int) -> None:
    """Alternate the two, print every round and the median ratio."""
    ratios, seconds = [], []
    for index in range(rounds + 1):
        first, second = (hand, ours) if index % 2 else (ours, hand)
        times = {first: first(), second: second()}
        if index == 0:  # warm-up
            continue
        ratios.append(times[ours] / times[hand])
        seconds.append((times[hand], times[ours]))
        print(f"round {index}: hand {times[hand]:.3f} s, clkit {times[ours]:.3f} s, ratio {ratios[-1]:.3f}", flush=True)
    hand_median, ours_median = (statistics.median(s[i] for s in seconds) for i in (0, 1))
    print(f"median: hand {hand_median:.3f} s, clkit {ours_median:.3f} s, ratio {statistics.median(ratios):.3f}")


def mlp(rounds: int) -> None:
    """The small model, where a trainer's own time shows."""
    count, epochs, size = 12_000, 4, 32
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 64, generator=generator), torch.randint(0, 10, (count,), generator=generator)
    examples = LabelledExamples(x, y, [str(i) for i in range(count)])
    tasks = TaskSequence([Task("all", examples, examples, "classification", "accuracy", tuple(range(10)))])
    config = settings(epochs=epochs, batch_size=size, optimizer="sgd", learning_rate=0.01, clip=0.0)
    model_config = ModelConfig(name="mlp", hidden=[256], lora=LoraConfig(r=0))

    def ours() -> float:
        model = load_model(model_config, num_classes=10, input_shape=(64,), generator=generator)
        return train_only(model, config, tasks)

    def hand() -> float:
        net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        since = time.perf_counter()
        for _ in range(epochs):
            for rows in torch.randperm(count).split(size):
                loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - since

    pairs(hand, ours, rounds)


class Tokens(Encoded):
    """Sequences of equal length in which every token is a target."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens
        self.ids = [str(i) for i in range(len(tokens))]

    def batch(self, indices: torch.Tensor) -> Batch:
        """Rows of the token matrix."""
        tokens = self.tokens[indices]
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        return Batch(inputs, tokens, tokens.numel() - len(tokens), indices, self)


def llm(rounds: int) -> None:
    """A real language model, where a trainer's own time should vanish."""
    steps = 8
    config = settings(steps=steps, batch_size=4, learning_rate=1e-4)
    lora = LoraConfig(r=8, alpha=16, target_modules=["q_proj", "v_proj"])
    generator = torch.Generator().manual_seed(0)
    model = load_model(ModelConfig(lora=lora), generator=generator, say=print)
    tokens = torch.randint(0, 40_000, (4 * steps, 64), generator=generator)
    records = tuple(TextRecord("x", "y", str(i)) for i in range(len(tokens)))
    tasks = TaskSequence([Task("all", TextExamples(records), TextExamples(records), "text", "perplexity")])
    model.encode = lambda examples: Tokens(tokens)  # type: ignore[method-assign]
    dtype = getattr(model, "autocast_dtype", None)
    autocast = torch.autocast("cpu", dtype=dtype) if dtype is not None else contextlib.nullcontext()
    parameters = [p for p in model.module.parameters() if p.requires_grad]

    def ours() -> float:
        return train_only(model, config, tasks)

    def hand() -> float:
        model.module.train()
        since = time.perf_counter()
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
        for rows in torch.randperm(len(tokens)).split(4):
            ids = tokens[rows]
            with autocast:
                mask = torch.ones_like(ids)
                loss = model.module(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - since

    pairs(hand, ours, rounds)


def main() -> None:
    """Parse the arguments and run one comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("mlp", "llm"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None, help="default: 1 for mlp, all cores for llm")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or (1 if arguments.which == "mlp" else os.cpu_count() or 1))
    {"mlp": mlp, "llm": llm}[arguments.which](arguments.rounds)


if __name__ == "__main__":
    main()
