"""MEMO: what freezing, caching, budgets and the two classifiers promise, exact resume, and clear refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from clkit import api, build, resolve
from clkit.config import ModelConfig
from clkit.errors import CapabilityError, ConfigError, DataError, ModelError
from clkit.memory import Footprint
from clkit.models import load_classifier, load_model
from clkit.models.expandable import Expandable, restructure, structure_of
from clkit.models.heads import GrowingHead, NearestMeanHead
from clkit.strategies.memo.folding import folded
from clkit.strategies.memo.strategy import classes_by_task
from clkit.tasks.base import LabelledExamples, Task, TaskSequence
from clkit.trainer import SequentialTrainer


def memo(content, train=None, **options):
    """The digits configuration with MEMO on it."""
    strategy = {"name": "memo", "replay": {"size": 15, "policy": "herding"}, **options}
    return {**content, "strategy": strategy, "train": {**content["train"], **(train or {})}}


def events(run_dir, name):
    found = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [e["value"] for e in found if e["event"] == "value" and e["name"].startswith(name)]


class Cut(Exception):
    """Stands for a process that ends here."""


VARIANTS = {
    "trained base": {},
    "frozen base, cached": {"train_base": False},
    "frozen base, not cached": {"train_base": False, "cache": 0},
    "budget": {"budget": 1.8, "budget_at": "stage", "counting": "strict", "serve": "nearest-mean"},
    "first task": {"first": {"epochs": 2, "weight_decay": 0.01, "milestones": [0.5]}, "align": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_that_is_cut_at_any_step_ends_bit_identically(name, vision_content, tmp_path, monkeypatch):
    train = {"schedule": "milestones", "augment": "none" if "cached" in name else "crop-flip"}
    content = memo(vision_content, train, **VARIANTS[name])
    whole = api.run(resolve.validate({**content, "output_dir": str(tmp_path / "whole")}))
    config = resolve.validate({**content, "output_dir": str(tmp_path / "cut")})
    plain, left = SequentialTrainer._step, 0

    def step(self, batch, task):
        nonlocal left
        if left == 0:
            raise Cut
        left -= 1
        return plain(self, batch, task)

    monkeypatch.setattr(SequentialTrainer, "_step", step)
    for steps in (1, 3, 4, 3, 5):
        left = steps
        with pytest.raises(Cut):
            api.run(config)
    left = 10**6
    resumed = api.run(config)
    np.testing.assert_array_equal(resumed.matrix, whole.matrix)
    with api.open_run(whole.run_dir) as one, api.open_run(resumed.run_dir) as two:
        assert one.strategy.buffer.refs == two.strategy.buffer.refs
        ours, theirs = one.strategy.model_state(), two.strategy.model_state()
        assert ours.keys() == theirs.keys() and len(one.strategy.backbone.blocks) == 5
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        for a, b in zip(
            one.strategy.means.state_dict().values(), two.strategy.means.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b)


def started(content, stage, tasks=None):
    """A trainer whose strategy has begun every stage up to ``stage``, without training."""
    config = resolve.validate(content)
    tasks = tasks or build.make_tasks(config)
    model = build.make_model(config.model, tasks, config.seed, lambda text: None)
    trainer = SequentialTrainer(model, build.make_strategy(config.strategy), config)
    trainer.prepare(tasks)
    for t in range(stage + 1):
        trainer.position.stage = t
        trainer.strategy.begin_task(tasks[t])
        if t < stage:
            trainer.strategy.select_exemplars()
    trainer._start_optimizer(trainer.strategy.stage_steps(stage))
    trainer.model.module.train()
    return trainer


def shake(module):
    """Statistics and scales that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(3)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor in (m.weight.data, m.bias.data, m.running_mean):
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
            m.running_var.mul_(1 + torch.rand(m.running_var.shape, generator=generator))


def test_cached_features_give_the_steps_of_the_plain_path(vision_content):
    paths = []
    for cache in (2048, 0):
        trainer = started(memo(vision_content, train_base=False, cache=cache), 0)
        shake(trainer.model.module)
        for t in range(1, 4):
            trainer.strategy.select_exemplars()
            trainer.position.stage = t
            trainer.strategy.begin_task(trainer.tasks[t])
        trainer._start_optimizer(8)
        trainer.model.module.train()
        losses = []
        for batch in trainer.strategy.train_loader(trainer.tasks[3]):
            assert ("maps" in batch.inputs) == bool(cache)
            losses.append([float(v) for v in trainer._step(batch, trainer.tasks[3]).values()])
        paths.append((losses, trainer.strategy.model_state()))
    (cached, ours), (plain, theirs) = paths
    assert len(cached) == 5  # 24 new ones and 15 exemplars, eight at a time
    np.testing.assert_allclose(cached, plain, atol=1e-5)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("replay", [{"policy": "reservoir"}, {"policy": "herding", "mix": "batch"}])
@pytest.mark.parametrize("name", ["memo", "der"])
def test_exemplars_that_are_drawn_beside_the_new_examples_are_learned_as_themselves(vision_content, name, replay):
    frozen = {"train_base": False} if name == "memo" else {}
    content = memo(vision_content, replay={"size": 15, **replay}, **frozen)
    content["strategy"]["name"] = name
    config = resolve.validate(content)
    tasks = build.make_tasks(config)
    model = build.make_model(config.model, tasks, config.seed, lambda text: None)
    strategy = build.make_strategy(config.strategy)
    loss, learned = strategy.loss, []

    def watched(batch):
        learned.extend(zip(batch.ids, batch.labels.tolist(), strict=True))
        return loss(batch)

    strategy.loss = watched
    SequentialTrainer(model, strategy, config).fit(tasks)
    given = {i: y for task in tasks for i, y in zip(task.train.ids, task.train.labels.tolist(), strict=True)}
    assert len(learned) > 200 and all(given[i] == y for i, y in learned)


@pytest.mark.parametrize("train_base", [True, False])
def test_what_is_frozen_does_not_move_and_the_rest_does(vision_content, train_base):
    trainer = started(memo(vision_content, train_base=train_base, cache=0), 2)
    before = {k: v.clone() for k, v in trainer.model.module.state_dict().items()}
    for batch in trainer.strategy.train_loader(trainer.tasks[2]):
        trainer._step(batch, trainer.tasks[2])
    moved = {k for k, v in trainer.model.module.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("backbone.general.") for k in moved) == train_base
    assert not any(k.startswith(("backbone.blocks.0.", "backbone.blocks.1.")) for k in moved)
    assert {k for k in before if k.startswith(("backbone.blocks.2.", "head.")) and k != "head.classes"} <= moved


def gradient_of_the_shared_part(content, **options):
    trainer = started(memo(content, alpha_aux=0.0, cache=0, **options), 1)
    with torch.no_grad():
        trainer.strategy.head.weight[:, 64:] = 0  # the new block's features count for nothing
    batch = next(iter(trainer.strategy.train_loader(trainer.tasks[1])))
    sum(trainer.strategy.loss(batch).values()).backward()
    return sum(float(p.grad.abs().sum()) for p in trainer.strategy.backbone.general.parameters())


def test_the_gradient_reaches_the_shared_part_through_the_old_blocks_unless_it_is_cut(vision_content):
    assert gradient_of_the_shared_part(vision_content) > 1e-3
    assert gradient_of_the_shared_part(vision_content, stop_old_gradient=True) == 0


@pytest.mark.parametrize("name", ["cifar-resnet-14", "resnet-18", "efficientnet-lite0"])
def test_folded_blocks_compute_the_same(name):
    backbone = built(name).module.backbone
    grown = Expandable(backbone, backbone.default_cut).eval()
    shake(grown)
    maps = grown.maps(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    block = grown.blocks[0]
    fast = folded(block, grown.foldable)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in block.modules()) > 0
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    with torch.no_grad():
        torch.testing.assert_close(fast(maps), block(maps), atol=2e-5, rtol=1e-4)
    assert folded(block, False) is block


def built(name, classes=4, shape=(3, 64, 64), **options):
    import clkit.models.backbones.efficientnet_lite as lite
    from clkit.models.classifier import Classifier, ClassifierNet

    generator = torch.Generator().manual_seed(0)
    config = ModelConfig(name=name, **options)
    if name == "efficientnet-lite0":  # its weights would have to be fetched
        net = ClassifierNet(lite.build(config, shape, generator), classes, generator)
        return Classifier(config, net, input_shape=shape)
    return load_model(config, num_classes=classes, input_shape=shape, generator=generator)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cifar-resnet-8", (3, 32, 32)),
        ("resnet-18", (3, 64, 64)),
        ("efficientnet-lite0", (1, 48, 48)),
        ("mlp", (7,)),
    ],
)
def test_a_network_that_was_cut_anywhere_still_computes_the_same(name, shape):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    model = built(name, shape=shape, **({"hidden": [6, 5]} if name == "mlp" else {}))
    backbone = model.module.backbone.eval()
    parts = backbone.parts()
    with torch.no_grad():
        expected = backbone(x)
        for cut in (c for c in parts if c != "pool"):
            grown = Expandable(backbone, cut)
            grown.grow()
            features = grown.eval()(x)
            assert features.shape == (2, 2 * backbone.out_features)
            torch.testing.assert_close(features, expected.repeat(1, 2), atol=2e-5, rtol=1e-4)


class TestBudget:
    def test_the_buffer_follows_from_the_bytes(self, vision_content):
        for at in ("end", "stage"):
            trainer = started(memo(vision_content, budget=1.8, budget_at=at), 4)
            costs, budget = trainer.strategy.costs, round(1.8 * 2**20)
            general, block = 18800, 55552  # ResNet-8 with one input channel
            assert (costs.general.parameters, costs.block.parameters) == (general, block)
            for stage in range(5):
                blocks = 5 if at == "end" else stage + 1
                left = budget - 4 * (general + blocks * block)
                assert trainer.strategy.exemplar_limit(stage) == left // 256
            held = len(trainer.strategy.buffer)
            trainer.strategy.select_exemplars()
            assert len(trainer.strategy.buffer) == min(5 * 24, trainer.strategy.exemplar_limit(4)) and held == 4 * 24

    def test_the_strict_counting_is_that_of_the_module_as_it_is(self, vision_content):
        trainer = started(memo(vision_content, budget=1.8, counting="strict"), 3)
        strategy = trainer.strategy
        whole = Footprint.of(strategy.backbone, [strategy.aux])
        head = 4 * (strategy.head.weight.numel() + strategy.head.bias.numel())
        model = strategy.costs.model(3)
        assert (model.parameters, model.statistics, model.heads) == (
            whole.parameters,
            whole.statistics,
            whole.heads + head,
        )

    def test_measuring_what_is_cached_leaves_the_network_as_it_was(self, vision_content):
        trainer = started(memo(vision_content, budget=2.5, counting="strict", train_base=False), 0)
        assert trainer.strategy.costs.cached_per_exemplar == 4 * 32 * 4 * 4
        assert not any(
            int(m.num_batches_tracked) for m in trainer.model.module.modules() if isinstance(m, nn.BatchNorm2d)
        )
        plain = started(memo(vision_content, budget=2.5, counting="strict", train_base=False, cache=0), 0)
        assert plain.strategy.exemplar_limit(0) > trainer.strategy.exemplar_limit(0)

    def test_memory_is_logged_stage_and_end_aligned(self, vision_content):
        result = api.run(resolve.validate(memo(vision_content)))
        now, end = events(result.run_dir, "memory_stage"), events(result.run_dir, "memory_end")
        assert len(now) == len(end) == 5 and now == sorted(now) and now[-1] == end[-1]
        assert end[0] * 2**20 == pytest.approx(4 * (18800 + 5 * 55552) + 15 * 256)

    def test_a_budget_smaller_than_the_model_is_refused(self, vision_content):
        message = r"strategy.budget: got 1.000 MiB, expected at least 1.134 \(paper counting\): the model after 5 tasks"
        with pytest.raises(ConfigError, match=message):
            api.run(resolve.validate(memo(vision_content, budget=1)))


class TestTwoClassifiers:
    def test_the_nearest_mean_serves_is_exported_and_the_linear_one_is_logged(self, vision_content):
        result = api.run(resolve.validate(memo(vision_content, serve="nearest-mean")))
        other = api.run(resolve.validate({**memo(vision_content), "output_dir": vision_content["output_dir"] + "2"}))
        assert events(result.run_dir, "linear/")[-5:] == pytest.approx(other.matrix[-1].tolist())
        assert events(other.run_dir, "nearest-mean/")[-5:] == pytest.approx(result.matrix[-1].tolist())
        loaded = load_classifier(result.run_dir / "export").module
        assert isinstance(loaded.head, NearestMeanHead)
        with api.open_run(result.run_dir) as trainer, trainer.serving(), torch.inference_mode():
            batch = trainer.run.encodings.train(0).batch(torch.arange(4))
            assert torch.equal(loaded(**batch.inputs), trainer.model.module.eval()(**batch.inputs))

    def test_means_are_those_of_the_exemplars_and_the_published_ranking(self, data_root):
        with np.load(data_root.parent / "golden" / "memo" / "tables.npz") as tables:
            for stage in range(3):
                means = torch.from_numpy(tables[f"mem/s{stage}/class_means"])
                head = NearestMeanHead(len(means) + 1, means.shape[1])  # and one class without a mean
                for label, mean in enumerate(means):
                    head.set(label, mean)
                ranked = head(torch.from_numpy(tables[f"mem/s{stage}/nme_query"])).argsort(dim=1, descending=True)
                stored = tables[f"mem/s{stage}/nme_ranked"]
                assert ranked[:, : stored.shape[1]].tolist() == stored.tolist()
                assert (ranked[:, -1] == len(means)).all()


def test_a_structure_rebuilds_the_module():
    model = built("cifar-resnet-8", classes=6, shape=(3, 32, 32))
    restructure(model.module, {"cut": "stage2", "blocks": 3, "classes": [4, 1, 2]})
    assert structure_of(model.module) == {"cut": "stage2", "blocks": 3, "classes": [4, 1, 2]}
    head = model.module.head
    assert isinstance(head, GrowingHead) and head.weight.shape == (3, 192)
    assert head.rows_of(torch.tensor([1, 4, 2])).tolist() == [1, 0, 2]
    logits = model.module(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 6) and (logits[:, [0, 3, 5]] == torch.finfo(torch.float32).min).all()


def test_zero_columns_keep_the_logits_of_old_classes():
    head, generator = GrowingHead(4, 3), torch.Generator().manual_seed(0)
    head.grow([2, 0], 3, generator)
    features = torch.randn(5, 6, generator=generator)
    before = head(features[:, :3])
    head.grow([3], 6, generator, zero_columns=True)
    torch.testing.assert_close(head(features)[:, [2, 0]], before[:, [2, 0]])


class TestRefusals:
    def sequence(self, *labels):
        tasks = []
        for t, classes in enumerate(labels):
            examples = LabelledExamples(
                torch.zeros(len(classes), 1, 8, 8), torch.tensor(classes), [f"{t}/{i}" for i in range(len(classes))]
            )
            tasks.append(Task(f"t{t}", examples, examples, "classification", "accuracy"))
        return TaskSequence(tasks)

    def test_a_class_that_returns(self):
        with pytest.raises(DataError, match="task 't2': brings class 1 back, which task 't0' had"):
            classes_by_task(self.sequence([0, 1], [2], [3, 1]))

    def test_more_tasks_than_classes(self, vision_content):
        content = {**vision_content, "tasks": {**vision_content["tasks"], "num_tasks": 11}}
        with pytest.raises(ConfigError, match="tasks.num_tasks"):
            resolve.validate(memo(content))
        empty = LabelledExamples(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long), [])
        tasks = [*self.sequence([0], [1]), Task("t2", empty, empty, "classification", "accuracy")]
        with pytest.raises(DataError, match="task 't2': has no class"):
            classes_by_task(TaskSequence(tasks))

    def test_a_part_that_the_backbone_does_not_have(self, vision_content):
        with pytest.raises(ModelError, match=r"no part 'stag3' .* Did you mean 'stage3'\? It has stem, stage1"):
            api.run(resolve.validate(memo(vision_content, cut="stag3")))

    @pytest.mark.parametrize(("option", "match"), [("freeze_backbone", "model.freeze_backbone: strategy 'memo'")])
    def test_a_backbone_that_is_not_trained(self, vision_content, option, match):
        content = {**vision_content, "model": {**vision_content["model"], option: True}}
        with pytest.raises(CapabilityError, match=match):
            api.run(resolve.validate(memo(content)))

    def test_a_module_of_ones_own(self):
        trainer = SequentialTrainer(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), "memo")
        with pytest.raises(CapabilityError, match="grows the classifiers that clkit builds"):
            trainer.fit(self.sequence([0], [1]))

    @pytest.mark.parametrize(
        ("options", "where"),
        [
            ({"budget": 1.8, "budget_at": "stage", "replay": {"policy": "reservoir"}}, "strategy.replay.policy"),
            ({"train_base": False, "stop_old_gradient": True}, "strategy.stop_old_gradient"),
            ({"serve": "nearest-mean", "replay": {"size": 0}}, "strategy.serve"),
        ],
    )
    def test_options_that_contradict_each_other(self, vision_content, options, where):
        with pytest.raises(ConfigError, match=where):
            resolve.validate(memo(vision_content, **options))
