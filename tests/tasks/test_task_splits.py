"""Properties of splits: nothing is lost, nothing is used twice, the same seed gives the same tasks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit.errors import DataError
from clkit.tasks.base import LabelledExamples
from clkit.tasks.sampling import held_out, limited
from clkit.tasks.splits import SplitConfig, class_order, split_examples, split_problems
from clkit.tasks.transforms import permute_pixels, rotate


def labelled(counts: list[int], part: str) -> LabelledExamples:
    labels = torch.tensor([c for c, n in enumerate(counts) for _ in range(n)], dtype=torch.long)
    inputs = torch.arange(len(labels) * 2, dtype=torch.float32).reshape(-1, 2)
    return LabelledExamples(inputs, labels, [f"{part}{i}" for i in range(len(labels))])


def names(n: int) -> list[str]:
    return [f"c{i}" for i in range(n)]


counts = st.lists(st.integers(3, 6), min_size=2, max_size=9)
configs = st.builds(
    SplitConfig,
    scenario=st.sampled_from(["class", "task"]),
    classes_per_task=st.integers(1, 4),
    num_tasks=st.integers(0, 2),
    order_seed=st.none() | st.integers(0, 99),
)


@given(counts, configs, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_example_is_in_exactly_one_task_and_keeps_its_class(counts, config, seed):
    train, eval = labelled(counts, "t"), labelled([3] * len(counts), "e")
    tasks = split_examples(train, eval, names(len(counts)), config, seed)
    assert sorted(i for t in tasks for i in t.train.ids) == sorted(train.ids)
    assert sorted(i for t in tasks for i in t.eval.ids) == sorted(eval.ids)
    assert sorted(c for t in tasks for c in t.classes) == list(range(len(counts)))
    class_of = dict(zip(train.ids, train.labels.tolist(), strict=True))
    for task in tasks:
        source = dict(zip(task.classes, task.metadata["source_classes"], strict=True))
        assert task.metadata["class_names"] == [f"c{c}" for c in task.metadata["source_classes"]]
        for example, label in zip(task.train.ids, task.train.labels.tolist(), strict=True):
            assert class_of[example] == source[label]
    again = split_examples(train, eval, names(len(counts)), config, seed)
    assert [t.train.fingerprint() for t in tasks] == [t.train.fingerprint() for t in again]


@given(st.integers(1, 30), st.integers(1, 8))
def test_what_remains_makes_a_smaller_last_task(num_classes, per_task):
    data = labelled([1] * num_classes, "x")
    tasks = split_examples(data, data, names(num_classes), SplitConfig(classes_per_task=per_task), 0)
    sizes = [len(t.classes) for t in tasks]
    assert sizes[:-1] == [per_task] * (len(sizes) - 1)
    assert sum(sizes) == num_classes and 1 <= sizes[-1] <= per_task


def test_num_tasks_is_kept_exactly_and_the_tasks_are_even():
    data = labelled([1] * 10, "x")
    tasks = split_examples(data, data, names(10), SplitConfig(num_tasks=6), 0)
    assert [len(t.classes) for t in tasks] == [2, 2, 2, 2, 1, 1]


@given(st.lists(st.integers(4, 9), min_size=2, max_size=5), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_shards_give_every_class_to_every_task_and_use_each_example_once(counts, num_tasks, seed):
    train, eval = labelled(counts, "t"), labelled([4] * len(counts), "e")
    config = SplitConfig(scenario="domain", num_tasks=num_tasks)
    tasks = split_examples(train, eval, names(len(counts)), config, seed)
    assert tasks.scenario == "domain" and len(tasks) == num_tasks
    assert sorted(i for t in tasks for i in t.train.ids) == sorted(train.ids)
    assert all(set(t.train.labels.tolist()) == set(range(len(counts))) for t in tasks)
    sizes = [len(t.train) for t in tasks]
    assert max(sizes) - min(sizes) <= 1


def test_the_literature_seed_gives_the_literature_order():
    assert class_order(100, 1993)[:11] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76, 40]
    assert class_order(4) == [0, 1, 2, 3]


def test_classes_are_numbered_in_the_order_of_learning():
    data = labelled([2] * 4, "x")
    tasks = split_examples(data, data, names(4), SplitConfig(class_order=["c3", "1", "c0", "2"]), 0)
    assert [t.classes for t in tasks] == [(0, 1), (2, 3)]
    assert [t.metadata["class_names"] for t in tasks] == [["c3", "c1"], ["c0", "c2"]]
    assert tasks[0].train.ids == ["x2", "x3", "x6", "x7"]
    assert tasks[0].train.labels.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("config", "key", "message"),
    [
        (SplitConfig(class_order=["c0", "c1", "c1", "c2"]), "tasks.class_order", "class 'c1' is listed twice"),
        (SplitConfig(class_order=["c0", "0", "c1", "c2"]), "tasks.class_order", "class 'c0' is listed twice"),
        (SplitConfig(class_order=["c0", "c1"]), "tasks.class_order", "1 of 3 classes are missing: c2"),
        (SplitConfig(class_order=["c0", "c1", "cc2"]), "tasks.class_order", "unknown class 'cc2'. Did you mean 'c2'?"),
        (SplitConfig(num_tasks=4), "tasks.num_tasks", "more tasks than classes (got 4, expected at most 3)"),
        (SplitConfig(class_order=["c0"], order_seed=1), "tasks.order_seed", "not both"),
        (SplitConfig(scenario="domain"), "tasks.num_tasks", "needs the number of tasks"),
        (SplitConfig(scenario="domain", num_tasks=2, order_seed=1), "tasks.order_seed", "no meaning"),
        (SplitConfig(domain="permute"), "tasks.domain", "needs scenario 'domain'"),
    ],
)
def test_a_split_that_cannot_be_made_is_named(config, key, message):
    found = split_problems(config, names(3))
    assert any(p.where == key and message in p.what for p in found)
    data = labelled([2, 2, 2], "x")
    with pytest.raises(DataError, match="can't be split"):
        split_examples(data, data, names(3), config, 0)


def test_a_class_without_examples_is_an_error():
    with pytest.raises(DataError, match="class 'c2': has no train example"):
        split_examples(labelled([1, 1], "x"), labelled([1, 1, 1], "x"), names(3), SplitConfig(), 0)


def test_too_few_examples_for_the_shards_is_an_error():
    data = labelled([3, 2], "x")
    with pytest.raises(DataError) as error:
        split_examples(data, data, names(2), SplitConfig(scenario="domain", num_tasks=3), 0)
    assert [str(p) for p in error.value.problems] == [
        f"class 'c1': has 2 {part} examples, fewer than the 3 tasks" for part in ("train", "eval")
    ]


def test_limits_are_per_class_and_nested():
    data = labelled([9, 7], "x")

    def ids(limit: int) -> set[str]:
        return set(split_examples(data, data, names(2), SplitConfig(train_limit=limit), 3)[0].train.ids)

    assert len(ids(3)) == 6 and ids(2) < ids(3) < ids(5)
    assert len(ids(8)) == 15


@given(st.sets(st.text(min_size=1, max_size=4), min_size=3, max_size=20), st.integers(1, 5), st.randoms())
@settings(max_examples=30, deadline=None)
def test_what_is_chosen_does_not_depend_on_the_order_of_the_records(ids, limit, random):
    ids = sorted(ids)
    shuffled = ids.copy()
    random.shuffle(shuffled)
    one = {ids[i] for i in limited(ids, [0] * len(ids), limit, 0, "p")}
    other = {shuffled[i] for i in limited(shuffled, [0] * len(ids), limit, 0, "p")}
    assert one == other and len(one) == min(limit, len(ids))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.floats(0.05, 0.9), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_holding_out_is_stratified_and_loses_nothing(groups, fraction, seed):
    train, out = held_out([str(i) for i in range(len(groups))], groups, fraction, seed)
    assert sorted(train + out) == list(range(len(groups)))
    for group in set(groups):
        size = groups.count(group)
        expected = min(max(round(size * fraction), 1), size - 1)
        assert sum(groups[i] == group for i in out) == expected


@given(st.lists(st.integers(0, 9), min_size=2, max_size=60), st.floats(0.05, 0.9), st.randoms())
@settings(max_examples=40, deadline=None)
def test_no_copy_of_what_is_held_out_is_learned(contents, fraction, random):
    ids = [f"{i}" for i in range(len(contents))]
    train, out = held_out(ids, [0] * len(ids), fraction, 0, contents)
    assert sorted(train + out) == list(range(len(ids))) and train and out
    assert len(set(contents)) == 1 or not {contents[i] for i in train} & {contents[i] for i in out}
    order = list(range(len(ids)))
    random.shuffle(order)
    _, other = held_out([ids[i] for i in order], [0] * len(ids), fraction, 0, [contents[i] for i in order])
    assert len(set(contents)) == 1 or sorted(order[i] for i in other) == out


def test_permuted_domains_keep_pixels_and_rotated_ones_turn_them():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    data = LabelledExamples(images, torch.tensor([0, 1]), ["a", "b"])
    permuted = split_examples(data, data, names(2), SplitConfig(scenario="domain", num_tasks=3, domain="permute"), 0)
    assert torch.equal(permuted[0].train.inputs, images)
    other = permuted[1].train.inputs
    assert not torch.equal(other, images) and torch.equal(other.flatten(2).sort().values, images.flatten(2))
    # The channels of a pixel move together.
    assert torch.equal(other[:, 1] - other[:, 0], images[:, 1] - images[:, 0])
    assert permuted[1].train.ids == ["a@permute-2", "b@permute-2"]
    rotated = split_examples(data, data, names(2), SplitConfig(scenario="domain", num_tasks=2, domain="rotate"), 0)
    assert torch.equal(rotated[1].train.inputs, torch.rot90(images, 1, (2, 3)))


def test_rotation_turns_counter_clockwise_and_keeps_the_type():
    image = torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rotate(image, 90), torch.rot90(image, 1, (2, 3)), atol=1e-5)
    assert torch.allclose(rotate(image, 180), torch.rot90(image, 2, (2, 3)), atol=1e-5)
    assert rotate(torch.zeros(0, 1, 5, 5, dtype=torch.uint8), 90).shape == (0, 1, 5, 5)
    with pytest.raises(DataError, match="needs images"):
        rotate(torch.zeros(2, 25), 90)


def test_vectors_are_permuted_alike():
    import numpy as np

    vectors = torch.arange(6.0).repeat(3, 1)
    permuted = permute_pixels(vectors, np.random.default_rng(0))
    assert torch.equal(permuted[0], permuted[2]) and not torch.equal(permuted[0], vectors[0])


def test_texts_cannot_be_permuted():
    data = LabelledExamples(("a", "b"), torch.tensor([0, 1]), ["a", "b"])
    with pytest.raises(DataError, match="in memory"):
        split_examples(data, data, names(2), SplitConfig(scenario="domain", num_tasks=1, domain="permute"), 0)
