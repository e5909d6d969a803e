"""Elastic weight consolidation against closed forms: the Fisher matrix, the penalty, the sum of quadratics."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from stepping import after_tasks, injected, learn, named, one_batch
from torch import nn

from clkit import api, resolve
from clkit.errors import ConfigError
from clkit.strategies.ewc import EWC, EWCConfig
from clkit.tasks.base import LabelledExamples, Task, TaskSequence
from clkit.trainer import SequentialTrainer


def logistic(count=40, seed=0, **options):
    """A logistic regression in float64 on two random tasks, before the first step."""
    draw = torch.Generator().manual_seed(seed)
    tasks = []
    for name in ("first", "second"):
        x = torch.randn(count, 5, dtype=torch.float64, generator=draw)
        examples = LabelledExamples(
            x, torch.randint(3, (count,), generator=draw), [f"{name} {i}" for i in range(count)]
        )
        tasks.append(Task(name, examples, examples, "classification", "accuracy"))
    net = nn.Linear(5, 3).double()
    with torch.no_grad():
        net.weight.copy_(torch.randn(3, 5, generator=draw))
        net.bias.copy_(torch.randn(3, generator=draw))
    trainer = SequentialTrainer(net, EWC(EWCConfig(**options)), {"train": {"learning_rate": 0.01}})
    trainer.prepare(TaskSequence(tasks))
    return trainer


def closed_form(trainer, task, spread):
    """Of softmax regression: the mean over rows of ``spread(p, y)`` (N, C) times x^2."""
    examples = trainer.tasks[task].train
    x, y = examples.inputs, nn.functional.one_hot(examples.labels, 3).double()
    with torch.no_grad():
        per_class = spread(trainer.model.module(x).softmax(-1), y)
    return {"weight": per_class.T @ x.square() / len(x), "bias": per_class.mean(0)}


def test_the_fisher_matrix_of_a_logistic_regression_is_the_closed_form():
    trainer = logistic(examples=0)
    ours, expected = trainer.strategy.estimate(), closed_form(trainer, 0, lambda p, y: (p - y).square())
    for name, value in expected.items():
        assert torch.allclose(ours[name], value, rtol=1e-12, atol=1e-14)


def test_with_labels_of_the_model_it_is_the_true_fisher_matrix_on_average():
    trainer = logistic(count=4000, examples=0, labels="model")
    ours, expected = trainer.strategy.estimate(), closed_form(trainer, 0, lambda p, y: p * (1 - p))
    empirical = closed_form(trainer, 0, lambda p, y: (p - y).square())
    for name, value in expected.items():
        assert torch.allclose(ours[name], value, rtol=0.1)
        assert not torch.allclose(empirical[name], value, rtol=0.1), "the given labels are random: another matrix"


def test_an_answer_counts_each_of_its_tokens(text_content):
    """Sum over examples of the squared gradient of the answer's log-likelihood, over the number of tokens."""
    trainer, _ = after_tasks(text_content, "ewc", 1, lam=0.0)
    wanted, targets = {n: torch.zeros_like(p) for n, p in named(trainer)}, 0
    encoded = trainer.run.encodings.train(1)
    for i in range(len(encoded)):
        batch = encoded.batch(torch.tensor([i]))
        scores = trainer.model.module(**batch.inputs).logits[0, :-1].log_softmax(-1)
        kept = (batch.labels[0, 1:] != -100).nonzero()[:, 0]
        assert len(kept) > 1
        slopes = torch.autograd.grad(scores[kept, batch.labels[0, 1:][kept]].sum(), [p for _, p in named(trainer)])
        for (name, _), slope in zip(named(trainer), slopes, strict=True):
            wanted[name] += slope.square()
        targets += len(kept)
    for name, value in trainer.strategy.estimate().items():
        assert torch.allclose(value, wanted[name] / targets, rtol=1e-3, atol=1e-3 * float(value.max())), name


def test_the_penalty_never_enters_the_fisher_matrix_and_estimating_leaves_no_gradient():
    """The published code squared the gradients of the whole loss."""
    trainer = logistic(lam=1e6, examples=0)
    learn(trainer, trainer.tasks, 0)
    with torch.no_grad():
        trainer.model.module.weight += 1.0  # far from the centre: the penalty's gradient is enormous here
    ours, expected = trainer.strategy.estimate(), closed_form(trainer, 1, lambda p, y: (p - y).square())
    assert torch.allclose(ours["weight"], expected["weight"], rtol=1e-12)
    assert trainer.model.module.weight.grad is None
    trainer.strategy.after_backward()
    assert float(trainer.model.module.weight.grad.abs().max()) > 1e3


@pytest.mark.parametrize("micro", [0, 3])
def test_one_step_has_the_gradient_of_the_written_loss(text_content, micro):
    content = {**text_content, "train": {**text_content["train"], "micro_batch": micro}}
    trainer, _ = after_tasks(content, "ewc", 1, lam=50.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in named(trainer):
            p += 0.1 * torch.randn(p.shape, generator=generator)
    batch = one_batch(trainer, task=1)
    ours = injected(trainer, batch)
    trainer.model.module.zero_grad(set_to_none=True)
    strategy = trainer.strategy
    penalty = sum((strategy.fisher[n] * (p - strategy.centre[n]).square()).sum() for n, p in named(trainer))
    assert float(penalty.detach()) > 0
    (strategy.loss(batch)["cross_entropy"] + 50.0 / 2 * penalty).backward()
    for name, parameter in named(trainer):
        assert torch.allclose(ours[name], parameter.grad, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(("mode", "decay"), [("separate", 1.0), ("online", 0.3), ("online", 0.0)])
def test_the_quadratics_of_all_tasks_add_up(mode, decay):
    trainer = logistic(lam=2.0, mode=mode, decay=decay, examples=0)
    weights, logged, past = dict(trainer.model.module.named_parameters()), [], []
    for stage in (0, 1):
        trainer.position.stage, trainer.position.step = stage, 0
        trainer._learn(trainer.tasks[stage])
        past.append((trainer.strategy.estimate(), {n: p.detach().clone() for n, p in weights.items()}))
    (old, old_centre), (new, centre) = past
    assert not torch.equal(old_centre["weight"], centre["weight"])
    draw = torch.Generator().manual_seed(5)
    for p in weights.values():
        p.data += torch.randn(p.shape, dtype=p.dtype, generator=draw)
        p.grad = None
    if mode == "separate":
        quadratics = [(old, old_centre), (new, centre)]
    else:
        quadratics = [({n: decay * f for n, f in old.items()}, centre), (new, centre)]
    wanted = sum((f[n] * (p - c[n]).square()).sum() for f, c in quadratics for n, p in weights.items())
    slopes = torch.autograd.grad(wanted, list(weights.values()))
    trainer.run.log = lambda name, value: logged.append((name, value))
    trainer.position.step = 0
    trainer.strategy.after_backward()
    for p, slope in zip(weights.values(), slopes, strict=True):
        assert torch.allclose(p.grad, slope, rtol=1e-9, atol=1e-12)  # lam / 2 = 1
    assert logged == [("penalty", pytest.approx(float(wanted.detach()), rel=1e-9))]


def test_strength_zero_is_sequential_fine_tuning_to_the_last_bit(text_content, tmp_path):
    def run(strategy, where):
        return api.run(resolve.validate({**text_content, "strategy": strategy, "output_dir": str(tmp_path / where)}))

    ours, naive = run({"name": "ewc", "lam": 0.0}, "ours"), run("naive", "naive")
    np.testing.assert_array_equal(ours.matrix, naive.matrix)
    first, second = ((r.run_dir / "export" / "adapter_model.safetensors").read_bytes() for r in (ours, naive))
    assert first == second


def test_it_keeps_more_of_real_digits_than_sequential_fine_tuning(tmp_path):
    content = {
        "seed": 1,  # an order of tasks in which naive forgets much
        "model": {"name": "mlp", "hidden": [64], "lora": {"r": 0}},
        "tasks": {"source": "digits", "scenario": "task"},
        "train": {"epochs": 6, "batch_size": 32, "optimizer": "sgd", "learning_rate": 0.05},
    }
    results = {}
    for strategy in ("naive", {"name": "ewc"}, {"name": "ewc", "mode": "separate"}, {"name": "ewc", "labels": "model"}):
        where = str(tmp_path / str(len(results)))
        metrics = api.run(resolve.validate({**content, "strategy": strategy, "output_dir": where})).metrics
        results[str(strategy)] = metrics
    naive = results.pop("naive")
    for name, metrics in results.items():
        assert metrics["forgetting"] < 0.5 * naive["forgetting"], name
        assert metrics["average_accuracy"] > naive["average_accuracy"], name


def test_only_so_many_examples_are_looked_at_and_others_each_time(monkeypatch):
    trainer, seen = logistic(count=20, examples=7), []
    plain = trainer.model.logits
    monkeypatch.setattr(trainer.model, "logits", lambda batch: seen.append(batch.ids) or plain(batch))
    trainer.strategy.estimate()
    trainer.strategy.estimate()
    assert [len(ids) for ids in seen] == [1] * 14
    assert len({*map(tuple, seen[:7])}) == 7 and seen[:7] != seen[7:]


def test_the_penalty_is_logged_from_the_second_task_on(text_content):
    result = api.run(resolve.validate({**text_content, "strategy": "ewc"}))
    events = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
    values = [(e["total_steps"], e["value"]) for e in events if e["event"] == "value" and e["name"] == "penalty"]
    per_task = [e["steps"] for e in events if e["event"] == "task"]
    assert min(steps for steps, _ in values) == per_task[0]
    assert values[0][1] == 0.0 and any(value > 0 for _, value in values)


def test_options_out_of_range_are_refused_all_at_once(text_content):
    options = {"name": "ewc", "lam": -1.0, "mode": "both", "decay": 2.0, "examples": -1, "labels": "none"}
    with pytest.raises(ConfigError) as caught:
        resolve.validate({**text_content, "strategy": options})
    for key in ("lam", "mode", "decay", "examples", "labels"):
        assert f"strategy.{key}" in str(caught.value)
    with pytest.raises(ConfigError, match=r"strategy.decay: with mode=separate every task counts in full"):
        resolve.validate({**text_content, "strategy": {"name": "ewc", "mode": "separate", "decay": 0.5}})
