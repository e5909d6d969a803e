"""Private trainers taken through single steps: what the tests of the private engine share."""

from __future__ import annotations

import copy

import torch

from clkit import build, resolve
from clkit.trainer import SequentialTrainer

PLAIN_SGD = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 1.0, "epochs": 1}
CLIP = 1e9


def private(content, train=None, model=None, **engine):
    """A trainer in its first stage, ready to step."""
    content = copy.deepcopy(content)
    content["engine"] = {"name": "private", "noise_multiplier": 0.0, "device": "cpu", "test_seed": 1, **engine}
    content["train"] = {**content["train"], **PLAIN_SGD, "clip": CLIP, **(train or {})}
    content["model"] = {**content["model"], **(model or {})}
    return begin(resolve.validate(content))


def plain(content, model=None):
    """The same with nothing on the module: to take gradients from."""
    return private(content, model=model, per_unit="loop")


def begin(config, directory=None):
    tasks = build.make_tasks(config)
    engine = build.check(config, tasks, build.make_strategy(config.strategy).capabilities)
    made = build.make_model(config.model, tasks, config.seed, lambda text: None)
    strategy = build.make_strategy(config.strategy)
    trainer = SequentialTrainer(made, strategy, config, engine=engine, directory=directory)
    trainer.prepare(tasks)
    trainer._start_optimizer(strategy.stage_steps(0))
    trainer.loader = engine.batches(strategy)
    made.module.train()
    return trainer


def trained(trainer):
    return {n: p for n, p in trainer.model.module.named_parameters() if p.requires_grad}


def batch_of(trainer, rows):
    return trainer.loader._source.batch(torch.tensor(rows, dtype=torch.long))


def moved(trainer, rows):
    """What one step on these rows takes away from each weight, at learning rate 1 and without momentum."""
    before = {n: p.detach().clone() for n, p in trained(trainer).items()}
    trainer._step(batch_of(trainer, rows), trainer.tasks[0])
    return {n: before[n] - p.detach() for n, p in trained(trainer).items()}


def example_gradients(trainer, rows):
    """The gradient of each row's own loss, by autograd, one row at a time."""
    found = []
    for row in rows:
        loss = trainer.model.loss(batch_of(trainer, [row]))
        weights = trained(trainer)
        found.append(dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)))
    return found


def clipped_sum(gradients, clip):
    """Each gradient scaled to a norm of at most ``clip``, and added up."""
    total = {n: torch.zeros_like(g) for n, g in gradients[0].items()}
    for gradient in gradients:
        norm = torch.sqrt(sum((g**2).sum() for g in gradient.values()))
        factor = min(1.0, clip / (float(norm) + 1e-6))
        for name, value in gradient.items():
            total[name] += factor * value
    return total


def norms(gradients):
    return [float(torch.sqrt(sum((g**2).sum() for g in gradient.values()))) for gradient in gradients]


def assert_near(ours, theirs, tolerance=1e-6):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance, name
