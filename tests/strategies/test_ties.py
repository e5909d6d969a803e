"""Merging of updates against its definition and against peft's, and what is trained, served and exported."""

from __future__ import annotations

import math

import pytest
import torch
from stepping import after_tasks, learn, logits, named, one_batch, trainer_for
from torch import nn

from clkit import api, build, resolve
from clkit.config import LoraConfig
from clkit.errors import CapabilityError, ConfigError
from clkit.models import wrap
from clkit.models.lora import attach_lora
from clkit.strategies.ties import merge
from clkit.trainer import SequentialTrainer


def by_definition(deltas, density):
    """TIES entry by entry."""
    tasks, rows, cols = deltas.shape
    kept = deltas.clone()
    for t in range(tasks):
        order = sorted(range(rows * cols), key=lambda i: -abs(float(deltas[t].flatten()[i])))
        for i in order[math.ceil(density * rows * cols) :]:
            kept[t].view(-1)[i] = 0
    merged = torch.zeros(rows, cols, dtype=deltas.dtype)
    for i in range(rows):
        for j in range(cols):
            values = [float(v) for v in kept[:, i, j]]
            sign = 1 if sum(values) > 0 else -1
            chosen = [v for v in values if v * sign > 0]
            merged[i, j] = sum(chosen) / len(chosen) if chosen else 0
    return merged


def random_deltas(tasks=3, rows=5, cols=7, seed=0):
    return torch.randn(tasks, rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_ties_is_trim_elect_and_disjoint_mean(density, tasks):
    deltas = random_deltas(tasks)
    ours = merge(deltas.clone(), "ties", density)
    assert torch.allclose(ours, by_definition(deltas, density), rtol=0, atol=1e-12)
    if tasks == 1 and density == 1.0:
        assert torch.equal(ours, deltas[0])


def test_of_a_hundred_entries_seven_percent_are_seven():
    assert int(merge(torch.arange(1.0, 101.0).view(1, 10, 10), "ties", 0.07).count_nonzero()) == 7


def test_ties_is_what_peft_computes():
    from peft.utils.merge_utils import ties

    deltas = random_deltas(tasks=4, rows=10, cols=10)
    theirs = ties(list(deltas), torch.ones(4, dtype=torch.float64), density=0.3)
    assert torch.allclose(merge(deltas.clone(), "ties", 0.3), theirs, rtol=0, atol=1e-12)


def test_updates_that_are_zero_change_nothing():
    deltas = random_deltas()
    with_zero = torch.cat([deltas, torch.zeros(1, 5, 7, dtype=torch.float64)])
    for method in ("ties", "magmax", "task-arithmetic"):
        assert torch.equal(merge(with_zero.clone(), method, 0.4), merge(deltas.clone(), method, 0.4))


def test_magmax_takes_the_largest_and_task_arithmetic_the_sum():
    deltas = random_deltas()
    largest = merge(deltas.clone(), "magmax")
    for i in range(5):
        for j in range(7):
            assert largest[i, j] == max(deltas[:, i, j], key=abs)
    assert torch.allclose(merge(deltas.clone(), "task-arithmetic"), deltas[0] + deltas[1] + deltas[2])


# --- in training ----------------------------------------------------------------------------------------------------


def served(trainer, batch=None):
    trainer.model.module.eval()
    with trainer.serving():
        return logits(trainer, batch)


@pytest.mark.parametrize("method", ["ties", "magmax", "task-arithmetic"])
def test_the_base_plus_the_scaled_merged_updates_serves(text_content, method):
    trainer, _ = after_tasks(text_content, "ties", 2, method=method, scaling=0.7)
    updates = trainer.strategy.state_dict()["updates"]
    assert len(updates) == 2
    before = {n: p.detach().clone() for n, p in trainer.model.module.named_parameters()}
    ours = served(trainer)
    reference, _ = trainer_for(text_content, "naive")
    for name in trainer.strategy.layers:
        deltas = torch.stack([u[name]["B"] @ u[name]["A"] for u in updates])
        assert all(delta.any() for delta in deltas)
        weight = reference.model.module.get_submodule(name).base_layer.weight
        weight.data += 0.7 * merge(deltas, method, 0.2)
    reference.model.module.eval()
    assert torch.allclose(ours, logits(reference, one_batch(trainer)), atol=1e-5)
    for n, p in trainer.model.module.named_parameters():
        assert torch.equal(p, before[n]) and p.requires_grad == ("lora_" in n), "serving leaves no trace"


def test_each_task_starts_from_the_base_model(text_content):
    trainer, tasks = after_tasks(text_content, "ties", 0)
    trainer.model.module.eval()
    start = logits(trainer)
    learn(trainer, tasks, 0)
    trainer.model.module.eval()
    assert torch.equal(logits(trainer), start) and not torch.equal(served(trainer), start)


def test_from_the_previous_adapter_training_is_sequential_fine_tuning_to_the_last_bit(text_content):
    ours, _ = after_tasks(text_content, "ties", 2, start="previous")
    naive, _ = after_tasks(text_content, "naive", 2)
    theirs = dict(named(naive))
    assert all(torch.equal(p, theirs[n]) for n, p in named(ours))


@pytest.mark.parametrize("start", ["base", "previous"])
def test_within_a_task_the_unfinished_update_is_merged_once_and_after_it_not_again(text_content, start):
    trainer, tasks = after_tasks(text_content, "ties", 1, method="task-arithmetic", start=start)
    done = served(trainer)
    plain, seen = trainer.strategy.after_step, []

    def after_step():
        plain()
        seen.append(served(trainer))
        trainer.model.module.train()

    trainer.strategy.after_step = after_step
    trainer._learn(tasks[1])
    after = served(trainer)  # as the trainer scores: the task is done, its index is still the position
    assert torch.equal(after, seen[-1]) and not torch.equal(seen[0], done)
    trainer.position.stage, trainer.position.step = 2, 0
    assert torch.equal(served(trainer), after)


def test_the_export_is_a_plain_full_model(text_content):
    result = api.run(resolve.validate({**text_content, "strategy": "ties"}))
    files = {p.name for p in (result.run_dir / "export").iterdir()}
    assert "model.safetensors" in files and not any("adapter" in name for name in files)
    assert "PeftModel" not in result.snippet


def test_a_transposed_layer_is_merged_the_right_way_round(text_content, tiny_llama):
    """GPT-2 keeps its weights transposed."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    net = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    lora = LoraConfig(r=2, target_modules=["c_attn"])
    model = wrap(attach_lora(net, lora, torch.Generator().manual_seed(0)), AutoTokenizer.from_pretrained(tiny_llama))
    config = resolve.validate({**text_content, "strategy": {"name": "ties", "density": 1.0}})
    trainer = SequentialTrainer(model, build.make_strategy(config.strategy), config)
    trainer.prepare(build.make_tasks(config))
    for layer in trainer.strategy.layers.values():
        layer.B.data.normal_(generator=torch.Generator().manual_seed(1))
    model.module.eval()
    with_adapter = logits(trainer)
    trainer.strategy.end_task(trainer.tasks[0])
    assert torch.allclose(served(trainer), with_adapter, atol=1e-4)
    assert not torch.allclose(logits(trainer), with_adapter, atol=1e-2)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_weights_that_can_not_take_a_dense_update_are_refused_before_training(text_content):
    trainer, tasks = trainer_for(text_content, "ties")
    layer = next(m for n, m in trainer.model.module.named_modules() if n.endswith("v_proj"))
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(CapabilityError, match=r"v_proj' is quantised, tied or not linear; load the model unquantised"):
        trainer.prepare(tasks)
    trainer, tasks = trainer_for(text_content, "ties")
    first, second = (m for n, m in trainer.model.module.named_modules() if n.endswith("q_proj"))
    second.base_layer.weight = first.base_layer.weight
    with pytest.raises(CapabilityError, match=r"q_proj' is quantised, tied"):
        trainer.prepare(tasks)


def test_options_out_of_range_are_refused_all_at_once(text_content):
    options = {"name": "ties", "method": "mean", "density": 0.0, "scaling": 0.0, "start": "here"}
    with pytest.raises(ConfigError) as caught:
        resolve.validate({**text_content, "strategy": options})
    for key in ("method", "density", "scaling", "start"):
        assert f"strategy.{key}" in str(caught.value)
    with pytest.raises(ConfigError, match=r"strategy.density: method=magmax takes every entry"):
        resolve.validate({**text_content, "strategy": {"name": "ties", "method": "magmax", "density": 0.5}})
    with pytest.raises(ConfigError, match="needs a LoRA adapter"):
        resolve.validate({**text_content, "model": {**text_content["model"], "lora": {"r": 0}}, "strategy": "ties"})
