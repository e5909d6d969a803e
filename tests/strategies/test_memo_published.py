"""MEMO against the published implementation's numbers: outputs, steps, growth, alignment, schedules, other depths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from clkit import resolve
from clkit.build import make_strategy
from clkit.config import ModelConfig
from clkit.engine.local import lr_factor
from clkit.models import load_model
from clkit.models.backbones.base import Backbone, Chain, MeanOverPixels
from clkit.models.classifier import Classifier, ClassifierNet
from clkit.models.expandable import restructure
from clkit.models.heads import align_new_rows
from clkit.strategies.memo.strategy import auxiliary_targets
from clkit.tasks.base import LabelledExamples, Task, TaskSequence
from clkit.tasks.batch import Batch
from clkit.trainer import SequentialTrainer

SIZES = (3, 2, 2)
STATISTICS = {"mean": "running_mean", "var": "running_var"}


@pytest.fixture(scope="module")
def golden(data_root):
    return data_root.parent / "golden" / "memo"


@pytest.fixture(scope="module")
def tiny(golden):
    with np.load(golden / "tiny_net.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def depths(golden):
    with np.load(golden / "depths.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def tables(golden):
    with np.load(golden / "tables.npz") as stored:
        return dict(stored)


def ours(role: str, last: str) -> str:
    """The name of a golden role in our module; ``last`` is the stage that is copied."""
    part, *rest = role.split(".")
    if part == "classifier":
        return {"W": "head.weight", "b": "head.bias"}[rest[0]]
    path = ["backbone", "general"]
    if part == "specialised":
        path = ["backbone", "blocks", rest.pop(0), last]
    names = ("stem", "proj")
    if last == "stage2":  # the two-block network: its parts have one layer each and no numbers
        if part == "general":
            path.append("stage1")
        path += ["conv", "bias"] if rest == ["conv_bias"] else [STATISTICS.get(name, name) for name in rest]
        return ".".join(path + ["weight"] * (rest == ["conv"]))
    for name in rest:
        if name.startswith("block"):
            path.append(name.removeprefix("block"))
        elif path[-1] in names:
            path.append({"conv": "0", "bn": "1"}[name])
        else:
            path.append(STATISTICS.get(name, name))
    if rest[-1].startswith("conv"):
        path.append("weight")
    return ".".join(path)


def sequence(sizes, shape=(3, 32, 32)) -> TaskSequence:
    tasks, start = [], 0
    for t, size in enumerate(sizes):
        labels = torch.arange(start, start + size)
        ids = [f"{t}/{i}" for i in range(size)]
        examples = LabelledExamples(torch.zeros(size, *shape), labels, ids)
        tasks.append(Task(f"t{t}", examples, examples, "classification", "accuracy", tuple(labels.tolist())))
        start += size
    return TaskSequence(tasks, scenario="class")


class Reference:
    """Our trainer and strategy, brought to a point of the published run."""

    def __init__(self, model: Classifier, sizes, stage: int, last: str, train_base: bool = True) -> None:
        self.last, self.tasks = last, sequence(sizes, model.input_shape)
        decay = 5e-4 if stage == 0 else 2e-4
        train = {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": decay, "clip": 0.0}
        strategy = {"name": "memo", "train_base": train_base, "replay": {"size": 0}}
        config = resolve.validate({"tasks": "facts", "train": train, "strategy": strategy})
        self.trainer = SequentialTrainer(model, make_strategy(config.strategy), config)
        self.trainer.prepare(self.tasks)
        self.trainer.position.stage = stage
        self.strategy, self.net = self.trainer.strategy, model.module
        seen = list(range(sum(sizes[: stage + 1])))
        restructure(self.net, {"cut": self.net.backbone.cut, "blocks": stage + 1, "classes": seen})
        self.net.double()
        aux = nn.Linear(self.net.backbone.width, sizes[stage] + 1).double()
        self.aux, self.strategy.aux = aux, aux if stage else None
        self.strategy._settle()

    def load(self, values: dict[str, np.ndarray]) -> None:
        own = self.net.state_dict()
        for role, value in values.items():
            value = torch.from_numpy(value).double()
            if role.startswith("aux."):
                (self.aux.weight if role == "aux.W" else self.aux.bias).data.copy_(value)
            else:
                own[ours(role, self.last)].copy_(value)

    def value(self, role: str) -> np.ndarray:
        if role.startswith("aux."):
            return (self.aux.weight if role == "aux.W" else self.aux.bias).detach().numpy()
        return self.net.state_dict()[ours(role, self.last)].numpy()

    def outputs(self, x: torch.Tensor, train: bool = False) -> dict[str, np.ndarray]:
        """Features, logits of the classes seen, auxiliary logits; statistics of batch norm are left alone."""
        kept = {k: v.clone() for k, v in self.net.state_dict().items()}
        self.net.train(train)
        with torch.no_grad():
            features = self.net.features(x)
            found = {
                "features": features,
                "logits": self.net.head(features)[:, : len(self.net.head.classes)],
                "aux_logits": self.aux(features[:, -self.net.backbone.width :]),
            }
        self.net.load_state_dict(kept)
        return {name: value.numpy() for name, value in found.items()}

    def step(self, x: torch.Tensor, y: np.ndarray, times: int = 1) -> dict[str, float]:
        stage = self.trainer.position.stage
        self.trainer._start_optimizer(times)
        self.net.train()
        source = self.trainer.run.encodings.train(stage)
        batch = Batch({"x": x}, torch.from_numpy(y), len(x), torch.zeros(len(x), dtype=torch.long), source)
        for _ in range(times):
            terms = self.trainer._step(batch, self.tasks[stage])
        return {name: float(value) for name, value in terms.items()}

    def check_sums(self, stored: dict[str, np.ndarray], tolerance: float) -> None:
        for role, total, norm in zip(stored["roles"].tolist(), stored["sum"], stored["l2"], strict=True):
            value = self.value(role)
            assert value.sum() == pytest.approx(total, abs=tolerance, rel=tolerance), role
            assert np.linalg.norm(value) == pytest.approx(norm, abs=tolerance, rel=tolerance), role


def cifar(depth: int, classes: int) -> Classifier:
    config, generator = ModelConfig(name=f"cifar-resnet-{depth}"), torch.Generator().manual_seed(0)
    return load_model(config, num_classes=classes, input_shape=(3, 32, 32), generator=generator)  # type: ignore[return-value]


def part(stored: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(f"{prefix}/"): value for key, value in stored.items() if key.startswith(f"{prefix}/")}


def state_at(tiny: dict[str, np.ndarray], stage: int) -> dict[str, np.ndarray]:
    """The full state at ``t{stage}/before``: the newest stored value of every role, the new block a copy of the last."""
    found: dict[str, np.ndarray] = {}
    for t in range(stage + 1):
        if t:
            last = {k: v for k, v in found.items() if k.startswith(f"specialised.{t - 1}.")}
            found |= {k.replace(f"specialised.{t - 1}.", f"specialised.{t}."): v for k, v in last.items()}
        found |= part(tiny, f"t{t}/before")
        if t < stage:
            found |= part(tiny, f"t{t}/after") | {k: v for k, v in part(tiny, f"t{t}/aligned").items() if k != "gamma"}
    return found


def at(tiny, stage: int, train_base: bool = True) -> tuple[Reference, torch.Tensor, np.ndarray]:
    reference = Reference(cifar(8, sum(SIZES)), SIZES, stage, "stage3", train_base)
    reference.load(state_at(tiny, stage))
    return reference, torch.from_numpy(tiny["x"]).double(), tiny[f"t{stage}/y"]


@pytest.mark.parametrize("stage", [0, 1, 2])
class TestThreeTasks:
    def test_features_and_logits_in_both_modes(self, tiny, stage):
        reference, x, _ = at(tiny, stage)
        for mode, train in (("eval_before", False), ("train", True)):
            found = reference.outputs(x, train)
            for name, value in part(tiny, f"t{stage}/f64/{mode}").items():
                np.testing.assert_allclose(found[name], value, atol=1e-9, err_msg=f"{mode} {name}")
            for name, value in part(tiny, f"t{stage}/{mode}").items():
                if not name.startswith("loss"):
                    np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=f"{mode} {name}")

    def test_one_step(self, tiny, stage):
        reference, x, y = at(tiny, stage)
        old = {k: v.clone() for k, v in reference.net.state_dict().items() if k.startswith("backbone.blocks.")}
        losses = reference.step(x, y)
        assert losses["cross_entropy"] == pytest.approx(float(tiny[f"t{stage}/train/loss_ce"]), abs=1e-6)
        assert ("auxiliary" in losses) == (stage > 0)
        if stage:
            assert losses["auxiliary"] == pytest.approx(float(tiny[f"t{stage}/train/loss_aux"]), abs=1e-6)
        for role, value in part(tiny, f"t{stage}/after").items():
            np.testing.assert_allclose(reference.value(role), value, atol=5e-7, err_msg=role)
        exact = part(tiny, f"t{stage}/f64/after")
        for role in ("classifier.W", "classifier.b", "aux.W", "aux.b"):
            np.testing.assert_allclose(reference.value(role), exact[role], atol=1e-9, err_msg=role)
        reference.check_sums(exact, 1e-9)
        for name, value in part(tiny, f"t{stage}/f64/eval_after").items():
            if name != "logits" or stage == 0:
                np.testing.assert_allclose(reference.outputs(x)[name], value, atol=1e-9, err_msg=name)
        for name, value in old.items():
            if not name.startswith(f"backbone.blocks.{stage}."):
                assert torch.equal(reference.net.state_dict()[name], value), name

    def test_two_steps_carry_momentum(self, tiny, stage):
        reference, x, y = at(tiny, stage)
        reference.step(x, y, times=2)
        stored = part(tiny, f"t{stage}/after2")
        for role in ("classifier.W", "classifier.b", "aux.W", "aux.b"):
            np.testing.assert_allclose(reference.value(role), stored[role], atol=1e-5, err_msg=role)
        reference.check_sums(stored, 2e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_alignment_after_the_task(tiny, stage):
    reference, x, y = at(tiny, stage)
    reference.step(x, y)
    bias, rows = reference.net.head.bias.clone(), reference.net.head.weight.clone()
    gamma = align_new_rows(reference.net.head, SIZES[stage])
    assert gamma == pytest.approx(float(tiny[f"t{stage}/aligned/gamma"]), abs=1e-6)
    exact = tiny[f"t{stage}/f64/aligned/classifier.W"]
    np.testing.assert_allclose(reference.value("classifier.W"), exact, atol=1e-9)
    logits = reference.outputs(x)["logits"]
    np.testing.assert_allclose(logits, tiny[f"t{stage}/eval_aligned/logits"], atol=2e-6)
    old = sum(SIZES[:stage])
    assert torch.equal(reference.net.head.bias, bias) and torch.equal(reference.net.head.weight[:old], rows[:old])


def test_one_step_with_a_frozen_base(tiny):
    reference, x, y = at(tiny, 1, train_base=False)
    for name, value in part(tiny, "t1/frozen_train").items():
        np.testing.assert_allclose(reference.outputs(x, train=True)[name], value, atol=1e-6, err_msg=name)
    before = {k: v.clone() for k, v in reference.net.state_dict().items()}
    reference.step(x, y)
    changed = part(tiny, "t1/frozen_after")
    for role, value in changed.items():
        np.testing.assert_allclose(reference.value(role), value, atol=5e-7, err_msg=role)
    moved = {k for k, v in reference.net.state_dict().items() if not torch.equal(v, before[k])}
    named = {ours(role, "stage3") for role in changed if not role.startswith("aux.")}
    assert {k for k in moved if not k.endswith("num_batches_tracked")} == named


@pytest.mark.parametrize("stage", [1, 2])
def test_growth_copies_the_last_block_and_the_old_part_of_the_head(tiny, stage):
    reference, _, _ = at(tiny, stage - 1)
    aligned = f"t{stage - 1}/{'aligned' if stage > 1 else 'after'}/classifier.W"
    reference.load({"classifier.W": tiny[aligned], "classifier.b": tiny[f"t{stage - 1}/after/classifier.b"]})
    reference.trainer.position.stage = stage
    reference.strategy.begin_task(reference.tasks[stage])
    backbone, head, aux = reference.net.backbone, reference.net.head, reference.strategy.aux
    for ours_, theirs in zip(
        backbone.blocks[-1].state_dict().values(), backbone.blocks[-2].state_dict().values(), strict=True
    ):
        assert torch.equal(ours_, theirs)
    expected = tiny[f"t{stage}/before/classifier.W"]
    old, columns = sum(SIZES[:stage]), 64 * stage
    assert head.weight.shape == expected.shape and aux.weight.shape == tiny[f"t{stage}/before/aux.W"].shape
    np.testing.assert_array_equal(head.weight.detach()[:old, :columns], expected[:old, :columns])
    np.testing.assert_array_equal(head.bias.detach(), tiny[f"t{stage}/before/classifier.b"])
    fresh = torch.cat([head.weight[old:].flatten(), head.weight[:old, columns:].flatten()])
    bound = (3 / expected.shape[1]) ** 0.5
    assert 0.9 * bound < float(fresh.detach().abs().max()) <= bound and (aux.bias == 0).all()


class ConvNet2(Backbone):
    """A backbone of someone else: biased convolutions, batch norm, pooling."""

    out_features = 64
    default_cut = "stage2"
    norm_follows_conv = True

    def __init__(self) -> None:
        super().__init__()
        for i, channels in ((1, 3), (2, 64)):
            block = [nn.Conv2d(channels, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
            names = dict(zip(("conv", "bn", "relu", "halve"), block, strict=True))
            self.add_module(f"stage{i}", Chain(names))
        self.pool = MeanOverPixels()

    def parts(self):
        return dict(self.named_children())


def convnet(classes: int) -> Classifier:
    net = ClassifierNet(ConvNet2(), classes, torch.Generator().manual_seed(0))
    return Classifier(ModelConfig(name="convnet2"), net, input_shape=(3, 32, 32))


def drawn(roles: list[str], shapes: list[str], rs: np.random.RandomState) -> dict[str, np.ndarray]:
    found = {}
    for role, text in zip(roles, shapes, strict=True):
        shape = tuple(int(n) for n in text.replace("x", " ").replace(",", " ").strip("() ").split())
        z = rs.standard_normal(shape)
        kind = ".".join(role.split(".")[-2:])
        if z.ndim == 4:
            z = z * np.sqrt(1 / (shape[2] * shape[3] * shape[0]))
        elif z.ndim == 2:
            z = z / np.sqrt(shape[1])
        elif kind.startswith("bn") and kind.endswith(".weight"):
            z = 1 + 0.1 * z
        elif kind.startswith("bn") and kind.endswith(".var"):
            z = np.exp(0.2 * z)
        else:
            z = 0.1 * z
        found[role] = z.astype(np.float32)
    return found


@pytest.mark.parametrize("name", ["convnet2", "resnet14", "resnet20", "resnet26", "resnet32", "resnet18"])
def test_other_depths(depths, name):
    stored = part(depths, name)
    shape, classes, blocks = tuple(stored["x_shape"]), int(stored["n_classes"]), int(stored["n_specialised"])
    new = int(stored["n_aux"]) - 1
    sizes = [1] * (blocks - 1) + [new] if blocks > 1 else [classes]
    sizes[0] += classes - sum(sizes)
    last = {"convnet2": "stage2", "resnet18": "stage4"}.get(name, "stage3")
    if name == "convnet2":
        model = convnet(classes)
    elif name == "resnet18":
        model = load_model(
            ModelConfig(name="resnet-18"),
            num_classes=classes,
            input_shape=shape[1:],
            generator=torch.Generator().manual_seed(0),
        )
    else:
        model = cifar(int(name.removeprefix("resnet")), classes)
    reference = Reference(model, sizes, blocks - 1, last)
    if reference.aux.out_features != int(stored["n_aux"]):
        reference.aux = nn.Linear(64, int(stored["n_aux"])).double()
    count = [
        sum(p.numel() for p in module.parameters())
        for module in (reference.net.backbone.general, reference.net.backbone.blocks[0])
    ]
    assert count == [int(stored["params_general"]), int(stored["params_specialised"])]
    rs = np.random.RandomState(int(stored["seed"]))
    reference.load(drawn(stored["roles"].tolist(), stored["shapes"].tolist(), rs))
    x = torch.from_numpy(rs.standard_normal(shape).astype(np.float32)).double()
    y = rs.randint(0, classes, shape[0])
    assert float(x.sum()) == pytest.approx(float(stored["x_sum"]), abs=1e-4) and y.tolist() == stored["y"].tolist()
    found = reference.outputs(x)
    for key, value in part(stored, "eval").items():
        np.testing.assert_allclose(found[key], value, atol=1e-9, err_msg=key)
    if name == "resnet18":
        return
    found = reference.outputs(x, train=True)
    for key, value in part(stored, "train").items():
        np.testing.assert_allclose(found[key], value, atol=1e-9, err_msg=key)
    reference.step(x, y)
    after = part(stored, "after")
    for role in ("classifier.W", "classifier.b", "aux.W", "aux.b"):
        np.testing.assert_allclose(reference.value(role), after[role], atol=1e-9, err_msg=role)
    reference.check_sums({**after, "roles": stored["roles"]}, 1e-9)
    if blocks > 1:
        align_new_rows(reference.net.head, new)
        np.testing.assert_allclose(reference.value("classifier.W"), after["classifier.W_aligned"], atol=1e-9)


def test_auxiliary_targets(tables):
    for name in ("aux0", "aux1"):
        targets = auxiliary_targets(torch.from_numpy(tables[f"{name}/y"]), int(tables[f"{name}/known"]))
        assert targets.tolist() == tables[f"{name}/target"].tolist()


@pytest.mark.parametrize(
    ("name", "schedule", "peaks", "milestones", "decay"),
    [
        ("steplr", "milestones", (0.1, 0.1), ((60, 120, 170), (80, 120, 150)), 0.1),
        ("short_step", "milestones", (0.05, 0.02), ((3, 6), (2, 4)), (0.2, 0.3)),
        ("cosine", "cosine", (0.1, 0.1), ((), ()), 1.0),
    ],
)
def test_the_learning_rate_at_the_start_of_every_epoch(tables, name, schedule, peaks, milestones, decay):
    decays = decay if isinstance(decay, tuple) else (decay, decay)
    for i, task in enumerate(("task0", "task1plus")):
        rates = tables[f"lr/{name}/{task}"]
        epochs, per_epoch = len(rates), 7
        parts = [m / epochs for m in milestones[i]]
        ours_ = [
            peaks[i] * lr_factor(epoch * per_epoch, epochs * per_epoch, schedule, 0.0, parts, decays[i])
            for epoch in range(epochs)
        ]
        np.testing.assert_allclose(ours_, rates, atol=1e-12)
        if schedule == "milestones":  # and constant within an epoch
            last = [
                peaks[i]
                * lr_factor(epoch * per_epoch + per_epoch - 1, epochs * per_epoch, schedule, 0.0, parts, decays[i])
                for epoch in range(epochs)
            ]
            np.testing.assert_allclose(last, rates, atol=1e-12)
