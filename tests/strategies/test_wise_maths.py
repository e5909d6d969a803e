"""The mathematics of WISE: margins, masks, sparse deltas, merging, choosing, one step of optimisation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clkit.editing.losses import target_loss
from clkit.strategies.wise.delta import SparseDelta
from clkit.strategies.wise.losses import margin_loss, mean_of_positive
from clkit.strategies.wise.masks import shard_mask
from clkit.strategies.wise.merge import merge
from clkit.strategies.wise.router import Router, change_sizes, choose


def relu_mean(values):
    positive = [v for v in values if v > 0]
    return sum(positive) / len(positive) if positive else 0.0


@given(
    st.lists(st.floats(-9, 9, width=16), min_size=1, max_size=5),
    st.lists(st.floats(-9, 9, width=16), min_size=1, max_size=4),
)
def test_the_margin_loss_averages_over_violations_only(inside, outside):
    expected = (
        relu_mean([o - i + 1 for o in outside for i in inside])
        + relu_mean([o - 0.5 for o in outside])
        + relu_mean([2 - i for i in inside])
    )
    found = margin_loss(torch.tensor(inside), torch.tensor(outside), alpha=0.5, beta=2.0, gamma=1.0)
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_no_violation_costs_nothing_and_a_bound_is_none():
    assert float(margin_loss(torch.tensor([2.0, 3.0]), torch.tensor([0.5]), 0.5, 2.0, 1.0)) == 0
    assert float(mean_of_positive(torch.tensor([0.0, -1.0]))) == 0


def test_the_target_loss_is_the_mean_over_rows_of_the_mean_over_tokens():
    scores = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[-100, 2, 4], [1, 0, 3]])
    log = scores.log_softmax(-1)
    rows = [-(log[0, 1, 2] + log[0, 2, 4]), -(log[1, 0, 1] + log[1, 1, 0] + log[1, 2, 3])]
    assert float(target_loss(scores, targets)) == pytest.approx(float(rows[0] / 2 + rows[1] / 3) / 2, abs=1e-6)
    assert float(target_loss(scores, targets, extra=1)) == pytest.approx(float(rows[0] / 3 + rows[1] / 4) / 2, abs=1e-6)


def test_masks_depend_on_seed_and_shard_alone_and_overlap_by_chance():
    shape = (200, 300)
    a, b = shard_mask(shape, 0.2, 0, 0), shard_mask(shape, 0.2, 0, 1)
    assert torch.equal(a, shard_mask(shape, 0.2, 0, 0)) and not torch.equal(a, shard_mask(shape, 0.2, 1, 0))
    assert a.dtype == torch.bool
    for mask in (a, b):
        assert float(mask.float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float((a & b).float().mean()) == pytest.approx(0.04, abs=0.005)


def sparse(seed, shape=(6, 7), density=0.4):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)
    return SparseDelta.from_dense(dense)


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_a_rounded_delta_survives_saving_bit_for_bit(storage):
    delta = sparse(0, (13, 11)).rounded(storage)
    again = SparseDelta.from_state(delta.state_dict(storage))
    assert torch.equal(again.dense(), delta.dense())
    assert delta.state_dict(storage)["bits"].numel() == math.ceil(13 * 11 / 8)


def published_ties(deltas, weights, density):
    """TIES on dense matrices, as the published code states it."""
    shape, kept = deltas[0].shape, []
    for delta in deltas:
        flat = delta.flatten()
        top = flat.abs().topk(int(density * flat.numel())).indices
        kept.append(torch.zeros_like(flat).index_put((top,), flat[top]).view(shape))
    terms = torch.stack([w * d for w, d in zip(weights, kept, strict=True)])
    sign = torch.where(terms.sum(0) >= 0, 1.0, -1.0)
    agree = (terms.sign() == sign).float()
    total = (agree * torch.tensor(weights).view(-1, 1, 1)).sum(0)
    return (terms * agree).sum(0) / torch.where(total == 0, torch.ones(()), total)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("density", [0.1, 0.53, 1.0])
@pytest.mark.parametrize("equal", [True, False])
def test_ties_on_sparse_deltas_equals_ties_on_dense_matrices(count, density, equal):
    deltas = [sparse(seed) for seed in range(count)]
    weights = [1 / count] * count if equal else [0.6, 0.3, 0.1][:count]
    ours = merge(deltas, weights, "ties", density)
    torch.testing.assert_close(
        ours.dense(), published_ties([d.dense() for d in deltas], weights, density), rtol=0, atol=1e-7
    )


def test_one_shard_merges_into_itself_and_a_lone_entry_is_kept_whole():
    alone = sparse(0)
    assert torch.equal(merge([alone], [1.0]).dense(), alone.dense())
    a = SparseDelta.from_dense(torch.tensor([[1.0, 0.0, 2.0, 3.0]]))
    b = SparseDelta.from_dense(torch.tensor([[0.0, 5.0, 4.0, -1.0]]))
    assert merge([a, b], [0.5, 0.5]).dense().tolist() == [[1.0, 5.0, 3.0, 3.0]]
    assert merge([a, b], [0.5, 0.5], "sign").dense().tolist() == [[1.0, 5.0, 3.0, 3.0]]
    assert merge([a, b], [0.5, 0.5], "linear").dense().tolist() == [[0.5, 2.5, 3.0, 1.0]]


def test_dare_keeps_a_part_and_its_expectation():
    ones = SparseDelta.from_dense(torch.ones(100, 100))
    merged = merge([ones, ones], [0.5, 0.5], "dare", 0.25, torch.Generator().manual_seed(0)).dense()
    assert set(merged.unique().tolist()) == {0.0, 2.0, 4.0}
    assert float(merged.mean()) == pytest.approx(1.0, abs=0.05)


def test_deltas_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        merge([sparse(0), sparse(1, (5, 7))], [0.5, 0.5])
    with pytest.raises(ValueError, match="one shape"):
        merge([], [])


@given(st.lists(st.lists(st.floats(0, 4), min_size=3, max_size=3), min_size=1, max_size=6))
def test_the_best_memory_above_its_own_threshold_answers(rows):
    limits = [1.0, 2.0, math.inf]
    for row, found in zip(rows, choose(torch.tensor(rows), limits), strict=True):
        row = torch.tensor(row).tolist()
        passing = {k: v for k, v in enumerate(row) if v > limits[k]}
        assert found == (max(passing, key=lambda k: (passing[k], -k)) if passing else -1)


@pytest.mark.parametrize(("length", "expected"), [(100, "mean"), (101, "max")])
def test_the_published_statistic_changes_above_a_hundred_tokens(length, expected):
    change = torch.randn(2, length, 5, generator=torch.Generator().manual_seed(length))
    base = torch.randn(2, length, 5, generator=torch.Generator().manual_seed(0))
    published = Router(1.0, torch.nn.functional.silu, compat=True)
    assert torch.equal(published.read(change, None), change)
    sizes = change_sizes(change, base, published.activation)
    by_hand = (torch.nn.functional.silu(base + change) - torch.nn.functional.silu(base)).square().sum(-1).sqrt()
    torch.testing.assert_close(sizes, by_hand, rtol=0, atol=1e-6)
    found = published.statistic(sizes)
    torch.testing.assert_close(found, by_hand.mean(1) if expected == "mean" else by_hand.amax(1), rtol=0, atol=1e-6)


def test_ours_reads_the_last_token_of_the_prompt_alone():
    values = torch.arange(24.0).view(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 0]])
    router = Router(1.0)
    assert router.read(values, mask).tolist() == [[[2.0, 3.0]], [[14.0, 15.0]], [[20.0, 21.0]]]
    assert torch.equal(router.read(values, None), values[:, -1:])
    assert router.statistic(torch.tensor([[5.0]])).tolist() == [5.0]
