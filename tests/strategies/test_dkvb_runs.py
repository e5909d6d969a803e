"""The bottleneck in the trainer: cached pairs, resumes, the usage mask, growth, the paper's toy, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stepping import trainer_for
from torch import nn

from clkit import api, build, resolve
from clkit.config import ModelConfig
from clkit.errors import CapabilityError, ConfigError, DataError, NumericalError
from clkit.models import load_classifier, load_model
from clkit.rundir import RunDirectory
from clkit.strategies.dkvb.config import DKVBConfig
from clkit.strategies.dkvb.strategy import DKVB
from clkit.tasks.base import LabelledExamples, Task, TaskSequence
from clkit.trainer import SequentialTrainer
from clkit.unlearning.manifest import keyed
from clkit.unlearning.tombstones import Tombstones

SMALL = {"name": "dkvb", "heads": 4, "pairs": 32, "key_dim": 4, "key_passes": 2}
SGD = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 2.0, "batch_size": 16, "epochs": 2}


def content(where, strategy=None, **sections):
    return {
        "output_dir": str(where),
        "model": {"name": "identity"},
        "tasks": {"source": "digits", "train_limit": 30, "eval_limit": 10},
        "strategy": {**SMALL, **(strategy or {})},
        "train": SGD,
        "checkpoint": {"every_steps": 2},
        "tracking": {"log_every": 1},
        **sections,
    }


def run(*args, **kwargs):
    return api.run(resolve.validate(content(*args, **kwargs)))


def tensors(run_dir):
    from safetensors.torch import load_file

    return load_file(sorted((run_dir / "checkpoints").glob("[0-9]*"))[-1] / "state.safetensors")


VARIANTS = [
    {"decoder": "votes", "vote_scale": "log"},
    {"decoder": "linear", "train_decoder": True},
    {"compat": True},
    {"key_start": "kmeans", "top_k": 2},
    {"split": "chunk", "heads": 16},
    {"key_data": "tasks", "key_tasks": {"source": "digits", "train_limit": 20}},
]


class Cut(Exception):
    """Stands for a process that ends here."""


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_run_that_is_cut_ends_bit_identically(variant, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", variant)
    plain = SequentialTrainer._step
    for steps in (1, 4, 11):
        count = iter(range(steps))

        def step(self, batch, task, count=count):
            if next(count, None) is None:
                raise Cut
            return plain(self, batch, task)

        with monkeypatch.context() as patch:
            patch.setattr(SequentialTrainer, "_step", step)
            with pytest.raises(Cut):
                run(tmp_path / "cut", variant)
    resumed = run(tmp_path / "cut", variant)
    np.testing.assert_array_equal(resumed.matrix, whole.matrix)
    ours, theirs = tensors(tmp_path / "cut"), tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for key in ours:  # what was not measured is NaN in both
        assert torch.allclose(ours[key], theirs[key], rtol=0, atol=0, equal_nan=True), key


def test_keys_stay_where_they_are_across_tasks_saves_and_exports(tmp_path, monkeypatch):
    placed = []
    plain = DKVB.end_task
    monkeypatch.setattr(DKVB, "end_task", lambda self, task: (placed.append(self.head.keys.clone()), plain(self, task)))
    result = run(tmp_path)
    assert len(placed) == 5 and all(torch.equal(placed[0], k) for k in placed)
    head = load_classifier(result.run_dir / "export").module.head
    assert head.placed and torch.equal(head.keys, placed[0])
    assert head.usage.sum() > 0
    with api.open_run(result.run_dir) as trainer:
        assert torch.equal(trainer.strategy.head.keys, placed[0])


def test_the_same_pairs_are_read_whether_they_are_cached_or_not(tmp_path):
    """With the cached pairs taken away, every batch is searched for anew: the same run."""
    kept = run(tmp_path / "kept")
    searched = []

    class Plain(DKVB):
        def train_loader(self, task):
            for batch in super().train_loader(task):
                again = self._net.lookup(False, features=self._features(batch))
                assert torch.equal(again, batch.inputs["pairs"])
                searched.append(len(again))
                batch.inputs = {"pairs": again}
                yield batch

        def _features(self, batch):
            return torch.stack([self.by_id[i] for i in batch.ids])

    config = resolve.validate(content(tmp_path / "plain"))
    tasks = build.make_tasks(config)
    strategy = Plain(config.strategy.config)
    strategy.by_id = {i: x for t in tasks for i, x in zip(t.train.ids, t.train.inputs, strict=True)}
    model = build.make_model(config.model, tasks, config.seed, lambda text: None)
    result = SequentialTrainer(model, strategy, config).fit(tasks)
    assert sum(searched) == 2 * 300
    np.testing.assert_array_equal(result.matrix, kept.matrix)


@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_of_the_model_does_not_reach_the_search(tmp_path, masked):
    model = {"name": "identity", "dtype": "bfloat16"}
    assert run(tmp_path, {"decoder": "votes"}, model=model).metrics["average_accuracy"] > 0.3
    with api.open_run(tmp_path) as trainer:
        head, features = trainer.strategy.head, trainer.tasks[0].eval.inputs
        plain = head.lookup(features, masked)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(head.lookup(features, masked), plain)


def test_pairs_are_found_in_the_cache_by_the_next_run(tmp_path, monkeypatch):
    first = run(tmp_path / "a")
    monkeypatch.setattr("clkit.strategies.dkvb.bottleneck.Bottleneck.lookup", None)  # nothing may be searched for
    again = run(tmp_path / "b", {"unused": "allow"}, eval={"initial": False})
    assert again.matrix.shape == first.matrix.shape


def test_evaluation_looks_only_among_pairs_that_training_has_read(tmp_path):
    result = run(tmp_path)
    with api.open_run(result.run_dir) as trainer:
        net, head = trainer.model.module.eval(), trainer.strategy.head
        batch = trainer.run.encodings.eval(trainer.tasks[0]).batch(torch.arange(10))
        head.usage[:, ::2] = 0  # as if half the pairs had never been read
        cached = net(**batch.inputs)
        searched = net(features=batch.inputs["features"])
        everywhere = net(**batch.inputs, masked=False)
        chosen = net.lookup(True, features=batch.inputs["features"])
        assert torch.equal(cached, searched) and not torch.equal(cached, everywhere)
        assert (chosen % 2 == 1).all()
        assert torch.equal(net.train()(**batch.inputs), everywhere)


def test_the_published_way_masks_and_does_not_count_in_the_first_epoch_of_later_tasks(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(DKVB, "after_step", lambda self: counted.append(int(self.head.usage.sum())))
    run(tmp_path / "compat", {"compat": True})
    # 60 examples read 240 pairs in an epoch of 4 steps; each of the 5 tasks has two epochs.
    epochs = np.diff([0, *counted[3::4]])
    assert epochs.tolist() == [240, 240, 0, 240, 0, 240, 0, 240, 0, 240]
    counted.clear()
    run(tmp_path / "default")
    assert np.diff([0, *counted[3::4]]).tolist() == [240] * 10


def test_votes_take_one_pass_and_do_not_care_for_the_order_of_tasks(tmp_path):
    votes = {"decoder": "votes", "key_data": "all", "key_limit": 10_000}
    original = build.make_tasks(resolve.validate(content(tmp_path)))
    tables = []
    for name, order in (("a", [0, 1, 2, 3, 4]), ("b", [3, 0, 4, 2, 1])):
        config = resolve.validate(content(tmp_path / name, votes))
        tasks = TaskSequence([original[i] for i in order], scenario="class")
        strategy = DKVB(config.strategy.config)
        keys = torch.randn(4, 32, 4, generator=torch.Generator().manual_seed(0))
        strategy.begin_task = lambda task, s=strategy, k=keys: s.head.place(k)  # the draws depend on the order
        model = build.make_model(config.model, original, 0, lambda text: None)
        trainer = SequentialTrainer(model, strategy, config)
        trainer.fit(tasks)
        assert trainer.position.total_steps == 20, "a second epoch has nothing to count"
        tables.append(strategy.head.values)
    assert torch.equal(tables[0], tables[1])
    assert tables[0].sum() == 300 * 4


def test_votes_count_every_example_once_beside_exemplars(tmp_path):
    config = resolve.validate(content(tmp_path, {"decoder": "votes", "replay": {"size": 40, "policy": "herding"}}))
    tasks = build.make_tasks(config)
    model = build.make_model(config.model, tasks, 0, lambda text: None)
    trainer = SequentialTrainer(model, DKVB(config.strategy.config), config)
    trainer.fit(tasks)
    assert trainer.strategy.head.values.sum() == 300 * 4


def test_forgotten_records_place_no_keys(tmp_path, monkeypatch):
    keys = {"key_data": "tasks", "key_tasks": {"source": "digits", "train_limit": 20}}
    trainer, tasks = trainer_for(content(tmp_path), **{**SMALL, **keys})
    gone = tasks[2].train.ids[3]
    forgotten = Tombstones(b"key", [(1, keyed(b"key", "id", gone), "")])
    trainer.prepare(tasks)
    before = [i for part in trainer.strategy._key_sets() for i in part.ids]
    monkeypatch.setattr("clkit.strategies.dkvb.strategy.in_force", lambda run_dir: forgotten)
    after = [i for part in trainer.strategy._key_sets() for i in part.ids]
    assert set(before) - set(after) == {gone}


def test_a_label_space_that_has_grown_is_saved_and_comes_back(tmp_path):
    config = resolve.validate(content(tmp_path, tasks={"source": "digits", "class_order": [], "train_limit": 12}))

    class Growing(DKVB):
        def begin_task(self, task):
            super().begin_task(task)
            if self.run.position.stage == 2:
                self.adapt(13)

    tasks = build.make_tasks(config)
    model = build.make_model(config.model, tasks, 0, lambda text: None)
    strategy = Growing(config.strategy.config)
    trainer = SequentialTrainer(model, strategy, config, directory=RunDirectory(tmp_path))
    trainer.fit(tasks)
    assert strategy.head.values.shape[2] == 13
    again = SequentialTrainer(
        build.make_model(config.model, tasks, 0, lambda text: None),
        DKVB(config.strategy.config),
        config,
        directory=RunDirectory(tmp_path),
    )
    assert again.prepare(tasks, read_only=True)
    assert torch.equal(again.strategy.head.values, strategy.head.values)
    assert load_classifier(tmp_path / "export").num_classes == 13
    with pytest.raises(ConfigError, match="expected at least the 13 classes"):
        strategy.adapt(12)


# --- the paper's toy ----------------------------------------------------------------------------------------------------
CENTRES = [
    *((0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75)),
    *((0.75, 0.5), (0.5, 0.75), (0.25, 0.5), (0.5, 0.25)),
]


def toy():
    """Four tasks of two Gaussians in the plane, classes t and t + 4."""
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for t in range(4):
        parts = []
        for count in (100, 250):
            y = torch.tensor([t, t + 4]).repeat(count // 2)
            x = torch.tensor(CENTRES)[y] + 0.035 * torch.randn(len(y), 2, generator=generator)
            parts.append(LabelledExamples(x, y, [f"{t}-{count}-{i}" for i in range(len(y))]))
        tasks.append(Task(f"task-{t}", *parts, "classification", "accuracy", (t, t + 4)))
    return TaskSequence(tasks, scenario="class")


def toy_accuracy(strategy, **train):
    tasks = toy()
    model = load_model(ModelConfig("identity"), num_classes=8, input_shape=(2,), generator=torch.Generator())
    sections = {"train": {"batch_size": 100, "clip": 0.0, **train}, "eval": {"initial": False}}
    return SequentialTrainer(model, strategy, sections).fit(tasks).metrics["average_accuracy"]


@pytest.mark.parametrize("decoder", ["voting", "votes"])
def test_the_toy_of_the_paper_is_kept_where_a_linear_probe_forgets_it(decoder):
    config = DKVBConfig(heads=20, pairs=20, key_dim=2, key_data="all", decoder=decoder, label_smoothing=0.0)
    kept = toy_accuracy(DKVB(config), steps=60, optimizer="sgd", momentum=0.0, learning_rate=20.0)
    probe = toy_accuracy("naive", steps=200, optimizer="adam", learning_rate=0.05)
    assert kept > 0.95
    assert probe < 0.35


# --- what is refused ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"split": "chunk"}, r"4 heads of 4 make 16 \(expected 64, the features of 'identity'\)"),
        ({"top_k": 33}, r"strategy.top_k: out of range \(got 33, expected at most the 32 pairs"),
        ({"tokens": True, "replay": {"size": 5}}, "strategy.replay.size: does not go together with tokens"),
        ({"compat": True, "key_start": "kmeans"}, "compat starts from normal draws"),
        ({"key_data": "tasks"}, "needs a source in key_tasks"),
        ({"key_tasks": {"source": "digits"}}, "must be 'tasks' to use key_tasks"),
        ({"key_data": "tasks", "key_tasks": {"source": "digitz"}}, "Did you mean 'digits'"),
    ],
)
def test_options_that_do_not_fit_are_refused(strategy, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, strategy)


def test_a_backbone_without_tokens_is_refused(tmp_path):
    with pytest.raises(CapabilityError, match="gives one vector per example and no tokens"):
        run(tmp_path, {"tokens": True})


def test_key_data_of_another_shape_is_refused_before_training(tmp_path):
    other = {"source": "digits", "flat": False}
    with pytest.raises(DataError, match="was built for inputs of shape"):
        run(tmp_path, {"key_data": "tasks", "key_tasks": other})


@pytest.mark.parametrize(
    ("name", "options"),
    [("dkvb", {**SMALL, "key_dim": 2}), ("memo", {"counting": "strict", "budget": 1.0, "train_base": False})],
)
def test_a_first_task_without_examples_spoils_nothing(name, options):
    tasks = []
    for t in range(3):
        y = torch.arange(0 if t == 0 else 8) % 2 + 2 * t
        train = LabelledExamples(nn.functional.one_hot(y, 6).float(), y, [f"{t}/{i}" for i in range(len(y))])
        y = torch.arange(4) % 2 + 2 * t
        shown = LabelledExamples(nn.functional.one_hot(y, 6).float(), y, [f"{t}/eval/{i}" for i in range(4)])
        tasks.append(Task(f"t{t}", train, shown, "classification", "accuracy", (2 * t, 2 * t + 1)))
    given = {"model": {"name": "mlp", "hidden": [8]}, "tasks": "facts", "strategy": {"name": name, **options}}
    config, sequence = resolve.validate({**given, "train": SGD}), TaskSequence(tasks, scenario="class")
    trainer = SequentialTrainer(
        build.make_model(config.model, sequence, 0, print), build.make_strategy(config.strategy), config
    )
    trainer.fit(sequence)
    assert all(tensor.isfinite().all() for tensor in trainer.model.module.state_dict().values())


@pytest.mark.parametrize(
    ("key_data", "where"), [("first", "task 't1'"), ("all", "the data that place the keys")], ids=["values", "keys"]
)
def test_features_that_are_not_finite_are_named_before_they_are_learned(key_data, where):
    tasks = []
    for t in range(2):
        x = torch.arange(32.0).view(8, 4) + t
        examples = LabelledExamples(x, torch.arange(8) % 2 + 2 * t, [f"{t}/{i}" for i in range(8)])
        tasks.append(Task(f"t{t}", examples, examples, "classification", "accuracy", (2 * t, 2 * t + 1)))
    tasks[1].train.inputs[5, 0] = torch.inf
    sequence = TaskSequence(tasks, scenario="class")
    model = load_model(ModelConfig("identity"), num_classes=4, input_shape=(4,), generator=torch.Generator())
    trainer = SequentialTrainer(model, DKVB(DKVBConfig(heads=2, pairs=4, key_dim=2, key_data=key_data)), {"train": SGD})
    with pytest.raises(NumericalError, match=f"not finite in {where}. Records: 1/5;"):
        trainer.fit(sequence)
    assert trainer.strategy.head.keys.isfinite().all()


def test_a_module_without_a_backbone_is_refused():
    with pytest.raises(CapabilityError, match=r"needs a backbone with a head.*is a Linear"):
        SequentialTrainer(nn.Linear(2, 8), "dkvb").fit(toy())


def test_what_would_move_values_that_are_not_read_is_said(tmp_path):
    with pytest.warns(RuntimeWarning, match=r"train.optimizer=adamw: changes values that the batch does not read"):
        run(tmp_path, train={"batch_size": 16}, eval={"initial": False})
