"""Baselines on frozen features are their closed forms, whatever the order in which the examples come."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import after_tasks, trainer_for
from torch import nn

from clkit import api, build, resolve
from clkit.errors import CapabilityError, NumericalError
from clkit.features import FeatureStatistics
from clkit.strategies.ncm import nearest_mean
from clkit.strategies.ranpac import RIDGES, choose_ridge, ridge_weights
from clkit.strategies.simplecil import prototypes
from clkit.strategies.slda import covariance, discriminants
from clkit.tasks.base import LabelledExamples, Task, TaskSequence
from clkit.trainer import SequentialTrainer

NAMES = ["ncm", "simplecil", "slda", "ranpac"]
SOLVERS = {
    "ncm": nearest_mean,
    "simplecil": prototypes,
    "slda": lambda s: discriminants(s, 0.01),
    "ranpac": lambda s: (ridge_weights(s, 0.1).T, torch.zeros(len(s.counts))),
}


def draw(count=60, width=5, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    x = torch.randn(count, width, dtype=torch.float64, generator=generator)
    return x * torch.arange(1, width + 1) + 2 * labels.unsqueeze(1).cos() + 3, labels


def statistics(x, labels, classes=3, size=None):
    found = FeatureStatistics(classes, x.shape[1], moment=True)
    for part in torch.split(torch.arange(len(x)), size or len(x)):
        found.add(x[part], labels[part])
    return found


# --- closed forms -------------------------------------------------------------------------------------------------
def test_the_nearest_mean_is_the_nearest_mean():
    x, labels = draw()
    weight, bias = nearest_mean(statistics(x, labels))
    means = torch.stack([x[labels == c].mean(0) for c in range(3)])
    distances = torch.cdist(x, means).square()
    scores = x @ weight.T + bias
    assert torch.allclose(scores - scores[:, :1], -(distances - distances[:, :1]) / 2, atol=1e-10)


def test_prototypes_score_the_cosine_with_the_mean_of_unscaled_features():
    x, labels = draw()
    weight, bias = prototypes(statistics(x, labels))
    means = torch.stack([x[labels == c].mean(0) for c in range(3)])
    unit = nn.functional.normalize(x, dim=1)
    assert torch.allclose(unit @ weight.T + bias, nn.functional.cosine_similarity(x[:, None], means, dim=2), atol=1e-12)


def test_discriminants_have_the_pooled_covariance_of_all_examples():
    x, labels = draw(count=61)
    pooled = sum(np.cov(x[labels == c].numpy().T, ddof=0) * int((labels == c).sum()) for c in range(3)) / 61
    found = statistics(x, labels, size=7)
    assert np.allclose(covariance(found), pooled, rtol=1e-12, atol=1e-12)
    precision = np.linalg.inv(0.9 * pooled + 0.1 * np.eye(5))
    means = np.stack([x[labels == c].mean(0).numpy() for c in range(3)])
    weight, bias = discriminants(found, 0.1)
    assert np.allclose(weight, means @ precision, rtol=1e-10)
    assert np.allclose(bias, -0.5 * np.einsum("cd,de,ce->c", means, precision, means), rtol=1e-10)


def test_without_shrinkage_discriminants_are_those_of_scikit_learn():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, labels = draw()
    weight, bias = discriminants(statistics(x, labels), 1e-13)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3).fit(x.numpy(), labels.numpy())
    assert np.allclose(weight, theirs.coef_, rtol=1e-8)
    assert np.allclose(bias + np.log(1 / 3), theirs.intercept_, rtol=1e-8)


def test_the_ridge_is_the_one_with_the_smallest_error_on_the_part_held_out():
    x, labels = draw(count=90, seed=4)
    y = nn.functional.one_hot(labels, 3).double()
    fit, held = slice(0, 30), slice(30, 90)
    gram = x[fit].T @ x[fit]
    errors = {}
    for factor in RIDGES:
        penalty = factor * gram.trace() / 5 * torch.eye(5, dtype=torch.float64)
        weights = torch.linalg.solve(gram + penalty, x[fit].T @ y[fit])
        assert torch.allclose(ridge_weights(statistics(x[fit], labels[fit]), factor), weights, rtol=1e-8)
        errors[factor] = float((y[held] - x[held] @ weights).square().sum())
    best = choose_ridge(statistics(x[fit], labels[fit]), statistics(x[held], labels[held]))
    assert best == min(errors, key=errors.get)
    rest = statistics(x, labels).without(statistics(x[held], labels[held]))
    assert choose_ridge(rest, statistics(x[held], labels[held])) == best
    nothing = FeatureStatistics(3, 5, moment=True)
    assert choose_ridge(rest, nothing) == choose_ridge(nothing, rest) == max(RIDGES)


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(24)), st.integers(1, 24), st.permutations(range(4)), st.sampled_from(NAMES))
def test_neither_the_order_of_examples_nor_of_classes_nor_the_batches_matter(order, size, classes, name):
    x, labels = draw(count=24, classes=4)
    weight, bias = SOLVERS[name](statistics(x, labels, 4))
    renamed = torch.tensor(classes)
    order = torch.tensor(order)
    again, other = SOLVERS[name](statistics(x[order], renamed[labels[order]], 4, size))
    assert torch.allclose(again[renamed], weight, rtol=1e-9, atol=1e-11)
    assert torch.allclose(other[renamed], bias, rtol=1e-9, atol=1e-11)


# --- in the trainer -----------------------------------------------------------------------------------------------
def digits(**tasks):
    return {
        "model": {"name": "identity"},
        "tasks": {"source": "digits", **tasks},
        "train": {"batch_size": 32, "epochs": 1},
        "eval": {"initial": False},
    }


def learned(name, content=None, **options):
    trainer, tasks = trainer_for(content or digits(), name, **options)
    result = trainer.fit(tasks)
    return trainer, tasks, result


def head_by_source_class(trainer, tasks):
    """Weight and bias in the data set's own numbering."""
    source = torch.tensor([c for task in tasks for c in task.metadata["source_classes"]])
    order = source.argsort()
    return trainer.strategy.head.weight[order], trainer.strategy.head.bias[order]


@pytest.mark.parametrize("name", NAMES)
def test_another_order_of_classes_and_other_batches_end_with_the_same_weights(name):
    ours = head_by_source_class(*learned(name)[:2])
    other = digits(order_seed=3, classes_per_task=3)
    other["train"] = {"batch_size": 7, "epochs": 2, "group_by_length": False}
    theirs = head_by_source_class(*learned(name, other)[:2])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9 * float(a.abs().max()))


@pytest.mark.parametrize("policy", ["reservoir", "herding"])
@pytest.mark.parametrize("name", NAMES)
def test_classes_that_return_and_rehearsal_count_every_example_once(name, policy):
    content = digits(scenario="domain", num_tasks=3)
    content["train"]["epochs"] = 2
    trainer, tasks, _ = learned(name, content, replay={"size": 90, "policy": policy})
    every = sum(len(t.train) for t in tasks)
    assert float(trainer.strategy.statistics.counts.sum()) == every
    whole, _, _ = learned(name, digits(scenario="domain", num_tasks=1))
    assert torch.allclose(trainer.strategy.head.weight, whole.strategy.head.weight, rtol=1e-7, atol=1e-6)


def test_on_real_digits_they_are_as_good_as_they_should_be():
    found = {}
    for name in NAMES:
        _, tasks, result = learned(name)
        found[name] = result.metrics["average_accuracy"]
        if name == "ncm":
            means = torch.stack(
                [t.train.inputs[t.train.labels == c].double().mean(0) for t in tasks for c in t.classes]
            )
            nearest = [torch.cdist(t.eval.inputs.double(), means).argmin(1) for t in tasks]
            scores = [float((n == t.eval.labels).double().mean()) for n, t in zip(nearest, tasks, strict=True)]
            np.testing.assert_allclose(result.matrix[-1], scores, rtol=0, atol=1e-12)
    assert found["ncm"] > 0.87 and found["simplecil"] > 0.87
    assert found["slda"] > found["ncm"] + 0.03
    assert found["ranpac"] > 0.96


def test_what_serves_after_a_task_rests_on_no_later_example():
    trainer, tasks = after_tasks(digits(), "ranpac", 2, width=100)
    strategy = trainer.strategy
    with trainer.serving():
        pass
    encoded = [trainer.run.encodings.train(i) for i in range(2)]
    h = torch.cat([strategy.head.transform(e.features) for e in encoded])
    labels = torch.cat([e.labels for e in encoded])
    out = torch.tensor([strategy._is_held_out(i) for e in encoded for i in e.ids])
    assert 0.1 < out.double().mean() < 0.3
    factor = choose_ridge(statistics(h[~out], labels[~out], 10), statistics(h[out], labels[out], 10))
    gram = h.T @ h
    penalty = factor * gram.trace() / 100 * torch.eye(100, dtype=torch.float64)
    expected = torch.linalg.solve(gram + penalty, h.T @ nn.functional.one_hot(labels, 10).double()).T
    assert torch.allclose(strategy.head.weight, expected, rtol=1e-6, atol=1e-9)
    assert strategy.head.bias.tolist() == [0.0] * 4 + [-torch.inf] * 6
    later = trainer.model.logits(trainer.run.encodings.eval(tasks[4]).batch(torch.arange(5)))
    assert set(later.argmax(1).tolist()) <= {0, 1, 2, 3}, "a class that was never seen is never the answer"


@pytest.mark.parametrize("name", NAMES)
def test_it_changes_no_weight_of_the_backbone_and_needs_no_optimiser(name, vision_content):
    trainer, tasks = trainer_for(vision_content, name)
    before = {n: v.clone() for n, v in trainer.model.module.backbone.state_dict().items()}
    trainer.directory = None
    trainer.fit(tasks)
    assert not trainer.strategy.parameters()
    for key, value in trainer.model.module.backbone.state_dict().items():
        assert torch.equal(value, before[key]), key


# --- refusals -----------------------------------------------------------------------------------------------------
def test_a_module_without_a_backbone_is_refused():
    _, tasks = trainer_for(digits(), "ncm")
    trainer = SequentialTrainer(nn.Linear(64, 10), "slda")
    with pytest.raises(CapabilityError, match="Strategy 'slda' needs a backbone with a head"):
        trainer.fit(tasks)


@pytest.mark.parametrize("name", ["ncm", "dkvb"])
def test_changed_images_are_refused_by_a_method_that_reads_each_once(name, vision_content):
    vision_content["train"]["augment"] = "crop-flip"
    trainer, tasks = trainer_for(vision_content, name)
    with pytest.raises(CapabilityError, match=f"Strategy '{name}' reads every image once, as it is; set train.augment"):
        trainer.fit(tasks)


def test_the_steps_of_a_run_are_known_before_it():
    content = digits(num_tasks=5)
    for train, replay in (
        ({"epochs": 3}, {}),
        ({"steps": 1000}, {"size": 50, "policy": "herding"}),
        ({"steps": 2}, {}),
    ):
        content["train"] = {"batch_size": 32, **train}
        trainer, tasks = trainer_for(content, "ncm", replay=replay)
        planned = build.stage_steps(trainer.config, tasks)
        trainer.fit(tasks)
        assert trainer.position.total_steps == sum(planned)
        every = sum(len(t.train) for t in tasks)
        assert trainer.strategy.statistics.counts.sum() == (every if train.get("steps") != 2 else 5 * 2 * 32)


def test_features_that_are_not_finite_are_named_before_they_are_counted():
    inputs = torch.eye(4)
    inputs[2, 0] = torch.nan
    examples = LabelledExamples(inputs, torch.tensor([0, 1, 0, 1]), ["a", "b", "broken", "d"])
    tasks = TaskSequence([Task("odd", examples, examples, "classification", "accuracy", (0, 1))])
    trainer, _ = trainer_for(digits(), "ncm")
    trainer.model.input_shape = None
    with pytest.raises(NumericalError, match="not finite in task 'odd'. Records: broken;"):
        trainer.fit(tasks)
    assert not trainer.strategy.statistics.counts.any()


def test_a_second_moment_that_rounding_left_indefinite_is_told():
    found = FeatureStatistics(1, 2, moment=True)
    found.counts += 1
    found.moment -= torch.eye(2)
    with pytest.raises(NumericalError, match="raise strategy.shrinkage"):
        discriminants(found, 1e-6)


def test_an_export_holds_no_statistics(tmp_path):
    from safetensors import safe_open

    content = {**digits(), "output_dir": str(tmp_path / "run"), "strategy": {"name": "ranpac", "width": 50}}
    result = api.run(resolve.validate(content))
    with safe_open(result.run_dir / "export" / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == {"head.weight": (10, 50), "head.bias": (10,), "head.projection": (64, 50)}
