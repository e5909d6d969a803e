"""The bottleneck's own properties: keys, reading, training, votes, the usage mask, growth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit.strategies.dkvb.bottleneck import Bottleneck
from clkit.strategies.dkvb.config import DKVBConfig
from clkit.strategies.dkvb.index import nearest
from clkit.strategies.dkvb.keys import KeyAverages, lloyd, place_keys, start_normal, start_sample, with_masses
from clkit.strategies.dkvb.values import bag_sum


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def head_of(classes=5, width=12, **options):
    sizes = {"heads": 4, "pairs": 16, "key_dim": 3, **options}
    head = Bottleneck(DKVBConfig(**sizes), width, classes, seed=0)
    head.place(torch.randn(head.keys.shape, generator=gen(1)))
    return head


# --- the search ---------------------------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 70), st.integers(1, 5), st.integers(0, 99))
def test_the_search_finds_the_smallest_distance(n, heads, pairs, width, seed):
    queries = torch.randn(n, heads, width, generator=gen(seed), dtype=torch.float64)
    keys = torch.randn(heads, pairs, width, generator=gen(seed + 1), dtype=torch.float64)
    distances = (queries.unsqueeze(2) - keys).square().sum(3)
    assert torch.equal(nearest(queries, keys).squeeze(2).long(), distances.argmin(2))
    count = min(3, pairs)
    assert torch.equal(nearest(queries, keys, top_k=count).long(), distances.argsort(dim=2, stable=True)[:, :, :count])
    allowed = torch.rand(heads, pairs, generator=gen(seed)) < 0.5
    masked = distances.masked_fill(~allowed, torch.inf).argmin(2)
    assert torch.equal(nearest(queries, keys, allowed=allowed).squeeze(2).long(), masked)


def test_the_first_of_equal_keys_is_taken():
    keys = torch.ones(2, 300, 3)
    assert nearest(torch.zeros(700, 2, 3), keys).abs().sum() == 0


# --- keys ---------------------------------------------------------------------------------------------------------------
def test_a_replaced_key_starts_anew_and_no_query_is_drawn_twice():
    queries = torch.randn(20, 3, 2, generator=gen())
    averages = with_masses(torch.full((3, 8, 2), 9.0), torch.tensor([[0.0] * 5 + [2.0] * 3] * 3))
    averages.replace_dead(queries, 0.5, gen())
    assert (averages.keys[:, 5:] == 9).all() and (averages.masses[:, 5:] == 2).all()
    for c in range(3):
        rows = [(queries[:, c] == key).all(1).nonzero().item() for key in averages.keys[c, :5]]
        assert len(set(rows)) == 5
    assert torch.equal(averages.sums[:, :5], averages.keys[:, :5] * averages.masses[:, :5].unsqueeze(2))
    assert (averages.masses[:, :5] == 20 / 8).all()
    before = averages.keys[:, :5].clone()
    averages.step(queries[:0], 0.95)  # nothing is hit: nothing may move
    assert torch.allclose(averages.keys[:, :5], before, rtol=1e-4)


def test_where_more_keys_are_dead_than_there_are_queries_the_emptiest_go_first():
    averages = with_masses(torch.full((1, 6, 2), 9.0), torch.tensor([[0.3, 0.1, 5.0, 0.0, 0.2, 0.4]]))
    averages.replace_dead(torch.zeros(2, 1, 2), 0.5, gen())
    assert (averages.keys[0, :, 0] == 0).tolist() == [False, True, False, True, False, False]


def test_keys_of_the_default_way_are_distinct_and_used_where_the_published_way_wastes_them():
    queries = torch.randn(400, 4, 5, generator=gen())
    options = {"heads": 4, "pairs": 256, "key_dim": 5, "key_batch": 64}
    used, distinct = {}, {}
    for compat in (False, True):
        keys = place_keys(queries, DKVBConfig(**options, compat=compat), gen(3))
        index = nearest(queries, keys).squeeze(2)
        used[compat] = sum(len(index[:, c].unique()) for c in range(4)) / (4 * 256)
        distinct[compat] = sum(len(k.unique(dim=0)) for k in keys) / (4 * 256)
    assert distinct[False] == 1.0
    assert distinct[True] < 0.95
    assert used[False] > used[True] + 0.05


def test_fewer_inputs_than_keys_are_filled_up_with_draws_of_their_spread():
    queries = 3 + 0.1 * torch.randn(10, 2, 3, generator=gen())
    averages = start_sample(queries, 200, 10, gen())
    assert averages.keys.shape == (2, 200, 3)
    assert 2.9 < averages.keys.mean() < 3.1 and averages.keys.std() < 0.2
    assert all(len(k.unique(dim=0)) == 200 for k in averages.keys)


def test_a_step_after_k_means_does_not_shrink_the_keys():
    queries = 5 + torch.randn(300, 3, 4, generator=gen())
    means, sizes = lloyd(queries, start_sample(queries, 12, 64, gen()).keys, 10, gen())
    averages = with_masses(means, sizes * (64 / 300))
    before = averages.keys.norm(dim=2).mean()
    averages.step(queries[:64], 0.95)
    assert averages.keys.norm(dim=2).mean() / before == pytest.approx(1, abs=0.03)


def test_k_means_lowers_its_error_and_leaves_no_cluster_empty():
    queries = torch.randn(300, 2, 2, generator=gen())
    start = torch.cat([queries[:6].transpose(0, 1), torch.full((2, 6, 2), 50.0)], dim=1)  # six that nothing is near to

    def error(means):
        return (queries.unsqueeze(2) - means).square().sum(3).min(2).values.mean()

    means, sizes = lloyd(queries, start, 12, gen())
    assert (sizes > 0).all() and sizes.sum(1).tolist() == [300, 300]
    assert error(means) < 0.7 * error(start)
    assert (lloyd(queries, start, 12)[1] == 0).sum() == 12


def test_a_key_that_is_never_hit_leaves_for_infinity_in_the_published_way_only():
    queries = torch.randn(32, 1, 2, generator=gen())
    published = start_normal(queries, 64, gen())
    published.step(queries, 0.95)
    assert published.keys.abs().max() > 1e3
    ours = start_sample(queries, 64, 32, gen())
    ours.step(queries, 0.95)
    assert ours.keys.abs().max() < 10


# --- reading ------------------------------------------------------------------------------------------------------------
def test_the_gradient_of_a_bag_is_exact():
    values = torch.randn(7, 3, dtype=torch.float64, generator=gen(), requires_grad=True)
    slots = torch.tensor([0, 2, 2, 5, 6, 0, 1])
    offsets, scale = torch.tensor([0, 3, 3, 4]), torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: bag_sum(v, slots, offsets, scale), (values,))


@pytest.mark.parametrize("decoder", ["voting", "linear", "mlp"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_reading_equals_a_plain_lookup(decoder, top_k):
    head = head_of(decoder=decoder, top_k=top_k, tokens=True)
    head.values.data.normal_(generator=gen())
    pairs = head.lookup(torch.randn(6, 12, generator=gen())).view(2, 3, -1)
    pairs[1, 2] = -1  # a row with two tokens
    rows = []
    for b, count in enumerate((3, 2)):
        index = pairs[b, :count].long().view(count, 4, top_k)
        read = head.values[torch.arange(4).view(1, 4, 1), index].sum(2).mean(0)  # over keys, then tokens
        rows.append(read.mean(0) if head.decoder is None else head.decoder(read.flatten()))
    logits = head(pairs)
    assert torch.allclose(logits, torch.stack(rows), atol=1e-6)
    logits.square().sum().backward()
    ours, head.values.grad = head.values.grad, None
    torch.stack(rows).square().sum().backward()
    assert torch.allclose(ours, head.values.grad, atol=1e-5)


def test_nothing_but_what_was_read_has_a_gradient():
    head = head_of()
    pairs = head.lookup(torch.randn(3, 12, generator=gen()))
    F.cross_entropy(head(pairs), torch.tensor([0, 1, 2])).backward()
    read = torch.zeros(4, 16, dtype=torch.bool)
    read[torch.arange(4), pairs.long()] = True
    assert torch.equal(head.values.grad.abs().sum(2) > 0, read)
    assert {name for name, p in head.named_parameters() if p.requires_grad} == {"values"}


def test_training_on_cached_pairs_is_training_with_a_search_in_every_step():
    """Twenty steps of SGD against distances, argmin and autograd's own indexing."""
    head = head_of(classes=6, width=20)
    x, y = torch.randn(400, 20, generator=gen()), torch.randint(6, (400,), generator=gen())
    cached = head.lookup(x)
    plain = torch.zeros_like(head.values).requires_grad_()
    ours, theirs = torch.optim.SGD([head.values], lr=3.0), torch.optim.SGD([plain], lr=3.0)
    for step in range(20):
        rows = torch.randperm(400, generator=gen(step))[:50]
        queries = torch.einsum("bd,cdk->bck", x[rows], head.projection)
        index = (queries.unsqueeze(2) - head.keys).square().sum(3).argmin(2)
        losses = []
        for optimizer, logits in (
            (ours, head(cached[rows])),
            (theirs, plain[torch.arange(4), index].mean(1)),
        ):
            optimizer.zero_grad()
            loss = F.cross_entropy(logits, y[rows], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert (head.values - plain).abs().max() < 1e-6
    assert plain.detach().abs().max() > 0.1


# --- votes and the linear regime ----------------------------------------------------------------------------------------
def trained(head, x, y, lr, order):
    head.values.data.zero_()
    optimizer = torch.optim.SGD([head.values], lr=lr)
    pairs = head.lookup(x)
    for rows in torch.split(order, 40):
        optimizer.zero_grad()
        F.cross_entropy(head(pairs[rows]), y[rows], label_smoothing=0.1).backward()
        optimizer.step()
    return head.values.detach().clone()


def blobs():
    y = torch.arange(200) % 5
    x = F.one_hot(y, 12) * 2.0 + torch.randn(200, 12, generator=gen())
    return x, y


def test_in_the_limit_of_small_steps_training_is_counting():
    x, y = blobs()
    head, votes = head_of(), head_of(decoder="votes")
    votes.vote(votes.lookup(x), y)
    trained(head, x, y, 1e-4, torch.arange(200))
    ours, theirs = head(head.lookup(x)), votes(votes.lookup(x))
    best = theirs.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-3
    assert clear.float().mean() > 0.9
    assert torch.equal(ours.argmax(1)[clear], theirs.argmax(1)[clear])


def test_the_order_of_the_tasks_matters_to_second_order_in_the_step():
    x, y = blobs()
    by_class, reverse = y.argsort(stable=True), y.argsort(stable=True).flip(0)
    gaps = []
    for lr in (0.4, 0.04):
        head = head_of()
        a, b = trained(head, x, y, lr, by_class), trained(head, x, y, lr, reverse)
        gaps.append(float((a - b).abs().max() / a.abs().max()))
    assert gaps[0] > 1e-5, "the order would not matter at all"
    assert gaps[1] < 0.2 * gaps[0]


def test_votes_count_classes_exactly_in_any_order():
    x, y = blobs()
    tables = []
    for order in (torch.arange(200), y.argsort(stable=True), torch.randperm(200, generator=gen())):
        head = head_of(decoder="votes")
        for rows in torch.split(order, 33):
            head.vote(head.lookup(x[rows]), y[rows])
        tables.append(head.values)
    assert torch.equal(tables[0], tables[1]) and torch.equal(tables[0], tables[2])
    expected = torch.zeros_like(tables[0])
    for row, label in zip(head.lookup(x).long(), y, strict=True):
        expected[torch.arange(4), row, label] += 1
    assert torch.equal(tables[0], expected)
    assert not tables[0].requires_grad


def test_log_votes_are_mean_logarithms_of_smoothed_shares():
    x, y = blobs()
    head = head_of(decoder="votes", vote_scale="log", smoothing=0.5)
    head.vote(head.lookup(x), y)
    pairs = head.lookup(x[:7])
    counts = head.values[torch.arange(4), pairs.long()] + 0.5
    assert torch.allclose(head(pairs), (counts / counts.sum(2, keepdim=True)).log().mean(1))


# --- growing ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("decoder", ["voting", "votes", "linear", "mlp"])
def test_a_label_space_that_grows_at_once_is_one_that_was_wide_from_the_start(decoder):
    x, y = blobs()
    grown, wide = head_of(classes=3, decoder=decoder), head_of(classes=5, decoder=decoder)
    grown.adapt(5)
    for head in (grown, wide):
        if decoder == "votes":
            head.vote(head.lookup(x), y)
        else:
            trained(head, x, y, 0.5, torch.arange(200))
    assert torch.equal(grown.values, wide.values)
    assert torch.equal(grown(grown.lookup(x)), wide(wide.lookup(x)))


@pytest.mark.parametrize("decoder", ["voting", "votes", "linear"])
def test_growing_changes_nothing_that_was_learned(decoder):
    x, y = blobs()
    head = head_of(classes=5, decoder=decoder)
    if decoder == "votes":
        head.vote(head.lookup(x), y)
    else:
        trained(head, x, y, 0.5, torch.arange(200))
    before = head(head.lookup(x)).detach()
    head.adapt(8)
    after = head(head.lookup(x)).detach()
    assert torch.allclose(after[:, :5], before, rtol=0, atol=1e-7) and after.shape == (200, 8)
    if decoder != "linear":
        assert (after[:, 5:] == 0).all()
    with pytest.raises(ValueError, match="can't drop classes"):
        head.adapt(7)


def test_keys_have_no_gradient_and_are_part_of_the_state():
    head = head_of()
    state = {name: value.clone() for name, value in head.state_dict().items()}
    assert {"keys", "projection", "usage", "placed", "values"} <= set(state)
    other = Bottleneck(head.config, 12, 5, seed=9)
    assert not other.placed
    other.load_state_dict(state)
    assert other.placed and torch.equal(other.keys, head.keys) and torch.equal(other.projection, head.projection)


def test_averages_are_those_of_their_definition():
    keys = torch.tensor([[[0.0], [10.0]]])
    averages = KeyAverages(keys.clone(), keys * 2, torch.full((1, 2), 2.0))
    index = averages.step(torch.tensor([[[1.0]], [[3.0]], [[8.0]]]), 0.5)
    assert index.flatten().tolist() == [0, 0, 1]
    assert averages.masses.tolist() == [[2.0, 1.5]]
    assert averages.sums.flatten().tolist() == [2.0, 14.0]
    assert torch.allclose(averages.keys.flatten(), torch.tensor([1.0, 14 / 1.5]), rtol=1e-4)
