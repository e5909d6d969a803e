"""What RegLoRA's regulariser costs: sparse against the published dense expression, and in a step of SmolLM2.

    OMP_NUM_THREADS=1 python experiments/benchmarks/reglora_regulariser.py matrix
    python experiments/benchmarks/reglora_regulariser.py step

``matrix``: loss and gradients at 4096 x 4096, 2 % of the entries protected, float32, r in 8, 32, 128; rounds of both in
alternating order in one process, the ratio is the median over rounds of dense / sparse. Peak memory above the inputs is
that of one fresh process per variant. Then the size of stored masks after one and seven tasks.

``step``: SmolLM2-135M, LoRA on all linear layers, 4 sequences of 64 tokens, float32: a plain LoRA step against the same
step with the injected regulariser and with the published expression in the loss.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from clkit.config import LoraConfig, ModelConfig
from clkit.models import load_model
from clkit.models.lora_sum import adapted_layers
from clkit.strategies.reglora import top_entries
from clkit.strategies.reglora.masks import extend, stored_bytes
from clkit.strategies.reglora.sparse import Mask, penalty

SIDE, FRACTION = 4096, 0.02


def factors(rank: int, seed: int, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Random B and A."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(side, rank, generator=generator) * 0.01, torch.randn(rank, side, generator=generator)


def dense(B: Tensor, A: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The published expression, by autograd."""
    b, a = B.detach().requires_grad_(), A.detach().requires_grad_()
    loss = (b @ a)[rows, cols].abs().mean()
    d_b, d_a = torch.autograd.grad(loss, (b, a))
    return loss.detach(), d_b, d_a


def seconds(work: Callable[[], object]) -> float:
    """One timed call."""
    since = time.perf_counter()
    work()
    return time.perf_counter() - since


def alternate(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time all variants in each round, in alternating order; the first round warms up and is dropped."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds + 1):
        for name in list(variants) if index % 2 else reversed(list(variants)):
            taken = seconds(variants[name])
            if index:
                times[name].append(taken)
    return times


def problem(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors of the current task and the entries that one earlier task protects, in row-major order."""
    rows, cols = top_entries(*factors(rank, 1), FRACTION)
    flat = (rows * SIDE + cols).sort().values
    return (*factors(rank, 2), flat // SIDE, flat % SIDE)


def matrix(rounds: int) -> None:
    """One 4096 x 4096 matrix."""
    print(
        f"{SIDE} x {SIDE}, {FRACTION:.0%} protected, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}"
    )
    for rank in (8, 32, 128):
        B, A, rows, cols = problem(rank)
        mask = Mask.of((rows, cols), (SIDE, SIDE))
        for ours, theirs in zip(penalty(B, A, mask), dense(B, A, rows, cols), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
        times = alternate({"dense": lambda: dense(B, A, rows, cols), "sparse": lambda: penalty(B, A, mask)}, rounds)  # noqa: B023
        ratio = statistics.median(d / s for d, s in zip(times["dense"], times["sparse"], strict=True))
        peaks = {name: peak(name, rank) for name in times}
        print(
            f"r={rank:<4} dense {1e3 * statistics.median(times['dense']):7.1f} ms"
            f"  sparse {1e3 * statistics.median(times['sparse']):6.1f} ms  ratio {ratio:5.1f}"
            f"  peak above inputs: dense {peaks['dense']:6.1f} MiB, sparse {peaks['sparse']:5.1f} MiB"
            f"  share {peaks['sparse'] / peaks['dense']:.3f}",
            flush=True,
        )
    mask, listed = None, 0
    for task in range(7):
        rows, cols = top_entries(*factors(8, task), FRACTION)
        mask, listed = extend(mask, rows, cols, (SIDE, SIDE), "concat"), listed + len(rows)
        if task in (0, 6):
            size = stored_bytes(mask)
            print(f"stored after {task + 1} task(s): {size / 2**20:.1f} MiB, {size / (16 * listed):.3f} of int64 pairs")


def peak(variant: str, rank: int) -> float:
    """Peak resident memory (MiB) that a fresh process needs above its inputs."""
    command = [sys.executable, __file__, "peak", "--variant", variant, "--rank", str(rank)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_peak(variant: str, rank: int) -> None:
    """Run one variant on a matrix of the full size after a small one has loaded the libraries (Linux)."""
    small = (torch.arange(64), torch.arange(64))
    penalty(*factors(rank, 3, 64), Mask.of(small, (64, 64)))
    dense(*factors(rank, 3, 64), *small)
    B, A = factors(rank, 2)
    flat = torch.arange(0, SIDE * SIDE, round(1 / FRACTION))
    rows, cols = flat // SIDE, flat % SIDE
    mask = Mask.of((rows, cols), (SIDE, SIDE))
    mask.pattern.transpose(torch.zeros(len(rows)))  # made once per task and kept; not part of a step
    Path("/proc/self/clear_refs").write_text("5")  # what came before left a peak of its own
    before = resident("VmRSS")
    if variant == "sparse":
        penalty(B, A, mask)
    else:
        dense(B, A, rows, cols)
    print(resident("VmHWM") - before)


def resident(key: str) -> float:
    """Resident memory now (VmRSS) or at its highest (VmHWM), in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def step(rounds: int, rank: int, tasks: int) -> None:
    """Steps of SmolLM2 with and without the regulariser."""
    lora = LoraConfig(r=rank, alpha=2.0 * rank)
    generator = torch.Generator().manual_seed(0)
    model = load_model(ModelConfig(lora=lora, dtype="float32"), generator=generator, say=print)
    layers = adapted_layers(model.module)
    masks: dict[str, Mask] = {}
    for name, layer in layers.items():
        layer.B.data.normal_(0, 0.001, generator=generator)
        shared = torch.randn(layer.B.shape, generator=generator)
        for _ in range(tasks):
            B = shared + 0.5 * torch.randn(layer.B.shape, generator=generator)
            rows, cols = top_entries(B, layer.A, FRACTION)
            masks[name] = extend(masks.get(name), rows, cols, layer.shape, "concat")
    lists = {name: published_list(mask) for name, mask in masks.items()}
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = torch.randint(0, 40_000, (4, 64), generator=generator)

    def take(regulariser: str) -> None:
        loss = model.module(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
        if regulariser == "dense":
            for name, layer in layers.items():
                loss = loss + 2500 / len(layers) * (layer.B @ layer.A)[lists[name]].abs().mean()
        loss.backward()
        if regulariser == "sparse":
            for name, layer in layers.items():
                _, d_b, d_a = penalty(layer.B, layer.A, masks[name])
                layer.B.grad.add_(d_b, alpha=2500 / len(layers))
                layer.A.grad.add_(d_a, alpha=2500 / len(layers))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = alternate({name: lambda name=name: take(name) for name in ("plain", "sparse", "dense")}, rounds)  # type: ignore[misc]
    ratios = {
        name: statistics.median(x / p for x, p in zip(times[name], times["plain"], strict=True))
        for name in ("sparse", "dense")
    }
    print(
        f"SmolLM2 r={rank}, {tasks} earlier task(s), {torch.get_num_threads()} thread(s), "
        f"load {os.getloadavg()[0]:.1f}: "
        f"plain {statistics.median(times['plain']):.3f} s, sparse {ratios['sparse']:.3f}x, dense {ratios['dense']:.3f}x"
    )


def published_list(mask: Mask) -> tuple[Tensor, Tensor]:
    """Row and column of every listed position, repeated ones as often as they count."""
    flat = mask.pattern.flat()
    flat = flat if mask.multiplicity is None else flat.repeat_interleave(mask.multiplicity.long())
    return flat // mask.pattern.shape[1], flat % mask.pattern.shape[1]


def main() -> None:
    """Parse the arguments and run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("matrix", "step", "peak"), help="peak is what matrix starts itself")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tasks", type=int, default=1, help="earlier tasks whose masks are in force (step)")
    parser.add_argument("--variant", choices=("dense", "sparse"), default="sparse")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    if arguments.which == "matrix":
        matrix(arguments.rounds)
    elif arguments.which == "peak":
        measure_peak(arguments.variant, arguments.rank)
    else:
        step(arguments.rounds, arguments.rank, arguments.tasks)


if __name__ == "__main__":
    main()
