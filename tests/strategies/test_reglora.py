"""RegLoRA in training: the gradient it adds, the sum of past updates, its options, its export."""

from __future__ import annotations

import contextlib
import json

import pytest
import stepping
import torch
from safetensors.torch import load_file
from stepping import disturb, injected, logits, named, one_batch

from clkit import api, build, resolve
from clkit.errors import CapabilityError, ConfigError, ModelError
from clkit.models.lora_sum import adapted_layers
from clkit.rundir import run_directory
from clkit.signals import Interrupted


def trainer_for(content, **options):
    return stepping.trainer_for(content, "reglora", **options)


def after_tasks(content, count, **options):
    return stepping.after_tasks(content, "reglora", count, **options)


# --- the gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpointing", "micro", "options"),
    [
        (False, 0, {}),
        (False, 2, {}),
        (True, 0, {}),
        (False, 0, {"scaled": True}),
        (False, 0, {"reduction": "sum", "lam": 10.0}),
        (False, 0, {"n_div": 224}),
    ],
)
def test_one_step_has_the_gradient_of_the_published_loss(text_content, checkpointing, micro, options):
    content = {**text_content, "train": {**text_content["train"], "micro_batch": micro}}
    content["model"] = {**content["model"], "gradient_checkpointing": checkpointing}
    trainer, _ = after_tasks(content, 2, fraction=0.1, **options)
    disturb(trainer)
    batch = one_batch(trainer, task=2)
    ours = injected(trainer, batch)
    trainer.model.module.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for name, layer in trainer.strategy.layers.items():
        mask = trainer.strategy.masks[name]
        counts = torch.ones(len(mask.pattern)).long() if mask.multiplicity is None else mask.multiplicity.long()
        flat = mask.pattern.flat().repeat_interleave(counts)  # the published list, duplicates and all
        chosen = (layer.B @ layer.A).flatten()[flat].abs() * (layer.scaling if options.get("scaled") else 1.0)
        total = total + (chosen.sum() if options.get("reduction") == "sum" else chosen.mean())
    strength = options.get("lam", 2500.0) / options.get("n_div", 4)
    (trainer.strategy.loss(batch)["cross_entropy"] + strength * total).backward()
    for name, parameter in named(trainer):
        assert torch.allclose(ours[name], parameter.grad, rtol=1e-4, atol=1e-4 * float(parameter.grad.abs().max())), (
            name
        )


def test_clipping_sees_the_sum_of_both_gradients(text_content):
    trainer, _ = after_tasks(text_content, 1)
    disturb(trainer)
    trainer.engine.start(trainer.strategy.parameters(), trainer.config.train, 1)
    norms, plain = [], trainer.engine.step
    trainer.engine.step = lambda: norms.append(plain()) or norms[-1]
    trainer._step(one_batch(trainer, task=1), None)
    trainer2, _ = after_tasks(text_content, 1, lam=0.0)
    disturb(trainer2)
    trainer2.engine.start(trainer2.strategy.parameters(), trainer2.config.train, 1)
    plain2 = trainer2.engine.step
    trainer2.engine.step = lambda: norms.append(plain2()) or norms[-1]
    trainer2._step(one_batch(trainer2, task=1), None)
    assert norms[0] > 10 * norms[1]


def test_every_second_step_pulls_twice_as_hard(text_content):
    trainer, _ = after_tasks(text_content, 1, every=2)
    once, _ = after_tasks(text_content, 1, every=1)
    pulls = {}
    for key, source in (("two", trainer), ("one", once)):
        disturb(source)
        for step in (0, 1):
            source.model.module.zero_grad(set_to_none=True)
            source.position.step = step
            source.strategy.after_backward()
            pulls[key, step] = [None if p.grad is None else p.grad.clone() for _, p in named(source)]
    assert all(p is None for p in pulls["two", 1])
    for two, one in zip(pulls["two", 0], pulls["one", 0], strict=True):
        assert torch.allclose(two, 2 * one)


def test_the_first_task_has_no_regulariser_and_its_value_is_logged_later(text_content):
    strong = api.run(resolve.validate({**text_content, "strategy": {"name": "reglora", "lam": 1e6}}))
    events = [json.loads(line) for line in (strong.run_dir / "events.jsonl").read_text().splitlines()]
    values = [(e["total_steps"], e["value"]) for e in events if e["event"] == "value" and e["name"] == "regulariser"]
    first = min(steps for steps, _ in values)
    per_task = [e["steps"] for e in events if e["event"] == "task"]
    assert first == per_task[0]  # the first step of the second task
    assert values[0][1] == 0.0 and any(v > 0 for _, v in values)  # B = 0 at the start


def test_its_value_is_logged_also_where_it_acts_in_every_second_step_only(text_content):
    text_content |= {"tracking": {"log_every": 2}, "train": {**text_content["train"], "steps": 8, "epochs": 1}}
    result = api.run(resolve.validate({**text_content, "strategy": {"name": "reglora", "every": 2}}))
    events = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
    assert sum(e["event"] == "value" and e["name"] == "regulariser" for e in events) == 2 * 4


# --- what the regulariser does --------------------------------------------------------------------------------------


def drift(content, **options):
    """Sum of |B A| of the second task on the entries that the first protects, and on all."""
    trainer, tasks = after_tasks(content, 1, **options)
    masks = dict(trainer.strategy.masks)
    updates = {}
    plain = trainer.strategy.past.add
    trainer.strategy.past.add = lambda found: updates.update(found) or plain(found)
    trainer._learn(tasks[1])
    products = {name: (b @ a).abs() for name, (a, b) in updates.items()}
    on_mask = sum(float(p.flatten()[masks[n].pattern.flat()].sum()) for n, p in products.items() if n in masks)
    return on_mask, sum(float(p.sum()) for p in products.values())


def test_protected_entries_move_less_the_stronger_the_regulariser(text_content):
    content = {**text_content, "train": {**text_content["train"], "epochs": 6}}
    moved = [drift(content, lam=lam)[0] for lam in (0.0, 100.0, 10_000.0)]
    assert moved[0] > moved[1] > moved[2]


def test_protecting_everything_with_all_strength_keeps_the_model_as_it_is(text_content):
    free, held = (drift(text_content, lam=lam, mask="all")[1] for lam in (0.0, 1e8))
    assert held < 0.35 * free


@pytest.mark.parametrize("accumulate", ["concat", "union"])
def test_random_masks_are_as_large_as_top_masks_and_elsewhere(text_content, accumulate):
    top, _ = after_tasks(text_content, 1, accumulate=accumulate)
    random, _ = after_tasks(text_content, 1, mask="random", accumulate=accumulate)
    for name, mask in top.strategy.masks.items():
        other = random.strategy.masks[name]
        assert len(other.pattern) == len(mask.pattern) == int(0.02 * mask.pattern.shape[0] * mask.pattern.shape[1])
        assert not torch.equal(other.pattern.flat(), mask.pattern.flat())


def test_lambda_zero_is_sequential_lora_with_merging(text_content):
    """Bit for bit: a fresh adapter per task on the merged model, trained by the naive strategy."""
    ours, tasks = after_tasks(text_content, 1, lam=0.0)
    start = {n: p.detach().clone() for n, p in ours.model.module.named_parameters()}
    ours._learn(tasks[1])
    (updates,) = ours.strategy.past.state_dict()[1:]
    theirs, _ = trainer_for(text_content)
    theirs.strategy = build.make_strategy(resolve.validate({**text_content, "strategy": "naive"}).strategy)
    theirs.prepare(tasks)
    theirs.position.stage, theirs.position.total_steps = 1, ours.position.total_steps - ours.position.step
    theirs.model.module.load_state_dict(start, strict=False)
    theirs._learn(tasks[1])
    for name, layer in adapted_layers(theirs.model.module).items():
        a, b = layer.update()
        assert torch.equal(updates[name]["A"], a) and torch.equal(updates[name]["B"], b)


# --- what leaves ----------------------------------------------------------------------------------------------------


def test_the_export_is_one_plain_adapter_of_all_tasks(text_content):
    from peft import PeftConfig

    result = api.run(resolve.validate({**text_content, "strategy": "reglora"}))
    config = PeftConfig.from_pretrained(result.run_dir / "export")
    assert (config.r, config.lora_alpha) == (12, 12)  # three tasks of rank 4
    weights = load_file(result.run_dir / "export" / "adapter_model.safetensors")
    assert {tuple(w.shape) for k, w in weights.items() if "lora_A" in k} == {(12, 32)}


def test_an_export_in_the_middle_of_a_task_holds_the_current_adapter_too(text_content, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer, _ = after_tasks(text_content, 1)
    disturb(trainer)
    current = {n: p.detach().clone() for n, p in named(trainer)}
    trainer.model.module.eval()
    served = logits(trainer)
    trainer.strategy.export(tmp_path / "export")
    assert all(torch.equal(p, current[n]) for n, p in named(trainer))
    assert trainer.model.module.peft_config["default"].r == 4
    base = AutoModelForCausalLM.from_pretrained(text_content["model"]["name"], dtype=torch.float32)
    trainer.model.module = PeftModel.from_pretrained(base, tmp_path / "export").eval()
    assert torch.allclose(logits(trainer), served, atol=1e-5)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_model_without_an_adapter_is_refused(text_content):
    with pytest.raises(ConfigError, match=r"needs a LoRA adapter"):
        resolve.validate({**text_content, "model": {**text_content["model"], "lora": {"r": 0}}, "strategy": "reglora"})
    trainer, tasks = trainer_for(text_content)
    trainer.model.module = trainer.model.module.unload()
    with pytest.raises(CapabilityError, match=r"needs a LoRA adapter.*set model.lora.r"):
        trainer.prepare(tasks)


def test_options_out_of_range_are_refused_all_at_once(text_content):
    options = {"name": "reglora", "fraction": 0.0, "mask": "tops", "every": 0}
    with pytest.raises(ConfigError) as caught:
        resolve.validate({**text_content, "strategy": options})
    for key in ("strategy.fraction", "strategy.mask", "strategy.every"):
        assert key in str(caught.value)


# --- the same model again, in one process -----------------------------------------------------------------------------


def fit_until(content, model, total, name="reglora"):
    """A run as `trainer_for` makes it, with a model that is there already; stopped after ``total`` steps."""
    trainer, tasks = trainer_for(content) if name == "reglora" else stepping.trainer_for(content, name)
    trainer.model = model or trainer.model
    trainer.directory = run_directory(content["output_dir"], 2, True)
    after_step = trainer.strategy.after_step

    def after() -> None:
        after_step()
        trainer._asked = trainer._asked or trainer.position.total_steps == total

    trainer.strategy.after_step = after
    with pytest.raises(Interrupted) if total else contextlib.nullcontext():
        trainer.fit(tasks)
    return trainer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_is_stopped_and_called_again_with_the_same_model_ends_bit_identically(text_content, tmp_path, dtype):
    content = {**text_content, "model": {**text_content["model"], "dtype": dtype}}
    whole = fit_until({**content, "output_dir": str(tmp_path / "whole")}, None, 0)
    model = fit_until(content, None, 9).model  # in the third of three tasks
    again = fit_until(content, model, 0)
    weights = [load_file(t.directory.path / "export" / "adapter_model.safetensors") for t in (whole, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.equal(logits(again), logits(whole))


@pytest.mark.parametrize("name", ["reglora", "naive"])
def test_a_model_with_the_updates_of_another_run_in_it_is_refused(text_content, tmp_path, name):
    model = fit_until({**text_content, "output_dir": str(tmp_path / "other")}, None, 5).model
    with pytest.raises(ModelError, match=r"still has the updates of an earlier run.*Load the model again"):
        fit_until(text_content, model, 0, name)
