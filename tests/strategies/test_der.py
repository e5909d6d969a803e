"""DER: a whole network per task, in MEMO's machinery."""

from __future__ import annotations

import torch

from clkit import api, build, resolve
from clkit.models import load_classifier
from clkit.strategies.der import Der
from clkit.trainer import SequentialTrainer


def der(content, **options):
    return {**content, "strategy": {"name": "der", "replay": {"size": 15, "policy": "herding"}, **options}}


def test_every_task_has_a_network_of_its_own_and_the_published_number_of_parameters(vision_content):
    result = api.run(resolve.validate(der(vision_content)))
    with api.open_run(result.run_dir) as trainer:
        backbone = trainer.strategy.backbone
        assert not list(backbone.general.parameters()) and len(backbone.blocks) == 5
        one = sum(p.numel() for p in backbone.blocks[0].parameters())
        assert one == 18800 + 55552 and trainer.strategy._costs(trainer.run, backbone).model(4).parameters == 5 * one
    loaded = load_classifier(result.run_dir / "export").module
    assert loaded.head.weight.shape == (10, 5 * 64)


def test_only_the_newest_network_moves_and_the_old_features_are_cached(vision_content):
    config = resolve.validate(der(vision_content))
    tasks = build.make_tasks(config)
    model = build.make_model(config.model, tasks, 0, lambda text: None)
    trainer = SequentialTrainer(model, build.make_strategy(config.strategy), config)
    trainer.prepare(tasks)
    strategy = trainer.strategy
    assert isinstance(strategy, Der)
    for stage in (0, 1):
        trainer.position.stage = stage
        strategy.begin_task(tasks[stage])
    trainer._start_optimizer(3)
    model.module.train()
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    for batch in strategy.train_loader(tasks[1]):
        assert batch.inputs["old"].shape[1] == 64
        trainer._step(batch, tasks[1])
    moved = {k for k, v in model.module.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith(("backbone.blocks.1.", "head.")) for k in moved)
