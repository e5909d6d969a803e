"""Orthogonal subspace fine-tuning: what stays, what moves, and what a new decomposition keeps."""

from __future__ import annotations

import pytest
import torch
from stepping import after_tasks, injected, learn, logits, named, one_batch, trainer_for

from clkit import build, resolve
from clkit.checkpoint import pack, unpack
from clkit.errors import CapabilityError, ModelError
from clkit.models import wrap
from clkit.trainer import SequentialTrainer


def weights(trainer):
    """The weights that are decomposed, and those that serve."""
    layers = trainer.strategy._layers()
    with torch.no_grad():
        old = {name: layer.base_layer.weight.clone() for name, layer in layers.items()}
        return old, {name: old[name] + layer.get_delta_weight("default") for name, layer in layers.items()}


def leak(trainer, preserve):
    """The largest part of a change that lies in frozen directions, relative to the whole change."""
    old, new = weights(trainer)
    worst = 0.0
    for name, before in old.items():
        u, _, v = torch.linalg.svd(before.double(), full_matrices=False)
        k = int(preserve * min(before.shape))
        change = (new[name] - before).double()
        assert float(change.norm()) > 1e-3
        inside = max(float((u[:, :k].T @ change).norm()), float((change @ v[:k].T).norm()))
        worst = max(worst, inside / float(change.norm()))
    return worst


def learned_once(content, optimizer, rate, **options):
    train = {**content["train"], "optimizer": optimizer, "learning_rate": rate, "clip": 0.0}
    trainer, _ = after_tasks({**content, "train": train}, "osf", 1, **options)
    return trainer


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["up_proj", "down_proj"]])
def test_changes_keep_out_of_the_frozen_directions(text_content, targets):
    """peft's projected gradient is enough for plain SGD; Adam leaves the subspace unless the factors are projected."""
    lora = {"r": 4, "target_modules": targets}
    content = {**text_content, "model": {**text_content["model"], "lora": lora}}
    assert leak(learned_once(content, "adamw", 0.01, preserve=0.5), 0.5) < 1e-4
    assert leak(learned_once(content, "adamw", 0.01, preserve=0.5, exact=False), 0.5) > 1e-2
    assert leak(learned_once(content, "sgd", 5.0, preserve=0.5, exact=False), 0.5) < 1e-3


def test_the_model_computes_as_before_at_the_start_and_after_each_new_decomposition(text_content):
    plain, tasks = trainer_for(text_content, "naive")
    plain.prepare(tasks)
    plain.model.module.eval()
    trainer, tasks = after_tasks(text_content, "osf", 0)
    trainer.model.module.eval()
    start = logits(trainer)
    assert torch.allclose(start, logits(plain), atol=1e-5)
    learn(trainer, tasks, 0)
    trainer.model.module.eval()
    learned = logits(trainer)
    assert not torch.allclose(learned, start, atol=1e-2)
    with trainer.serving():
        assert torch.allclose(logits(trainer), learned, atol=1e-5), "the merged weights compute the same"
    trainer.strategy.begin_task(tasks[1])
    trainer.model.module.eval()
    assert torch.allclose(logits(trainer), learned, atol=1e-4)
    old, _ = weights(trainer)
    trainer.model.module = trainer.model.module.unload()
    assert torch.allclose(logits(trainer), learned, atol=1e-4), "unloading after merging loses nothing"
    assert all(torch.isfinite(w).all() for w in old.values())


def test_unwrapping_without_merging_would_lose_what_was_learned(text_content):
    """Why the strategy does not do what peft's documentation shows; when this fails, it may."""
    trainer, _ = after_tasks(text_content, "osf", 0)
    trainer.model.module.eval()
    start = logits(trainer)
    learn(trainer, trainer.tasks, 0)
    trainer.model.module = trainer.model.module.unload().eval()
    assert torch.allclose(logits(trainer), start, atol=1e-5)


def ranks(trainer):
    return {int(layer.effective_rank["default"]) for layer in trainer.strategy._layers().values()}


def test_with_progressive_freezing_task_t_of_n_keeps_its_share_and_resumes(text_content):
    trainer, tasks = after_tasks(text_content, "osf", 0, progressive=True)
    assert ranks(trainer) == {1}
    learn(trainer, tasks, 0)
    learn(trainer, tasks, 1)
    smaller = {int(min(layer.base_layer.weight.shape) / 3) for layer in trainer.strategy._layers().values()}
    assert ranks(trainer) == smaller
    again, tasks = trainer_for(text_content, "osf", progressive=True)
    again.prepare(tasks)
    again.strategy.load_state_dict(unpack(*pack(trainer.strategy.state_dict())))
    again.strategy.load_model_state(trainer.strategy.model_state())
    for t in (trainer, again):
        t.model.module.eval()
    assert torch.equal(logits(again), logits(trainer))
    learn(trainer, tasks, 2)
    again.position.stage, again.position.total_steps = 2, trainer.position.total_steps - 4
    learn(again, tasks, 2)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(named(again), named(trainer), strict=True))


def test_it_takes_the_place_of_the_lora_adapter(text_content):
    with_lora, tasks = trainer_for(text_content, "osf")
    with_lora.prepare(tasks)
    lora = {"r": 0, "target_modules": ["q_proj", "v_proj"]}
    without, tasks = trainer_for({**text_content, "model": {**text_content["model"], "lora": lora}}, "osf")
    without.prepare(tasks)
    assert {n for n, _ in named(with_lora)} == {n for n, _ in named(without)}
    assert all("osf_svd_params" in n for n, _ in named(without)) and len(named(without)) == 2 * 2 * 3
    assert not any("lora" in n for n, _ in with_lora.model.module.named_parameters())


@pytest.mark.parametrize("rank", [4, 0])
def test_micro_batches_and_recomputed_activations_give_the_same_gradients(text_content, rank):
    found = []
    for checkpointing, micro in ((False, 0), (True, 0), (False, 3)):
        model = {**text_content["model"], "gradient_checkpointing": checkpointing}
        model["lora"] = {"r": rank, "target_modules": ["q_proj", "v_proj"]}
        train = {**text_content["train"], "micro_batch": micro}
        trainer, _ = after_tasks({**text_content, "model": model, "train": train}, "osf", 0)
        found.append(injected(trainer, one_batch(trainer)))
    plain, *others = found
    assert all(gradient.any() for gradient in plain.values())
    for other in others:
        assert all(torch.allclose(other[n], g, rtol=1e-3, atol=1e-6) for n, g in plain.items())


def test_what_can_not_work_is_refused_before_training(text_content, tiny_llama):
    lora = {"r": 0, "target_modules": ["q_prj"]}
    trainer, tasks = trainer_for({**text_content, "model": {**text_content["model"], "lora": lora}}, "osf")
    with pytest.raises(ModelError, match=r"no linear layer is called 'q_prj'.*Did you mean 'q_proj'"):
        trainer.prepare(tasks)
    model = {**text_content["model"], "dtype": "bfloat16"}
    trainer, tasks = trainer_for({**text_content, "model": model}, "osf")
    with pytest.raises(CapabilityError, match=r"bfloat16; set model.dtype=float32"):
        trainer.prepare(tasks)
    trainer, tasks = trainer_for(text_content, "osf")
    first, second = (m for n, m in trainer.model.module.named_modules() if n.endswith("q_proj"))
    second.base_layer.weight = first.base_layer.weight
    with pytest.raises(CapabilityError, match=r"q_proj' is shared with another layer"):
        trainer.prepare(tasks)
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    net = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    gpt2 = wrap(net, AutoTokenizer.from_pretrained(tiny_llama))
    model = {**text_content["model"], "lora": {"r": 0, "target_modules": ["c_attn"]}}
    config = resolve.validate({**text_content, "model": model, "strategy": "osf"})
    trainer = SequentialTrainer(gpt2, build.make_strategy(config.strategy), config)
    with pytest.raises(CapabilityError, match=r"peft's OSF adapts nn.Linear only.*none called c_attn"):
        trainer.prepare(build.make_tasks(config))
