"""What RegLoRA's regulariser costs: sparse against the published dense expression, and in a step of SmolLM2.

    OMP_NUM_THREADS=1 python experiments/benchmarks/reglora_regulariser.py
    OMP_NUM_THREADS=1 python experiments/benchmarks/reglora_regulariser.py matrix --rounds 15

``matrix``: loss and gradients at 4096 x 4096, 2 % of the entries protected, float32, r in 8, 32, 128, dense / sparse;
peak memory above the inputs, a fresh process per variant; size of stored masks after one and seven tasks.

``step``: SmolLM2-135M, LoRA on all linear layers, 4 sequences of 64 tokens, float32: a plain LoRA step against the same
step with the injected regulariser and with the published expression in the loss; at r = 16, at r = 128, and at r = 16
with seven earlier tasks.

Every ratio is the median over rounds of two times of the same round, with the quartiles, in CPU time of the process and
in wall time. Beside the step stands what the regulariser alone took in it, step / (step - regulariser), which two noisy
steps do not enter, and a second plain step over the first, which shows how noisy they are.
"""

from __future__ import annotations

import argparse
import os
import statistics

import torch
from measuring import CLOCKS, alone, in_turn, machine, peak_of, ratios, summary
from torch import Tensor

from clkit.config import LoraConfig, ModelConfig
from clkit.models import load_model
from clkit.models.lora_sum import adapted_layers
from clkit.strategies.reglora import top_entries
from clkit.strategies.reglora.masks import extend, stored_bytes
from clkit.strategies.reglora.sparse import Mask, penalty

SIDE, FRACTION = 4096, 0.02
FASTER = {8: 15, 32: "none", 128: 10}  # rank: how many times the dense expression must take
STEP = {(16, 1): 1.05, (128, 1): 1.15, (16, 7): 1.15}  # rank, earlier tasks: most plain steps a step may cost


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


def problem(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors of the current task and the entries that one earlier task protects, in row-major order."""
    rows, cols = top_entries(*factors(rank, 1), FRACTION)
    flat = (rows * SIDE + cols).sort().values
    return (*factors(rank, 2), flat // SIDE, flat % SIDE)


def matrix(rounds: int) -> None:
    """One 4096 x 4096 matrix."""
    print(f"{SIDE} x {SIDE}, {FRACTION:.0%} protected, {rounds} rounds, {machine()}", flush=True)
    for rank in (8, 32, 128):
        B, A, rows, cols = problem(rank)
        mask = Mask.of((rows, cols), (SIDE, SIDE))
        for ours, theirs in zip(penalty(B, A, mask), dense(B, A, rows, cols), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
        times = in_turn({"dense": lambda: dense(B, A, rows, cols), "sparse": lambda: penalty(B, A, mask)}, rounds)  # noqa: B023
        spent = {name: statistics.median(taken) * 1e3 for name, taken in times["CPU"].items()}
        peaks = {name: alone(["peak", f"--variant={name}", f"--rank={rank}"]) for name in spent}
        print(
            f"r={rank:<4} dense {spent['dense']:.1f} ms CPU, sparse {spent['sparse']:.1f}; dense / sparse: "
            f"CPU time {summary(ratios(times, 'CPU', 'dense', 'sparse'), 1)}, "
            f"wall {summary(ratios(times, 'wall', 'dense', 'sparse'), 1)}, budget {FASTER[rank]}; "
            f"peak {peaks['dense']:.1f} and {peaks['sparse']:.1f} MiB, share {peaks['sparse'] / peaks['dense']:.3f}, "
            f"budget 0.2",
            flush=True,
        )
    mask, listed = None, 0
    for task in range(7):
        rows, cols = top_entries(*factors(8, task), FRACTION)
        mask, listed = extend(mask, rows, cols, (SIDE, SIDE), "concat"), listed + len(rows)
        if task in (0, 6):
            size = stored_bytes(mask)
            share = size / (16 * listed)
            print(f"stored after {task + 1} task(s): {size / 2**20:.1f} MiB, {share:.3f} of int64 pairs, budget 0.333")


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
    print(peak_of(lambda: penalty(B, A, mask) if variant == "sparse" else dense(B, A, rows, cols)))


def step(rounds: int, rank: int, tasks: int) -> None:
    """Steps of SmolLM2 with and without the regulariser."""
    lora = LoraConfig(r=rank, alpha=2.0 * rank)
    generator = torch.Generator().manual_seed(0)
    model = load_model(ModelConfig(lora=lora, dtype="float32"), generator=generator, say=lambda text: None)
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

    inside: dict[str, list[float]] = {clock: [] for clock in CLOCKS}

    def take(regulariser: str) -> None:
        loss = model.module(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
        if regulariser == "dense":
            for name, layer in layers.items():
                loss = loss + 2500 / len(layers) * (layer.B @ layer.A)[lists[name]].abs().mean()
        loss.backward()
        if regulariser == "sparse":
            since = {clock: now() for clock, now in CLOCKS.items()}
            for name, layer in layers.items():
                _, d_b, d_a = penalty(layer.B, layer.A, masks[name])
                layer.B.grad.add_(d_b, alpha=2500 / len(layers))
                layer.A.grad.add_(d_a, alpha=2500 / len(layers))
            for clock, now in CLOCKS.items():
                inside[clock].append(now() - since[clock])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = in_turn({name: lambda name=name: take(name) for name in ("plain", "sparse", "dense", "again")}, rounds)  # type: ignore[misc]
    print(
        f"SmolLM2 r={rank}, {tasks} earlier task(s), {rounds} rounds, {machine()}; "
        f"plain step {statistics.median(times['CPU']['plain']):.2f} s CPU"
    )
    for clock, taken in times.items():
        own = [t / (t - r) for t, r in zip(taken["sparse"], inside[clock][1:], strict=True)]
        print(
            f"  {clock:4} RegLoRA step {summary(ratios(times, clock, 'sparse', 'plain'), 3)}, "
            f"by its regulariser alone {summary(own, 3)}, budget {STEP.get((rank, tasks), 'none')}; "
            f"published expression {summary(ratios(times, clock, 'dense', 'plain'), 3)}; "
            f"a second plain step {summary(ratios(times, clock, 'again', 'plain'), 3)}",
            flush=True,
        )


def published_list(mask: Mask) -> tuple[Tensor, Tensor]:
    """Row and column of every listed position, repeated ones as often as they count."""
    flat = mask.pattern.flat()
    flat = flat if mask.multiplicity is None else flat.repeat_interleave(mask.multiplicity.long())
    return flat // mask.pattern.shape[1], flat % mask.pattern.shape[1]


def main() -> None:
    """Parse the arguments and run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", default="all", choices=("all", "matrix", "step", "peak"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rank", type=int, default=0, help="with --tasks: only this step")
    parser.add_argument("--tasks", type=int, default=1, help="earlier tasks whose masks are in force (step)")
    parser.add_argument("--variant", choices=("dense", "sparse"), default="sparse", help="of peak")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    if arguments.which == "peak":  # what matrix starts itself
        measure_peak(arguments.variant, arguments.rank)
    if arguments.which in ("all", "matrix"):
        matrix(arguments.rounds)
    if arguments.which in ("all", "step"):
        for rank, tasks in [(arguments.rank, arguments.tasks)] if arguments.rank else STEP:
            step(arguments.rounds, rank, tasks)


if __name__ == "__main__":
    main()
