"""What a private step costs in non-private ones, in time and memory.

    OMP_NUM_THREADS=1 python experiments/benchmarks/dp_step.py --rounds 9

LoRA (r = 8, all linear layers) on 8 x 64 tokens, every token a target: the local engine against the private one with
Opacus' hooks, in one process, each on its own copy of the model. With ``--full`` also full fine-tuning of the model
with its output layer untied (ghost clipping knows no tied weights): local, ghost clipping, and one example at a time.
A step is everything from a collated batch to updated weights, noise included. A ratio is the median over rounds of
private over local step of the same round, in CPU time of the process and in wall time; peak memory is that of one
step above what is held between steps, in a fresh process each.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from ilora_cost import Tokens
from measuring import alone, in_turn, machine, peak_of, ratios, summary
from torch import nn

from clkit import resolve
from clkit.build import make_engine, make_strategy
from clkit.engine.poisson import Units
from clkit.engine.private import PrivateEngine
from clkit.models import load_model
from clkit.models.base import Model
from clkit.tasks.base import Task, TaskSequence, TextExamples, TextRecord
from clkit.trainer import SequentialTrainer

GOAL = 1.1
ADAPTER, FULL = ("local", "hooks"), ("local", "ghost", "loop")


def make_model(arguments: argparse.Namespace, full: bool) -> Model:
    """The model with an adapter, or all of it with an output layer of its own."""
    content = {
        "tasks": "facts",
        "model": {"name": arguments.model, "dtype": "float32", "lora": {"r": 0 if full else 8, "alpha": 16.0}},
    }
    config = resolve.validate(content).model
    model = load_model(config, generator=torch.Generator().manual_seed(0), device=torch.device(arguments.device))
    if full:
        module: nn.Module = model.module
        module.lm_head.weight = nn.Parameter(copy.deepcopy(module.lm_head.weight.detach()))  # type: ignore[union-attr]
    return model


def make_step(model: Model, way: str, arguments: argparse.Namespace) -> Callable[[], None]:
    """One optimiser step through the trainer."""
    engine = {"name": "local"} if way == "local" else {"name": "private", "noise_multiplier": 1.0, "per_unit": way}
    content = {
        "tasks": "facts",
        "engine": {**engine, "device": arguments.device},
        "train": {"batch_size": arguments.rows, "learning_rate": 1e-4, "clip": 1.0},
        "eval": {"initial": False},
        "checkpoint": {"every_steps": 0},
    }
    config = resolve.validate(content)
    rows = Tokens(arguments.rows, arguments.length, arguments.length, 1000)
    records = TextExamples(tuple(TextRecord("x", "y", i) for i in rows.ids))
    tasks = TaskSequence([Task("records", records, records, "text", "perplexity")])
    trainer = SequentialTrainer(model, make_strategy(config.strategy), config, engine=make_engine(config.engine))
    trainer.prepare(tasks)
    trainer._start_optimizer(1000)
    if isinstance(trainer.engine, PrivateEngine):
        trainer.engine._plan(trainer.strategy)
        trainer.engine._units = Units(torch.arange(arguments.rows), tuple(rows.ids))
        trainer.engine._rate, trainer.engine._expected = 1.0, float(arguments.rows)
    model.module.train()
    batch = rows.batch(torch.arange(arguments.rows))

    def step() -> None:
        trainer._step(batch, tasks[0])
        if trainer.engine.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def report(title: str, ways: tuple[str, ...], arguments: argparse.Namespace, full: bool) -> None:
    """Time and memory of one comparison."""
    # Hooks of one way would also run in the steps of another, so each has a module of its own.
    steps = {way: make_step(make_model(arguments, full), way, arguments) for way in ways}
    times = in_turn(steps, arguments.rounds)
    kind = ["--full"] if full else []
    peaks = {way: alone([*kind, "--peak", way, *_shape(arguments)]) for way in ways}
    print(
        f"\n{title}: a local step {1e3 * statistics.median(times['CPU']['local']):.0f} ms CPU, {peaks['local']:.0f} MiB"
    )
    for way in ways[1:]:
        print(
            f"  {way:<6} CPU {summary(ratios(times, 'CPU', way, 'local'))}  wall "
            f"{summary(ratios(times, 'wall', way, 'local'))}  memory {peaks[way] / max(peaks['local'], 1e-9):.2f} "
            f"({peaks[way]:.0f} MiB)" + ("" if full else f"   goal {GOAL}"),
            flush=True,
        )


def _shape(arguments: argparse.Namespace) -> list[str]:
    return [f"--{k}={getattr(arguments, k)}" for k in ("model", "rows", "length", "device")]


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--full", action="store_true", help="full fine-tuning too")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        step = make_step(make_model(arguments, arguments.full), arguments.peak, arguments)
        step()
        print(peak_of(step))
        return
    print(f"{arguments.model}, batch {arguments.rows} x {arguments.length}, {machine()}")
    report("LoRA r=8", ADAPTER, arguments, full=False)
    if arguments.full:
        report("full fine-tuning, output layer untied", FULL, arguments, full=True)


if __name__ == "__main__":
    main()
