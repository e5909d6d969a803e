"""Exemplar buffers: which records are held, with what probability, and that state and streams reproduce exactly."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from clkit.errors import CheckpointError, ConfigError
from clkit.memory import Ref, make_buffer
from clkit.memory.reservoir import reservoir_slot

POLICIES = ("reservoir", "class-balanced", "ring")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stream(count: int, task: int = 0, label: int | None = None, start: int = 0) -> list[Ref]:
    return [Ref(task, i, label, f"t{task}-{i}") for i in range(start, start + count)]


def labels(buffer) -> Counter:
    return Counter(ref.label for ref in buffer.refs)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_buffer_keeps_everything_until_it_is_full_and_never_more_than_its_size(policy):
    buffer, rng = make_buffer(policy, 10), generator()
    for n, ref in enumerate(stream(40), start=1):
        buffer.add([ref], rng)
        assert len(buffer) == min(n, 10) and buffer.seen == n


@pytest.mark.parametrize("policy", POLICIES)
def test_a_stream_in_one_piece_and_in_many_gives_the_same_buffer_and_generator(policy):
    refs = [Ref(0, i, i % 3, str(i)) for i in range(200)]
    whole, parts, one, many = make_buffer(policy, 20), make_buffer(policy, 20), generator(), generator()
    whole.add(refs, one)
    for start in range(0, 200, 7):
        parts.add(refs[start : start + 7], many)
    assert whole.refs == parts.refs
    assert torch.equal(one.get_state(), many.get_state())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_record_offered_again_is_ignored(policy):
    buffer, rng = make_buffer(policy, 5), generator()
    buffer.add(stream(50), rng)
    held, state = list(buffer.refs), rng.get_state()
    for _ in range(3):
        buffer.add(stream(50), rng)
    assert buffer.refs == held and buffer.seen == 50 and torch.equal(rng.get_state(), state)
    buffer.add(stream(1, task=1), rng)
    assert buffer.seen == 51, "the same index of another task is another record"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_buffer_continues_exactly_from_its_saved_state(policy):
    refs = [Ref(i // 60, i % 60, (i * i) % 5 if policy != "ring" else None, str(i)) for i in range(180)]
    buffer, rng = make_buffer(policy, 17), generator()
    buffer.add(refs[:100], rng)
    resumed, other = make_buffer(policy, 17), generator()
    resumed.load_state_dict(buffer.state_dict())
    other.set_state(rng.get_state())
    assert resumed.refs == buffer.refs
    for b, g in ((buffer, rng), (resumed, other)):
        b.add(refs[90:], g)  # ten of them were offered before
    assert resumed.refs == buffer.refs and resumed.seen == buffer.seen == 180
    assert resumed.sample(5, other) == buffer.sample(5, rng)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_state_is_tensors_and_json(policy):
    buffer = make_buffer(policy, 4)
    buffer.add([Ref(0, i, i % 2, str(i)) for i in range(9)], generator())

    def check(value):
        if isinstance(value, dict):
            assert all(isinstance(k, str) for k in value)
            for v in value.values():
                check(v)
        elif isinstance(value, list):
            for v in value:
                check(v)
        else:
            assert value is None or isinstance(value, str | int | float | torch.Tensor)

    check(buffer.state_dict())


def test_a_state_of_another_policy_or_size_is_refused():
    state = make_buffer("reservoir", 4).state_dict()
    for policy, size in (("ring", 4), ("reservoir", 5)):
        with pytest.raises(CheckpointError, match="reservoir buffer of 4"):
            make_buffer(policy, size).load_state_dict(state)


def test_an_unknown_policy_and_an_empty_size_are_config_errors():
    with pytest.raises(ConfigError, match="Did you mean 'reservoir'"):
        make_buffer("resevoir", 4)
    with pytest.raises(ConfigError, match="at least 1"):
        make_buffer("ring", 0)


class TestSample:
    def test_it_draws_different_records_and_all_of_them_where_there_are_fewer(self):
        buffer = make_buffer("reservoir", 30)
        buffer.add(stream(30), generator())
        drawn = buffer.sample(12, generator(1))
        assert len(drawn) == len(set(drawn)) == 12
        assert set(buffer.sample(99, generator(2))) == set(buffer.refs)
        assert make_buffer("ring", 3).sample(4, generator()) == []

    def test_it_leaves_out_the_tasks_it_is_told_to(self):
        buffer = make_buffer("reservoir", 30)
        for task in range(3):
            buffer.add(stream(10, task), generator(task))
        assert {ref.task for ref in buffer.sample(30, generator(), exclude_tasks={1})} == {0, 2}
        assert buffer.sample(5, generator(), exclude_tasks=frozenset({0, 1, 2})) == []

    def test_every_record_is_drawn_equally_often(self):
        buffer, rng = make_buffer("reservoir", 12), generator(3)
        buffer.add(stream(12), rng)
        counts = Counter(ref.index for _ in range(3000) for ref in buffer.sample(4, rng))
        assert chisquare([counts[i] for i in range(12)]).pvalue > 1e-3


class TestReservoir:
    def test_the_slots_follow_algorithm_r(self):
        # j uniform in 0..n: kept in slot j if that is one of the slots.
        rng = np.random.default_rng(0)
        for n in range(200):
            j = int(rng.integers(0, n + 1))
            draw = (j + 0.5) / (n + 1)
            assert reservoir_slot(n, 20, draw) == (n if n < 20 else j if j < 20 else None)

    @pytest.mark.parametrize("name", ["a", "b"])
    def test_the_published_implementation_fills_the_same_slots_from_the_same_draws(self, data_root, name):
        with np.load(data_root.parent / "golden" / "ilora" / "ilora.npz") as stored:
            golden = {key.split("/")[-1]: stored[key] for key in stored if key.startswith(f"reservoir/{name}/")}
        size, draws = int(golden["size"]), np.random.RandomState(int(golden["numpy_seed"]))
        for n, want in enumerate(golden["slots"].tolist()):
            j = 0 if n < size else int(draws.randint(0, n + 1))
            slot = reservoir_slot(n, size, (j + 0.5) / (n + 1))
            assert (-1 if slot is None else slot) == want

    def test_every_record_of_the_stream_is_held_with_the_same_probability(self):
        size, count, runs, rng = 10, 40, 2000, generator(1)
        held = Counter()
        for _ in range(runs):
            buffer = make_buffer("reservoir", size)
            buffer.add(stream(count), rng)
            held.update(ref.index for ref in buffer.refs)
        observed = [held[i] for i in range(count)]
        # Inclusions within one run exclude each other, which shrinks their variance by (1 - size / count).
        statistic = chisquare(observed).statistic / (1 - size / count)
        assert sum(observed) == runs * size
        assert 15 < statistic < 73, "the 0.1 % and 99.9 % points of chi-square with 39 degrees of freedom"


class TestClassBalanced:
    def test_shares_are_as_equal_as_possible(self):
        buffer, rng = make_buffer("class-balanced", 20), generator()
        for label in range(6):
            buffer.add(stream(100, label, label), rng)
            sizes = labels(buffer).values()
            assert len(sizes) == label + 1 and sum(sizes) == 20 and max(sizes) - min(sizes) <= 1

    def test_a_rare_class_keeps_all_it_has_and_the_others_share_the_rest(self):
        refs = [Ref(0, i, 0 if i % 50 == 3 else 1 + i % 2, str(i)) for i in range(200)]
        buffer = make_buffer("class-balanced", 24)
        buffer.add(refs, generator())
        assert labels(buffer) == {0: 4, 1: 10, 2: 10}

    def test_records_without_a_class_are_balanced_by_task(self):
        buffer, rng = make_buffer("class-balanced", 12), generator()
        for task in range(3):
            buffer.add(stream(50, task), rng)
        assert Counter(ref.task for ref in buffer.refs) == {0: 4, 1: 4, 2: 4}

    def test_a_class_in_two_tasks_has_one_share(self):
        buffer, rng = make_buffer("class-balanced", 10), generator()
        for task, label in ((0, 0), (1, 1), (2, 0)):
            buffer.add(stream(40, task, label), rng)
        assert labels(buffer) == {0: 5, 1: 5}
        assert {ref.task for ref in buffer.refs if ref.label == 0} == {0, 2}

    @pytest.mark.parametrize("order", ["blocks", "mixed"])
    def test_inside_a_class_every_record_is_held_with_the_same_probability(self, order):
        rng = generator(5)
        refs = [Ref(0, i, i // 30, str(i)) for i in range(90)]
        if order == "mixed":
            refs = [refs[(i * 37) % 90] for i in range(90)]
        held = Counter()
        for _ in range(1500):
            buffer = make_buffer("class-balanced", 12)
            buffer.add(refs, rng)
            held.update(ref.index for ref in buffer.refs)
        for label in range(3):
            observed = [held[i] for i in range(30 * label, 30 * label + 30)]
            statistic = chisquare(observed).statistic / (1 - sum(observed) / 1500 / 30)
            assert 8 < statistic < 62, "the 0.005 % and 99.97 % points of chi-square with 29 degrees of freedom"


class TestRing:
    def test_each_group_holds_its_newest_records(self):
        buffer, rng = make_buffer("ring", 10), generator()
        buffer.add(stream(20, 0, 0), rng)
        assert [ref.index for ref in buffer.refs] == list(range(10, 20))
        buffer.add(stream(20, 1, 1), rng)
        buffer.add(stream(2, 2, 2), rng)
        by_label = {c: [ref.index for ref in buffer.refs if ref.label == c] for c in range(3)}
        assert by_label == {0: [16, 17, 18, 19], 1: [17, 18, 19], 2: [0, 1]}

    def test_the_size_holds_also_with_more_groups_than_places(self):
        buffer, rng = make_buffer("ring", 3), generator()
        for label in range(5):
            buffer.add(stream(4, label, label), rng)
            assert len(buffer) <= 3
        assert labels(buffer) == {0: 1, 1: 1, 2: 1}


def test_a_ring_keeps_records_of_every_task_where_classes_come_back():
    buffer = make_buffer("ring", 12)
    generator = torch.Generator().manual_seed(0)
    for task in range(3):
        buffer.add([Ref(task, i, i % 2, f"{task}/{i}") for i in range(40)], generator)
    assert {ref.task for ref in buffer.refs} == {0, 1, 2}
    assert len(buffer.sample(6, generator, exclude_tasks={2})) == 6
