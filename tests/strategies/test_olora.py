"""Orthogonal LoRA and the plain fresh-adapter strategy that it is without its penalty."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from stepping import after_tasks, disturb, injected, learn, named, one_batch, trainer_for

from clkit import api, resolve
from clkit.errors import CapabilityError, ConfigError
from clkit.strategies.olora import overlap


def test_the_overlap_has_the_gradient_that_autograd_finds_and_is_zero_for_orthogonal_rows():
    draw = torch.Generator().manual_seed(0)
    past = torch.randn(6, 10, dtype=torch.float64, generator=draw)
    new = torch.randn(3, 10, dtype=torch.float64, generator=draw, requires_grad=True)
    expected = sum((past[i] @ new[j]).abs() for i in range(6) for j in range(3))
    (slope,) = torch.autograd.grad(expected, new)
    loss, gradient = overlap(past, new.detach())
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert torch.allclose(gradient, slope, rtol=0, atol=1e-12)
    basis = torch.eye(5, dtype=torch.float64)
    loss, gradient = overlap(basis[:2], basis[2:])
    assert float(loss) == 0 and not gradient.any()


@pytest.mark.parametrize("micro", [0, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_step_has_the_gradient_of_the_written_loss(text_content, micro, checkpointing):
    content = {**text_content, "train": {**text_content["train"], "micro_batch": micro}}
    content["model"] = {**content["model"], "gradient_checkpointing": checkpointing}
    trainer, _ = after_tasks(content, "olora", 2, lambda1=0.3, lambda2=0.7)
    disturb(trainer)
    batch = one_batch(trainer, task=2)
    ours = injected(trainer, batch)
    trainer.model.module.zero_grad(set_to_none=True)
    total = trainer.strategy.loss(batch)["cross_entropy"]
    for name, layer in trainer.strategy.layers.items():
        olds = [task[name]["A"] for task in trainer.strategy.past.state_dict()]
        assert len(olds) == 2
        total = total + 0.3 * sum((old @ layer.A.T).abs().sum() for old in olds)
        total = total + 0.7 * (torch.linalg.norm(layer.A) + torch.linalg.norm(layer.B))
    total.backward()
    for name, parameter in named(trainer):
        assert torch.allclose(ours[name], parameter.grad, rtol=1e-4, atol=1e-6), name


def test_the_norm_of_an_adapter_that_is_zero_pulls_nowhere(text_content):
    trainer, _ = after_tasks(text_content, "olora", 1, lambda2=1.0)
    for layer in trainer.strategy.layers.values():
        layer.A.data.zero_()  # with B = 0: no direction to pull in, and no gradient of the loss
    gradients = injected(trainer, one_batch(trainer, task=1))
    assert all(torch.isfinite(g).all() and not g.any() for g in gradients.values())


def overlap_after(content, lambda1):
    """|A_old A_new^T| of unit rows, averaged, after the second task."""
    trainer, tasks = after_tasks(content, "olora", 1, lambda1=lambda1)
    learn(trainer, tasks, 1)
    first, second = trainer.strategy.past.state_dict()
    unit = torch.nn.functional.normalize
    cosines = [(unit(first[n]["A"], dim=1) @ unit(second[n]["A"], dim=1).T).abs().mean() for n in first]
    return float(torch.stack(cosines).mean())


def test_the_stronger_the_penalty_the_more_orthogonal_the_adapters(text_content):
    content = {**text_content, "train": {**text_content["train"], "epochs": 12, "learning_rate": 0.002}}
    angles = [overlap_after(content, lam) for lam in (0.0, 0.005, 0.5)]
    assert angles[0] > 1.2 * angles[1] and angles[1] > 1.2 * angles[2], angles


def test_without_penalty_it_is_reglora_without_regulariser_to_the_last_bit(text_content, tmp_path):
    ours = api.run(
        resolve.validate(
            {**text_content, "strategy": {"name": "olora", "lambda1": 0.0}, "output_dir": str(tmp_path / "o")}
        )
    )
    theirs = api.run(
        resolve.validate(
            {**text_content, "strategy": {"name": "reglora", "lam": 0.0}, "output_dir": str(tmp_path / "r")}
        )
    )
    np.testing.assert_array_equal(ours.matrix, theirs.matrix)
    first, second = ((r.run_dir / "export" / "adapter_model.safetensors").read_bytes() for r in (ours, theirs))
    assert first == second


def test_the_first_task_is_free_and_the_penalty_is_logged_from_the_second_on(text_content):
    result = api.run(resolve.validate({**text_content, "strategy": "olora"}))
    events = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
    values = [(e["total_steps"], e["value"]) for e in events if e["event"] == "value" and e["name"] == "penalty"]
    per_task = [e["steps"] for e in events if e["event"] == "task"]
    assert min(steps for steps, _ in values) == per_task[0]  # the first step of the second task
    assert all(value > 0 for _, value in values)


def test_what_can_not_work_is_refused_before_training(text_content):
    with pytest.raises(ConfigError, match="needs a LoRA adapter"):
        resolve.validate({**text_content, "model": {**text_content["model"], "lora": {"r": 0}}, "strategy": "olora"})
    with pytest.raises(ConfigError, match=r"strategy.lambda1"):
        resolve.validate({**text_content, "strategy": {"name": "olora", "lambda1": -1.0}})
    trainer, tasks = trainer_for(text_content, "olora")
    trainer.model.module = trainer.model.module.unload()
    with pytest.raises(CapabilityError, match=r"OLoRA needs a LoRA adapter.*set model.lora.r"):
        trainer.prepare(tasks)
