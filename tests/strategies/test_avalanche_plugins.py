"""Avalanche's plug-ins do in clkit's trainer what they do in Avalanche's, and resume exactly."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch
from stepping import after_tasks, learn, trainer_for
from test_contract import Cut, cut_after, weights

from clkit import api, resolve
from clkit.errors import CapabilityError, ConfigError, DataError
from clkit.loader import epoch_order
from clkit.rng import derive_seed, fresh_generator
from clkit.strategies.avalanche.plugins import project
from clkit.strategies.avalanche.strategy import Avalanche
from clkit.tasks.augment import augmented
from clkit.tasks.avalanche import importing, to_benchmark
from clkit.tasks.base import TaskSequence

pytest.importorskip("avalanche")

OPTIONS = {
    "ewc": {"ewc_lambda": 50.0},
    "si": {"si_lambda": 100.0},
    "mas": {"lambda_reg": 5.0},
    "rwalk": {"ewc_lambda": 5.0, "delta_t": 2},
    "lwf": {"alpha": 3.0},
    "gem": {"patterns_per_experience": 8, "memory_strength": 0.5},
    "agem": {"patterns_per_experience": 8, "sample_size": 8},
    "replay": {"mem_size": 12},
    "gdumb": {"mem_size": 12},
}
TEXT = ["ewc", "si", "rwalk", "gem", "agem", "replay"]


def content(plugin, **options):
    return {"name": "avalanche", "plugin": plugin, "options": {**OPTIONS[plugin], **options}}


def digits(tmp_path, epochs=2, **train):
    return {
        "output_dir": str(tmp_path / "run"),
        "model": {"name": "mlp", "hidden": [32]},
        "tasks": {"source": "digits", "train_limit": 40},
        "train": {"epochs": epochs, "batch_size": 16, "optimizer": "sgd", "learning_rate": 0.05, "clip": 0.0, **train},
        "eval": {"initial": False},
        "checkpoint": {"every_steps": 2},
    }


# --- resume -------------------------------------------------------------------------------------------------------
def cut_and_whole(world, plugin, tmp_path, monkeypatch):
    given = {**world, "strategy": content(plugin)}
    whole = api.run(resolve.validate({**given, "output_dir": str(tmp_path / "whole")}))
    config = resolve.validate({**given, "output_dir": str(tmp_path / "cut")})
    for steps in (2, 5):
        with monkeypatch.context() as patch:
            cut_after(patch, steps)
            with pytest.raises(Cut):
                api.run(config)
    resumed = api.run(config)
    np.testing.assert_array_equal(resumed.matrix, whole.matrix)
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize("plugin", OPTIONS)
def test_every_plug_in_resumes_bit_identically_on_images(plugin, vision_content, tmp_path, monkeypatch):
    vision_content["train"]["epochs"] = 2
    vision_content["tasks"]["num_tasks"] = 3
    cut_and_whole(vision_content, plugin, tmp_path, monkeypatch)


def test_a_teacher_that_was_read_from_a_checkpoint_rounds_a_batch_of_one_alike(vision_content, tmp_path, monkeypatch):
    vision_content["train"] |= {"epochs": 2, "batch_size": 5}
    vision_content["tasks"] |= {"num_tasks": 4, "train_limit": 7, "order_seed": 3}  # 21 examples in the second task
    given = {**vision_content, "strategy": content("lwf")}
    api.run(resolve.validate({**given, "output_dir": str(tmp_path / "whole")}))
    config = resolve.validate({**given, "output_dir": str(tmp_path / "cut")})
    with monkeypatch.context() as patch:
        cut_after(patch, 12)
        with pytest.raises(Cut):
            api.run(config)
    load, places = Avalanche.load_state_dict, []

    def watched(self, state):
        teacher = state["plugin"]["lwf"]["attributes"]["prev_model"]["tensors"]
        places.extend(tensor.data_ptr() % 64 for tensor in teacher.values())
        load(self, state)

    monkeypatch.setattr(Avalanche, "load_state_dict", watched)
    api.run(config)
    assert places and not any(places)  # where a tensor begins decides how its sums are rounded
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("plugin", [p for p in TEXT if p != "replay"])  # replay is in the contract
def test_generic_plug_ins_resume_bit_identically_on_adapters(plugin, text_content, tmp_path, monkeypatch):
    cut_and_whole(text_content, plugin, tmp_path, monkeypatch)


# --- equal to Avalanche's own loop --------------------------------------------------------------------------------
def avalanche_matrix(trainer, tasks, plugins=()):
    """Accuracy on every task after every experience, learned by Avalanche's own loop in clkit's data order."""
    with importing():
        from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
        from avalanche.training.supervised import Naive

    train, seed = trainer.config.train, trainer.config.seed
    model = copy.deepcopy(trainer.model.module)

    class Ordered:
        """The epochs of the trainer, as batches (x, y, task label)."""

        def __init__(self, stage):
            self.stage, self.epoch = stage, -1

        def __iter__(self):
            self.epoch += 1
            examples = tasks[self.stage].train
            order = epoch_order(len(examples), train.batch_size, fresh_generator(seed, "order", self.stage, self.epoch))
            for rows in order:
                yield [examples.inputs[rows], examples.labels[rows], torch.zeros(len(rows), dtype=torch.long)]

    class Seeds(SupervisedPlugin):
        """The random numbers of clkit's trainer where the plug-in draws."""

        def before_training_epoch(self, strategy, **kwargs):
            stage, epoch = strategy.clock.train_exp_counter, strategy.clock.train_exp_epochs
            torch.manual_seed(derive_seed(seed, "avalanche loader", stage, epoch))

        def after_training_exp(self, strategy, **kwargs):
            purpose = ("avalanche", "after_training_exp", strategy.clock.train_exp_counter)
            torch.manual_seed(int(torch.randint(2**62, (), generator=fresh_generator(seed, *purpose))))

    class Loop(Naive):
        def make_train_dataloader(self, **kwargs):
            self.dataloader = Ordered(self.clock.train_exp_counter)

        def training_epoch(self, **kwargs):
            self.model.train()
            super().training_epoch(**kwargs)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No loggers specified")
        evaluator = EvaluationPlugin()
    loop = Loop(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=train.learning_rate, momentum=train.momentum),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=train.batch_size,
        train_epochs=train.epochs,
        plugins=[Seeds(), *plugins],
        evaluator=evaluator,
    )
    rows = []
    for experience in to_benchmark(tasks).train_stream:
        with warnings.catch_warnings(record=True):  # Avalanche calls its own deprecated functions
            loop.train(experience)
        model.eval()
        with torch.no_grad():
            rows.append([float((model(t.eval.inputs).argmax(1) == t.eval.labels).double().mean()) for t in tasks])
    return np.array(rows), model


@pytest.mark.parametrize("plugin", [None, "replay", "ewc"])
def test_scores_are_those_of_avalanches_own_loop(plugin, tmp_path):
    with importing():
        from avalanche.training.plugins import EWCPlugin, ReplayPlugin

    given = digits(tmp_path, reset_optimizer=False)
    if plugin is None:
        trainer, tasks = trainer_for(given, "naive")
    else:
        trainer, tasks = trainer_for(given, "avalanche", plugin=plugin, options=OPTIONS[plugin])
    native = {None: [], "replay": [ReplayPlugin(mem_size=12)], "ewc": [EWCPlugin(ewc_lambda=50.0)]}[plugin]
    theirs, model = avalanche_matrix(trainer, tasks, native)
    ours = trainer.fit(tasks).matrix
    for stage in range(len(tasks)):
        np.testing.assert_allclose(ours[stage, : stage + 1], theirs[stage, : stage + 1], rtol=0, atol=1e-9)
    for a, b in zip(trainer.model.module.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5 if plugin == "ewc" else 0)
    assert 0.1 < theirs[-1].mean() < 1


# --- what the plug-ins do -----------------------------------------------------------------------------------------
def test_they_protect_what_naive_forgets(tmp_path):
    naive = api.run(resolve.validate({**digits(tmp_path), "strategy": "naive"})).metrics["average_accuracy"]
    for plugin in ("gem", "replay", "gdumb"):
        strategy = content(plugin, **({"patterns_per_experience": 40} if plugin == "gem" else {"mem_size": 100}))
        given = {**digits(tmp_path, epochs=4), "strategy": strategy, "output_dir": str(tmp_path / plugin)}
        found = api.run(resolve.validate(given)).metrics["average_accuracy"]
        assert found > naive + 0.1, (plugin, found, naive)


@pytest.mark.parametrize(
    ("plugin", "option", "strong"), [("ewc", "ewc_lambda", 50.0), ("mas", "lambda_reg", 0.02), ("lwf", "alpha", 3.0)]
)
def test_a_penalty_of_weight_zero_is_naive_and_a_strong_one_holds_the_weights(plugin, option, strong, tmp_path):
    naive = api.run(resolve.validate({**digits(tmp_path), "strategy": "naive"}))
    gaps = []
    for strength in (0.0, strong):
        trainer, tasks = after_tasks(digits(tmp_path), "avalanche", 1, plugin=plugin, options={option: strength})
        before = torch.cat([p.detach().flatten() for p in trainer.strategy.parameters()])
        learn(trainer, tasks, 1)
        after = torch.cat([p.detach().flatten() for p in trainer.strategy.parameters()])
        gaps.append(float((after - before).norm()))
    assert gaps[1] < gaps[0]
    zero = {**digits(tmp_path), "strategy": {"name": "avalanche", "plugin": plugin, "options": {option: 0}}}
    run = api.run(resolve.validate({**zero, "output_dir": str(tmp_path / "zero")}))
    np.testing.assert_allclose(run.matrix, naive.matrix, rtol=0, atol=0, equal_nan=True)


def test_synaptic_intelligence_has_importances_on_the_cpu_where_avalanches_are_all_zero(tmp_path):
    trainer, _ = after_tasks(digits(tmp_path), "avalanche", 1, plugin="si", options={"si_lambda": 1.0})
    importances = torch.cat([v.data for v in trainer.strategy.plugin.ewc_data[1].values()])
    trajectory = torch.cat([v.data for v in trainer.strategy.plugin.syn_data["trajectory"].values()])
    assert importances.abs().max() > 1e-4
    assert float(trajectory.sum()) < 0, "the path integral of the gradient is the fall of the loss"


def test_the_projection_is_gems():
    draw = torch.Generator().manual_seed(1)
    references = torch.randn(4, 30, dtype=torch.float64, generator=draw)
    gradient = -references.sum(0) + torch.randn(30, dtype=torch.float64, generator=draw)
    found = project(gradient, references, 0.0)
    assert (references @ gradient < 0).any() and (references @ found > -0.01).all()
    orthogonal = torch.linalg.qr(torch.randn(30, 4, dtype=torch.float64, generator=draw)).Q.T
    expected = gradient - orthogonal.T @ (orthogonal @ gradient).clamp(max=0) / 1.001
    assert torch.allclose(project(gradient, orthogonal, 0.0), expected, atol=1e-9), "each conflict by itself"


def test_a_gem_takes_out_of_the_gradient_what_conflicts_with_its_memory(tmp_path):
    trainer, tasks = after_tasks(digits(tmp_path), "avalanche", 1, plugin="agem", options=OPTIONS["agem"])
    strategy, kept = trainer.strategy, []
    strategy.begin_task(tasks[1])
    trainer.engine.start(strategy.parameters(), trainer.config.train, 1)
    batch = next(iter(strategy.train_loader(tasks[1])))
    raw = torch.cat([g.flatten() for g in torch.autograd.grad(trainer.model.loss(batch), strategy.parameters())])
    trainer.engine.step = lambda: kept.append(torch.cat([p.grad.flatten() for p in strategy.parameters()]))
    trainer._step(batch, tasks[1])
    memory = strategy.plugin.reference_gradients
    assert raw @ memory < 0, "the new task undoes the old one"
    assert torch.allclose(kept[0], raw - memory * (raw @ memory) / (memory @ memory), atol=1e-6)


def test_frozen_parameters_are_neither_trained_nor_known_to_the_plug_in(tmp_path):
    given = digits(tmp_path)
    given["model"]["freeze_backbone"] = True
    trainer, tasks = trainer_for(given, "avalanche", plugin="ewc", options={"ewc_lambda": 1.0})
    before = copy.deepcopy(trainer.model.module.backbone.state_dict())
    trainer.fit(tasks)
    assert {n for held in trainer.strategy.plugin.saved_params.values() for n in held} == {
        "net.head.weight",
        "net.head.bias",
    }
    for key, value in trainer.model.module.backbone.state_dict().items():
        assert torch.equal(value, before[key])


def test_memories_are_numbers_of_examples(tmp_path):
    trainer, tasks = after_tasks(digits(tmp_path), "avalanche", 2, plugin="replay", options={"mem_size": 12})
    groups = dict(trainer.strategy.state_dict()["plugin"]["storage_policy"]["attributes"]["buffer_groups"]["items"])
    held = [groups[k]["attributes"]["_buffer"]["numbers"] for k in (0, 1)]
    size = len(tasks[0].train)
    assert [len(h) for h in held] == [6, 6]
    assert held[0].max() < size <= held[1].min() and held[1].max() < size + len(tasks[1].train)


@pytest.mark.parametrize(("plugin", "held"), [("replay", 12), ("gdumb", 12), ("gem", 16), ("agem", 16), ("ewc", 0)])
def test_what_a_plug_in_remembers_is_told_as_exemplars(plugin, held, tmp_path):
    own = {"replay": {"size": 5}} if plugin == "ewc" else {}
    options = {"plugin": plugin, "options": OPTIONS[plugin], **own}
    trainer, tasks = after_tasks(digits(tmp_path), "avalanche", 2, **options)
    holds, each = trainer.strategy.holds(), tasks[0].train.inputs[:1].nbytes
    count = held or 5  # the examples of clkit's own buffer
    assert (holds["exemplars"], holds["exemplar_bytes"]) == (count, count * each)
    assert {task for task, _ in trainer.strategy.exemplars()} == {0, 1}


def test_a_remainder_class_is_not_dropped(tmp_path):
    given = digits(tmp_path)
    given["tasks"]["classes_per_task"] = 3
    trainer, tasks = trainer_for(given, "avalanche", plugin="lwf", options={"alpha": 1.0})
    assert len(tasks) == 4 and not math.isnan(trainer.fit(tasks).matrix[-1, -1])
    assert trainer.strategy.plugin.lwf.prev_classes_by_task == {0: set(range(10))}


# --- refusals -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("plugin", "options", "message"),
    [
        ("ecw", {}, "unknown plug-in 'ecw'. Did you mean 'ewc'?"),
        ("ewc", {"ewc_lamda": 1}, "'ewc_lamda' is no argument of ewc. Did you mean 'ewc_lambda'?"),
        ("ewc", {}, "ewc needs 'ewc_lambda'"),
        ("ewc", {"ewc_lambda": 1, "mode": "online"}, "ewc refuses"),
        ("replay", {"storage_policy": "x"}, "'storage_policy' is no argument of replay"),
        ("ewc", {"ewc_lambda": "abc"}, "ewc_lambda is 'abc', expected a number of at least 0"),
        ("mas", {"alpha": [0.5]}, "alpha is .*, expected a number of at least 0"),
        ("replay", {"mem_size": -5}, "mem_size is -5, expected a whole number of at least 1"),
        ("gem", {"patterns_per_experience": 0, "memory_strength": 1}, "patterns_per_experience is 0, expected a whole"),
        ("replay", {"task_balanced_dataloader": 1}, "task_balanced_dataloader is 1, expected true or false"),
    ],
)
def test_options_are_checked_against_the_plug_in_before_anything_runs(plugin, options, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        resolve.validate({"strategy": {"name": "avalanche", "plugin": plugin, "options": options}})


def test_a_second_buffer_that_would_never_be_read_is_refused():
    strategy = {"name": "avalanche", "plugin": "gdumb", "options": {"mem_size": 9}, "replay": {"size": 5}}
    with pytest.raises(
        ConfigError, match="strategy.replay.size: gdumb makes its own batches .*strategy.options.mem_size"
    ):
        resolve.validate({"strategy": strategy})
    resolve.validate({"strategy": {**strategy, "plugin": "ewc", "options": {"ewc_lambda": 1}}})


@pytest.mark.parametrize("plugin", ["bic", "cope", "GSS_greedy", "LRSchedulerPlugin"])
def test_plug_ins_that_could_not_be_resumed_are_refused(plugin):
    with pytest.raises(CapabilityError, match="can't be saved and resumed exactly.* Supported: agem, ewc"):
        resolve.validate({"strategy": {"name": "avalanche", "plugin": plugin}})


@pytest.mark.parametrize("plugin", ["mas", "lwf", "gdumb"])
def test_plug_ins_of_classes_refuse_texts(plugin, text_content):
    with pytest.raises(CapabilityError, match="works on classes, not on texts; for language models take agem, ewc"):
        api.run(resolve.validate({**text_content, "strategy": content(plugin)}))


@pytest.mark.parametrize("plugin", ["ewc", "gem", "replay"])
def test_a_task_without_examples_is_refused_before_anything_is_trained(plugin, tmp_path):
    trainer, tasks = trainer_for(digits(tmp_path), "avalanche", plugin=plugin, options=OPTIONS[plugin])
    empty = dataclasses.replace(tasks[1], train=tasks[1].train.subset([]))
    with pytest.raises(DataError, match=f"Task 'task-2' has no training example, and Avalanche's {plugin} can't"):
        trainer.fit(TaskSequence([tasks[0], empty, *tasks[2:]], scenario="class"))
    assert trainer.position.total_steps == 0


def test_what_would_fail_at_a_late_task_is_refused_at_the_first(tmp_path):
    trainer, tasks = trainer_for(
        digits(tmp_path), "avalanche", plugin="agem", options={"patterns_per_experience": 8, "sample_size": 3}
    )
    with pytest.raises(ConfigError, match="sample_size is 3, expected at least 4"):
        trainer.fit(tasks)
    trainer, tasks = trainer_for(digits(tmp_path, steps=8), "avalanche", plugin="rwalk")
    with pytest.raises(ConfigError, match="delta_t is 10, expected at most 9"):
        trainer.fit(tasks)
    trainer, tasks = trainer_for(digits(tmp_path, schedule="linear"), "avalanche", plugin="gdumb")
    with pytest.raises(CapabilityError, match="the length of a schedule is not known"):
        trainer.fit(tasks)
    trainer, tasks = trainer_for(digits(tmp_path), "avalanche", plugin="lwf", options={"alpha": [1.0, 2.0]})
    with pytest.raises(ConfigError, match="alpha has 2 numbers, expected one, or one for each of 5 tasks"):
        trainer.fit(tasks)


def test_a_schedule_has_the_length_of_the_batches_that_replay_cuts(tmp_path):
    world = {**digits(tmp_path, schedule="linear"), "strategy": content("replay", batch_size=4)}
    world["tasks"]["num_tasks"] = 2
    world["tracking"] = {"log_every": 1}
    api.run(resolve.validate(world))
    found = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    rates = [e["learning_rate"] for e in found if e["event"] == "step" and e["task"] == "task-2"]
    assert len(rates) == 100 and rates == sorted(rates, reverse=True) and rates[-1] > 0
    assert [e["steps"] for e in found if e["event"] == "task"] == [26, 100]


def test_the_teacher_of_lwf_sees_the_images_that_the_model_sees(tmp_path):
    world = digits(tmp_path, augment="crop-flip")
    world["tasks"]["flat"] = False
    trainer, tasks = after_tasks(world, "avalanche", 1, **{k: v for k, v in content("lwf").items() if k != "name"})
    trainer.strategy.begin_task(tasks[1])
    batch = trainer.run.encodings.train(1).batch(torch.arange(8))
    batch.source = trainer.strategy.agent.pool
    batch.indices = batch.indices + int(trainer.strategy.agent.pool.offsets[1])
    changed = augmented(batch, "crop-flip", trainer.run.streams)
    assert not torch.equal(changed.inputs["x"], batch.inputs["x"])
    with torch.no_grad():
        assert abs(float(trainer.strategy.loss(changed)["penalty"])) < 1e-6, "they are the same model still"
