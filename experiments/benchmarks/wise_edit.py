"""What an edit with WISE costs: against full forward passes, per token at inference, and on disk.

    OMP_NUM_THREADS=1 python experiments/benchmarks/wise_edit.py edit --rounds 5
    OMP_NUM_THREADS=1 python experiments/benchmarks/wise_edit.py inference --rounds 5
    python experiments/benchmarks/wise_edit.py disk

``edit``: SmolLM2-135M, float32, block 25 of 30, 11 edit rows and 1 irrelevant row. One step with everything
below the edited layer computed once and the output layer at target positions only, against the same step as a plain
forward pass of all rows through all layers. Rounds of both in alternating order in one process; ratio of medians.

``inference``: milliseconds per token of a generation of 64 tokens from a prompt of 32: without memories, with ten of
100 edits each of which none answers, because the prompt is like no edit, and with ten of which one answers every token.

Both are CPU times of the process, which other programs on the machine disturb less than the clock's.

``disk``: bytes of one memory of two merged shards at rho = 0.2, against the dense float32 matrix.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from clkit.config import LoraConfig, ModelConfig
from clkit.editing.losses import target_loss
from clkit.editing.prefix import position_ids
from clkit.editing.rows import build
from clkit.models import load_model
from clkit.models.causal_lm import CausalLM
from clkit.strategies.wise.config import WISEConfig
from clkit.strategies.wise.core import Wise
from clkit.strategies.wise.delta import SparseDelta
from clkit.strategies.wise.likeness import Likeness
from clkit.strategies.wise.losses import margin_loss
from clkit.strategies.wise.masks import shard_mask
from clkit.strategies.wise.merge import merge
from clkit.strategies.wise.optimise import Objective, Others
from clkit.strategies.wise.side_memory import SideMemory
from clkit.tasks.base import EditRecord

RECORD = EditRecord("Which family does Epaspidoceras belong to?", "Noctuidae", "0")


def smollm() -> CausalLM:
    """The model in float32, without an adapter."""
    config = ModelConfig(name="smollm2-135m", dtype="float32", prompt="plain", lora=LoraConfig(r=0))
    model = load_model(config, generator=torch.Generator().manual_seed(0))
    model.module.eval()
    if not isinstance(model, CausalLM):
        raise TypeError("smollm2-135m is a language model")
    return model


def alternate(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every variant in each round, in alternating order; the first round warms up and is dropped."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds + 1):
        for name in list(variants) if index % 2 else reversed(list(variants)):
            since = time.process_time()
            variants[name]()
            if index:
                times[name].append(time.process_time() - since)
    return times


def show(times: dict[str, list[float]], base: str) -> None:
    """Medians, and ratios of each round to ``base``."""
    print(f"{torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}")
    for name, values in times.items():
        ratios = [v / b for v, b in zip(values, times[base], strict=True)]
        print(f"  {name:<16} {statistics.median(values) * 1e3:8.1f} ms   x {statistics.median(ratios):.2f}")


def edit(rounds: int) -> None:
    """One step, cached against full."""
    wise = Wise(smollm(), WISEConfig(layer="25"))
    own, irrelevant = wise._rows(RECORD), "who painted it?"
    rows = build(wise.model.form, RECORD.prompt, RECORD.target_new, wise._contexts, [irrelevant], 256, eos=True)
    others = Others(wise._stacked([]), wise._stacked([irrelevant]))
    print(f"rows {tuple(rows.input_ids.shape)}, targets {len(rows.learned)}")
    with wise.router.switched_off():
        prefix = wise.reader.prefix(own, own.ends)
        ends = torch.where(rows.prompt, torch.arange(rows.prompt.shape[1]), 0).amax(dim=1)[:, None]
        changed = (torch.arange(rows.prompt.shape[1]) >= ends)[..., None]
        settings = wise._settings(prefix.activations, prefix.base, own)
        objective = Objective(prefix, own, wise.router, settings, others=others)
        start = 1e-3 * torch.randn(wise.location.shape, generator=torch.Generator().manual_seed(0))

        def cached() -> Tensor:
            matrix = start.clone().requires_grad_()
            answer, margin, _ = objective(matrix)
            return torch.autograd.grad(answer + margin, matrix)[0]

        def full() -> Tensor:
            matrix = start.clone().requires_grad_()
            read: dict[str, Tensor] = {}

            def add(module: torch.nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
                read["x"] = args[0]
                return out + F.linear(args[0], matrix) * changed

            hook = wise.location.projection.register_forward_hook(add)
            scores = wise.location.lm(
                input_ids=rows.input_ids,
                attention_mask=rows.attention_mask,
                position_ids=position_ids(rows.attention_mask),
                use_cache=False,
            ).logits
            hook.remove()
            sizes = wise.router.read(F.linear(read["x"], matrix), rows.prompt).norm(dim=-1).mean(dim=1) / settings.unit
            answer = target_loss(scores[: rows.edits, :-1], rows.labels[: rows.edits, 1:])
            numbers = settings.alpha, settings.beta, settings.gamma
            margin = margin_loss(sizes[: rows.edits], sizes[rows.edits :], *numbers)
            return torch.autograd.grad(answer + margin, matrix)[0]

        gap = float((cached() - full()).abs().max())
        print(f"largest difference of the gradients: {gap:.1e}")
        show(alternate({"cached prefix": cached, "full passes": full}, rounds), "cached prefix")


def inference(rounds: int) -> None:
    """Generation with and without ten memories."""
    model = smollm()
    ids = torch.randint(100, 40000, (1, 32), generator=torch.Generator().manual_seed(0))

    def generate() -> None:
        model.module.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
        )

    wise = Wise(model, WISEConfig(layer="25"))
    generator = torch.Generator().manual_seed(1)
    inputs = wise.location.shape[1]
    wise.gate.likeness = Likeness.between(torch.randn(40, 2, inputs, generator=generator))
    memories = []
    for n in range(10):
        edits = [f"{n}-{i}" for i in range(100)]
        for edit_id in edits:
            wise.gate.add(edit_id, torch.randn(2, inputs, generator=generator))
        matrix = 1e-3 * torch.randn(wise.location.shape, generator=generator)
        memories.append(SideMemory([(n, edits)], matrix, 0.0))
    wise.layer.put(memories)

    def unedited() -> None:
        with wise.router.switched_off():
            generate()

    def at(limit: float) -> Callable[[], None]:
        def answered() -> None:
            wise.gate.limit = limit
            generate()
            memory = wise.router.last[0].memory
            if (memory is None) != (limit > 0):
                raise RuntimeError(f"the memory that answered is {memory}")

        return answered

    variants = {"no memory": unedited, "none answers": at(1.0), "one answers": at(-1.0)}
    times = {name: [t / 64 for t in found] for name, found in alternate(variants, rounds).items()}
    show(times, "no memory")


def disk() -> None:
    """Bytes of a merged memory."""
    shape = (576, 1536)
    generator = torch.Generator().manual_seed(0)
    shards = [
        SparseDelta.from_dense(torch.randn(shape, generator=generator) * 0.05 * shard_mask(shape, 0.2, 0, n))
        for n in range(2)
    ]
    state = merge(shards, [0.5, 0.5], "ties", 0.53).rounded("float16").state_dict("float16")
    stored = sum(state[k].numel() * state[k].element_size() for k in ("bits", "values"))
    dense = shape[0] * shape[1] * 4
    print(f"{stored} bytes of {dense}: {stored / dense:.3f} of the dense float32 matrix")


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("edit", "inference", "disk"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.what == "disk":
        disk()
    else:
        {"edit": edit, "inference": inference}[arguments.what](arguments.rounds)


if __name__ == "__main__":
    main()
