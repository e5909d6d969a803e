"""Take a strategy through tasks step by step: what its tests share."""

from __future__ import annotations

import torch

from clkit import build, resolve
from clkit.trainer import SequentialTrainer


def trainer_for(content, name, **options):
    config = resolve.validate({**content, "strategy": {"name": name, **options}})
    tasks = build.make_tasks(config)
    model = build.make_model(config.model, tasks, config.seed, lambda text: None)
    return SequentialTrainer(model, build.make_strategy(config.strategy), config), tasks


def after_tasks(content, name, count, **options):
    """A trainer that has learned the first ``count`` tasks, at the beginning of the next."""
    trainer, tasks = trainer_for(content, name, **options)
    trainer.prepare(tasks)
    for stage in range(count):
        learn(trainer, tasks, stage)
    return trainer, tasks


def learn(trainer, tasks, stage):
    trainer._learn(tasks[stage])
    trainer.position.stage, trainer.position.step = stage + 1, 0


def disturb(trainer, seed=0):
    """Give the current adapter values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in trainer.strategy.layers.values():
        layer.B.data = torch.randn(layer.B.shape, generator=generator) * 0.1


def one_batch(trainer, task=0, rows=4):
    return trainer.run.encodings.train(task).batch(torch.arange(rows))


@torch.no_grad()
def logits(trainer, batch=None):
    return trainer.model.logits(one_batch(trainer) if batch is None else batch).clone()


def injected(trainer, batch):
    """Gradients as the trainer makes them, stopped before the update."""
    kept = {}
    trainer.engine.step = lambda: kept.update({n: p.grad.clone() for n, p in named(trainer)})
    trainer.engine.start(trainer.strategy.parameters(), trainer.config.train, 1)
    trainer._step(batch, None)
    return kept


def named(trainer):
    return [(n, p) for n, p in trainer.model.module.named_parameters() if p.requires_grad]
