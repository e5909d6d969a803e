"""What replay and I-LoRA cost in plain LoRA steps, and their peak memory.

    python experiments/benchmarks/ilora_cost.py --rounds 15
    python experiments/benchmarks/ilora_cost.py --model llama.gguf --length 512 --device cuda

One step each, in rotating order: ``plain`` (b new rows), ``replay`` (b new and b replayed rows in one batch), ``ilora``
(the same and the consistency of all layers), ``last`` (of the last layer only), ``published`` (the forward of the
published code: two fast passes and a slow one, output layer at every position, all hidden states kept). A ratio is the
median over rounds of step / plain step of the same round, with the quartiles, in CPU time of the process and in wall
time. Peak memory is that of one step above what is held between steps, in a fresh process for each kind of step: of the
allocator on a GPU, of the process on Linux with glibc (VmHWM).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from measuring import alone, in_turn, machine, peak_of, ratios, summary
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

BUDGETS = {"replay": 1.9, "ilora": 2.3}  # in plain steps


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


def build(arguments: argparse.Namespace) -> tuple[Model, dict[str, ILoRA | Strategy], dict[str, Callable[[], None]]]:
    """The model, the strategies and one step of each; all train the same adapter."""
    config = RunConfig(
        train=TrainConfig(batch_size=arguments.rows, learning_rate=1e-4),
        eval=EvalConfig(initial=False),
        checkpoint=CheckpointConfig(every_steps=0),
        tracking=TrackingConfig(progress=False),
    )
    model_config = ModelConfig(
        name=arguments.model,
        dtype=arguments.dtype,
        lora=LoraConfig(r=arguments.rank),
        gradient_checkpointing=arguments.checkpointing,
    )
    model = load_model(model_config, generator=torch.Generator().manual_seed(0), say=lambda text: None)
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
    return model, strategies, steps


def report_memory(arguments: argparse.Namespace, model: Model, shadow: int) -> None:
    """Peak of each kind of step above rest, each in a fresh process."""
    width, blocks = model.module.config.hidden_size, model.module.config.num_hidden_layers
    size = torch.finfo(next(p.dtype for n, p in model.module.named_parameters() if "lora" not in n)).bits // 8
    layer = arguments.rows * arguments.length * width * size / 2**20
    print(
        f"shadow {shadow / 2**20:.1f} MiB, held between steps; "
        f"hidden states of the replayed tokens: {layer:.2f} MiB a layer, {blocks * layer:.1f} MiB in {blocks} layers"
    )
    options = [f"--{k}={v}" for k, v in vars(arguments).items() if k not in ("peak", "checkpointing")]
    options += ["--checkpointing"] if arguments.checkpointing else []
    peaks = {name: alone([*options, f"--peak={name}"]) for name in ("plain", "replay", "last", "ilora", "published")}
    for name, peak in peaks.items():
        print(f"{name:10} peak {peak:7.1f} MiB above rest, {peak - peaks['replay']:+7.1f} against replay", flush=True)


def main() -> None:
    """Parse the arguments, time, measure memory, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto", help="auto = bfloat16 where the hardware is fast at it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, default=4, help="new rows per step (default 4)")
    parser.add_argument("--length", type=int, default=64, help="tokens per row (default 64)")
    parser.add_argument("--answer", type=int, default=8, help="targets per row (default 8)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--peak", default="", help="only measure the memory of this kind of step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, strategies, steps = build(arguments)
    if arguments.peak:
        steps[arguments.peak]()
        print(peak_of(steps[arguments.peak]))
        return
    dtype = next(p.dtype for n, p in model.module.named_parameters() if "lora" not in n)
    print(
        f"{arguments.model}, {dtype}, r = {arguments.rank}, {arguments.rows} x {arguments.length} tokens, "
        f"{arguments.rounds} rounds, {machine()}",
        flush=True,
    )
    times = in_turn(steps, arguments.rounds)
    for name in steps:
        found = {clock: summary(ratios(times, clock, name, "plain")) for clock in times}
        print(
            f"{name:10} in plain steps: CPU time {found['CPU']}, wall {found['wall']}; "
            f"{statistics.median(times['CPU'][name]):.2f} s CPU, {statistics.median(times['wall'][name]):.2f} s wall"
            + (f"; budget {BUDGETS[name]}" if name in BUDGETS else ""),
            flush=True,
        )
    kept = strategies["ilora"].slow.values()  # type: ignore[union-attr]
    report_memory(arguments, model, sum(t.numel() * t.element_size() for t in kept))


if __name__ == "__main__":
    main()
