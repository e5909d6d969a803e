"""Data order: every example once, little padding, exact from any step on."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit.config import TrainConfig
from clkit.dealing import split_batch
from clkit.loader import WINDOW, StepLoader, epoch_order, record_order, steps_in_stage
from clkit.memory import make_buffer
from clkit.rng import fresh_generator
from clkit.tasks.batch import Batch, Encoded


class Rows(Encoded):
    """Examples that are their own numbers."""

    def __init__(self, task: int, count: int) -> None:
        self.values = torch.arange(count, dtype=torch.float32) + 1000 * task
        self.ids = [f"{task}/{i}" for i in range(count)]

    def batch(self, indices):
        return Batch(
            {"x": self.values[indices]}, torch.zeros(len(indices), dtype=torch.long), len(indices), indices, self
        )


class Sets:
    def __init__(self, sizes):
        self.sets = [Rows(t, n) for t, n in enumerate(sizes)]

    def train(self, t):
        return self.sets[t]

    def classes(self, t):
        return torch.full((len(self.sets[t]),), t)


def loader(sets, stage, train, *, start=0, buffer=None, tasks=None, ratio=1.0, streams=None):
    draws, keeps = streams or (fresh_generator(0, "d"), fresh_generator(0, "k"))
    return StepLoader(
        sets,
        tasks or [stage],
        train,
        seed=3,
        stage=stage,
        start=start,
        buffer=buffer,
        ratio=ratio,
        draws=draws,
        keeps=keeps,
    )


@given(count=st.integers(1, 300), size=st.integers(1, 40), seed=st.integers(0, 5), grouped=st.booleans())
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_every_example_exactly_once(count, size, seed, grouped):
    lengths = np.random.default_rng(seed).integers(1, 500, count) if grouped else None
    batches = epoch_order(count, size, torch.Generator().manual_seed(seed), lengths)
    assert sorted(torch.cat(batches).tolist()) == list(range(count))
    assert max(len(b) for b in batches) <= size
    assert len(batches) == -(-count // size)


@given(count=st.integers(1, 400), size=st.integers(1, 5), seed=st.integers(0, 3), grouped=st.booleans())
@settings(max_examples=60, deadline=None)
def test_by_record_leaving_one_out_changes_no_batch_before_it(count, size, seed, grouped):
    rng = np.random.default_rng(seed)
    ids = [f"r{i}" for i in range(count)]
    lengths = rng.integers(1, 50, count) if grouped else None
    batches = record_order(ids, size, (seed, 1), lengths)
    assert sorted(torch.cat(batches).tolist()) == list(range(count))
    assert len(batches) == -(-count // size) and max(map(len, batches)) <= size
    out = int(rng.integers(count))
    at = next(n for n, b in enumerate(batches) if out in b.tolist())
    same = at - at % WINDOW if grouped else at
    kept = [i for i in range(count) if i != out]
    rest = record_order([ids[i] for i in kept], size, (seed, 1), None if lengths is None else lengths[kept])
    for before, after in zip(batches[:same], rest[:same], strict=True):
        assert [ids[i] for i in before.tolist()] == [ids[kept[i]] for i in after.tolist()]


def test_by_record_an_order_is_another_one_in_each_epoch_and_resumes_anywhere():
    train = TrainConfig(epochs=3, batch_size=4, order="record")
    whole = [b.indices.tolist() for b in loader(Sets([10]), 0, train)]
    assert whole[:3] != whole[3:6] and sorted(i for b in whole[3:6] for i in b) == list(range(10))
    assert [b.indices.tolist() for b in loader(Sets([10]), 0, train, start=4)] == whole[4:]


def test_grouping_by_length_wastes_less_than_a_tenth_on_padding():
    lengths = np.random.default_rng(0).lognormal(4.5, 0.6, 600).astype(int)
    batches = epoch_order(600, 8, torch.Generator().manual_seed(0), lengths)
    padded = sum(lengths[b.numpy()].max() * len(b) for b in batches)
    assert 1 - lengths.sum() / padded < 0.10


def test_starting_at_step_n_gives_the_batches_that_were_left():
    train = TrainConfig(epochs=3, batch_size=4)
    whole = [b.indices.tolist() for b in loader(Sets([10]), 0, train)]
    assert len(whole) == steps_in_stage(10, train) == 9
    for start in range(9):
        assert [b.indices.tolist() for b in loader(Sets([10]), 0, train, start=start)] == whole[start:]


def test_a_task_without_records_has_no_steps_however_many_are_asked_for():
    empty = loader(Sets([4, 0]), 1, TrainConfig(steps=5, batch_size=2), buffer=make_buffer("reservoir", 4))
    assert len(empty) == 0 and list(empty) == []


def test_epochs_differ_in_order():
    batches = [b.indices.tolist() for b in loader(Sets([64]), 0, TrainConfig(epochs=2, batch_size=64))]
    assert batches[0] != batches[1] and sorted(batches[0]) == sorted(batches[1])


def test_rehearsed_rows_come_from_earlier_tasks_and_are_marked():
    sets, buffer = Sets([20, 20]), make_buffer("reservoir", 6)
    train = TrainConfig(batch_size=4)
    assert all(b.replayed is None for b in loader(sets, 0, train, buffer=buffer))
    kept = len(buffer)
    assert kept == 6
    for batch in loader(sets, 1, train, buffer=buffer):
        new, old = batch.inputs["x"][~batch.replayed], batch.inputs["x"][batch.replayed]
        assert (new >= 1000).all() and (old < 1000).all() and len(new) == 4
        assert batch.ids == [f"{int(v) // 1000}/{int(v) % 1000}" for v in batch.inputs["x"]]


def test_ratio_sets_how_many_rehearsed_rows_join_the_new_ones():
    sets, buffer = Sets([50, 8]), make_buffer("reservoir", 50)
    list(loader(sets, 0, TrainConfig(batch_size=8), buffer=buffer))
    (batch,) = loader(sets, 1, TrainConfig(batch_size=8), buffer=buffer, ratio=0.5)
    assert int(batch.replayed.sum()) == 4


@pytest.mark.parametrize(("size", "ratio"), [(8, 0.05), (1, 0.25), (5, 0.5), (3, 1.7)])
def test_a_ratio_that_is_no_whole_number_per_batch_holds_over_the_task(size, ratio):
    sets, buffer, train = Sets([50, 99]), make_buffer("reservoir", 50), TrainConfig(batch_size=size, epochs=2)
    list(loader(sets, 0, train, buffer=buffer))

    def counts(start=0):
        batches = loader(sets, 1, train, buffer=copy.deepcopy(buffer), ratio=ratio, start=start)
        return [0 if b.replayed is None else int(b.replayed.sum()) for b in batches]

    whole = counts()
    assert abs(sum(whole) - 198 * ratio) < 1 and max(whole) <= size * ratio + 1
    assert counts(len(whole) // 2 + 3) == whole[len(whole) // 2 + 3 :]


def test_the_buffer_and_its_generators_are_exact_at_every_step():
    sets, train = Sets([12, 12]), TrainConfig(epochs=2, batch_size=3)

    def fresh():
        buffer = make_buffer("reservoir", 5)
        streams = (fresh_generator(1, "d"), fresh_generator(1, "k"))
        list(loader(sets, 0, train, buffer=buffer, streams=streams))
        return buffer, streams

    buffer, streams = fresh()
    whole = [b.ids for b in loader(sets, 1, train, buffer=buffer, streams=streams)]
    for stop in range(1, 8):
        buffer, streams = fresh()
        first = iter(loader(sets, 1, train, buffer=buffer, streams=streams))
        done = [next(first).ids for _ in range(stop)]
        saved, states = buffer.state_dict(), [g.get_state() for g in streams]
        again = make_buffer("reservoir", 5)
        again.load_state_dict(saved)
        for generator, state in zip(streams, states, strict=True):
            generator.set_state(state)
        rest = [b.ids for b in loader(sets, 1, train, start=stop, buffer=again, streams=streams)]
        assert done + rest == whole


def test_micro_batches_hold_the_same_rows_and_marks_as_the_batch():
    sets, buffer = Sets([8, 8]), make_buffer("reservoir", 8)
    list(loader(sets, 0, TrainConfig(batch_size=8), buffer=buffer))
    (batch,) = loader(sets, 1, TrainConfig(batch_size=8), buffer=buffer)
    parts = split_batch(batch, 5)
    assert [len(p) for p in parts] == [5, 5, 5, 1]
    assert torch.equal(torch.cat([p.inputs["x"] for p in parts]), batch.inputs["x"])
    assert torch.equal(torch.cat([p.replayed for p in parts]), batch.replayed)
