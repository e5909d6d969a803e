"""Step time, tokens per second and peak memory on DeepSpeed against the local engine: LoRA on SmolLM2, one CPU.

    python experiments/benchmarks/deepspeed_scaling.py
    python experiments/benchmarks/deepspeed_scaling.py --stages 0 2 --processes 2 --rounds 9
    python experiments/benchmarks/deepspeed_scaling.py --memory

Every ZeRO stage, on one process with two threads and on two processes with one, takes the same optimiser step in turn
with the local engine on two threads. A step of two processes takes as long as the slower one; CPU time is the sum of
both. A ratio is the median over rounds of step / local step of the same round, with the quartiles.
``--memory``: the highest point of a training step above what the process held before it had a model, on two processes,
beside what ``clkit plan`` says.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import statistics
import subprocess
import sys
from typing import Any

import torch
from ilora_cost import Tokens
from measuring import CLOCKS, GIVE_BACK, Times, held, load, machine, peak_of, ratios, summary

from clkit import resolve
from clkit.build import make_engine, make_model
from clkit.capacity import capacity
from clkit.config import RunConfig
from clkit.strategy import Strategy
from clkit.tasks.base import Task, TaskSequence, TextExamples, TextRecord
from clkit.trainer import SequentialTrainer

GOAL, GOAL_STAGES = 1.1, (0, 2)
TOLERANCE = 0.15
LIBRARIES = ("deepspeed", "peft", "transformers.models.llama.modeling_llama")
"""Loaded before anything is measured: some hundred MiB of code, which are no part of the run's need."""


def configuration(arguments: argparse.Namespace, engine: dict[str, Any]) -> RunConfig:
    """The run whose steps are taken."""
    return resolve.validate(
        {
            "name": "scaling",
            "tasks": {"source": "facts", "phrasings": 1},
            "model": {
                "name": "smollm2-135m",
                "dtype": arguments.dtype,
                "max_length": arguments.length,
                "lora": {"r": arguments.rank, "alpha": 32},
            },
            "engine": {**engine, "device": "cpu"},
            "train": {"batch_size": arguments.rows, "learning_rate": 1e-4},
            "eval": {"initial": False},
            "checkpoint": {"every_steps": 0},
            "tracking": {"progress": False},
        }
    )


class Worker:
    """One process: steps of one run, when it is told to.

    Args:
        config: the run.
        answer: targets per row.
    """

    def __init__(self, config: RunConfig, answer: int) -> None:
        engine = make_engine(config.engine)
        for library in LIBRARIES:
            importlib.import_module(library)
        self.before = held()
        records = TextExamples((TextRecord("x", "y", "0"),))
        tasks = TaskSequence([Task("all", records, records, "text", "perplexity")])
        with engine.loading():
            model = make_model(config.model, tasks, 0, lambda text: None, engine.device)
        self.trainer = SequentialTrainer(model, Strategy(), config, engine=engine)
        self.trainer.prepare(tasks)
        engine.start(self.trainer.strategy.parameters(), config.train, 1000)
        rows, length = config.train.batch_size, config.model.max_length
        self.batch = Tokens(rows, length, answer, 40_000).batch(torch.arange(rows))
        self.trainer.model.module.train()

    def step(self) -> None:
        """One optimiser step."""
        self.trainer._step(self.batch, self.trainer.tasks[0])

    def timed(self) -> dict[str, float]:
        """Seconds of one step by each clock."""
        since = {clock: now() for clock, now in CLOCKS.items()}
        self.step()
        return {clock: now() - since[clock] for clock, now in CLOCKS.items()}

    def peak(self) -> float:
        """MiB of a step's highest point above what was held before there was a model."""
        self.step()
        return peak_of(self.step) + (held() - self.before)


def work(arguments: argparse.Namespace) -> None:
    """What a process does that :class:`Group` started: an answer per line that comes."""
    worker = Worker(
        configuration(arguments, json.loads(arguments.worker)),
        arguments.length - 1 if arguments.memory else arguments.answer,
    )
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.timed() if line.strip() == "step" else {"peak": worker.peak()}), flush=True)


class Group:
    """Processes of one run that wait for work.

    Args:
        engine: its options.
        count: how many.
        threads: of each.
        extra: further environment.
    """

    def __init__(self, engine: dict[str, Any], count: int, threads: int, extra: dict[str, str] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
        self.processes = []
        for rank in range(count):
            numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(threads), **shared}
            env = os.environ | (extra or {}) | numbers
            command = [sys.executable, *sys.argv, f"--worker={json.dumps(engine)}"]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.processes.append(subprocess.Popen(command, env=env, **pipes))

    def answers(self) -> list[dict[str, float]]:
        """The next answer of each process; what libraries print is passed over."""
        return [next(json.loads(line) for line in p.stdout if line.startswith("{")) for p in self.processes]  # type: ignore[union-attr]

    def ask(self, what: str) -> list[dict[str, float]]:
        """Let all do the same."""
        for process in self.processes:
            process.stdin.write(f"{what}\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        return self.answers()

    def close(self) -> None:
        """End them."""
        for process in self.processes:
            process.kill()
            process.wait()


def measure_times(arguments: argparse.Namespace) -> None:
    """Pairs of a local step and a step of one variant, each variant's processes by themselves."""
    print(f"{arguments.dtype}, {arguments.rows} x {arguments.length} tokens, {arguments.rounds} rounds, {machine()}")
    local = Group({"name": "local"}, 1, 2)
    try:
        local.answers()
        for stage in arguments.stages:
            for count in arguments.processes:
                other = Group({"name": "deepspeed", "zero_stage": stage}, count, 2 // count)
                try:
                    other.answers()
                    report(arguments, stage, count, pairs(local, other, arguments.rounds))
                finally:
                    other.close()
    finally:
        local.close()


def pairs(local: Group, other: Group, rounds: int) -> Times:
    """Clock, then group: seconds of each round, in which either goes first by turns; a first round warms up."""
    groups = {"local": local, "other": other}
    times: Times = {clock: {name: [] for name in groups} for clock in CLOCKS}
    for index in range(rounds + 1):
        for name in sorted(groups, reverse=bool(index % 2)):
            found = groups[name].ask("step")
            if index:
                times["wall"][name].append(max(one["wall"] for one in found))
                times["CPU"][name].append(sum(one["CPU"] for one in found))
    return times


def report(arguments: argparse.Namespace, stage: int, count: int, times: Times) -> None:
    """A line for one variant."""
    tokens = arguments.rows * arguments.length
    wall, cpu = ({name: statistics.median(s) for name, s in times[clock].items()} for clock in ("wall", "CPU"))
    goal = f", goal {GOAL}" if stage in GOAL_STAGES and count == 2 else ""
    print(
        f"ZeRO-{stage}, {count} x {2 // count} threads: {wall['other']:.3f} s wall ({tokens / wall['other']:.0f} "
        f"tokens/s), local 1 x 2 {wall['local']:.3f} s ({tokens / wall['local']:.0f} tokens/s), "
        f"ratio {summary(ratios(times, 'wall', 'other', 'local'))}{goal}; CPU {cpu['other']:.3f} s, "
        f"local {cpu['local']:.3f} s, ratio {summary(ratios(times, 'CPU', 'other', 'local'))}; load {load()}",
        flush=True,
    )


def measure_memory(arguments: argparse.Namespace) -> None:
    """Peak of each stage on two processes beside the estimate; the processes of one stage at a time."""
    needs = capacity(configuration(arguments, {"name": "deepspeed"}), 2).needs
    for stage in arguments.stages:
        group = Group({"name": "deepspeed", "zero_stage": stage}, 2, 1, GIVE_BACK)
        try:
            group.answers()
            peaks = [one["peak"] for one in group.ask("peak")]
        finally:
            group.close()
        planned = next(need.total for need in needs if need.stage == stage) / 2**20
        off = planned / max(peaks) - 1
        shown = " and ".join(f"{peak:.0f}" for peak in peaks)
        verdict = "within" if abs(off) <= TOLERANCE else "NOT within"
        print(
            f"ZeRO-{stage}: peak {shown} MiB, planned {planned:.0f} ({off:+.1%}, {verdict} {TOLERANCE:.0%})", flush=True
        )


def main() -> None:
    """Parse the arguments, time or measure memory, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], choices=(1, 2))
    parser.add_argument("--dtype", default="auto", help="auto = bfloat16 where the hardware is fast at it")
    parser.add_argument("--rows", type=int, default=4, help="rows per step, over all processes (default 4)")
    parser.add_argument("--length", type=int, default=64, help="tokens per row (default 64)")
    parser.add_argument(
        "--answer", type=int, default=8, help="targets per row (default 8; --memory: all, as in the estimate)"
    )
    parser.add_argument("--rank", type=int, default=16, help="of LoRA; 0 trains all weights (default 16)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
    elif arguments.memory:
        measure_memory(arguments)
    else:
        measure_times(arguments)


if __name__ == "__main__":
    main()
