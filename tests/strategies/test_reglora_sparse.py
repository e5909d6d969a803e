"""The sparse penalty, the exact selection and the masks of RegLoRA against dense expressions and published numbers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from clkit.strategies.reglora import Pattern, masked_l1, top_entries
from clkit.strategies.reglora.masks import extend, from_state, stored_bytes, to_state
from clkit.strategies.reglora.sparse import Mask, dense_penalty, penalty
from clkit.strategies.reglora.top import random_entries


def factors(m, n, r, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, r, generator=generator, dtype=dtype), torch.randn(r, n, generator=generator, dtype=dtype)


def published(B, A, rows, cols):
    """The expression of the published code and its gradients by autograd."""
    B, A = B.clone().requires_grad_(), A.clone().requires_grad_()
    loss = (B @ A)[rows, cols].abs().mean()
    loss.backward()
    return loss.detach(), B.grad, A.grad


def lists(m, n, r, tasks):
    """Key lists of similar tasks, so that positions repeat."""
    B, A = factors(m, n, r)
    found = []
    for t in range(tasks):
        extra_b, extra_a = factors(m, n, r, seed=t + 1)
        found.append(top_entries(B + 0.3 * extra_b, A + 0.3 * extra_a, 0.1))
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_loss_and_gradients_equal_the_dense_expression_also_with_repeated_positions(tasks):
    rows, cols = lists(30, 45, 4, tasks)
    distinct = len((rows * 45 + cols).unique())
    assert tasks == 1 or distinct < len(rows)
    B, A = factors(30, 45, 4, seed=9)
    for ours, theirs in zip(masked_l1(B, A, (rows, cols)), published(B, A, rows, cols), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_rank_too_wide_for_the_cache_is_worked_on_in_parts_with_the_same_result(monkeypatch):
    monkeypatch.setattr("clkit.strategies.reglora.sparse._CACHED", 1)
    rows, cols = lists(40, 50, 4, 2)
    B, A = factors(40, 50, 37)
    for ours, theirs in zip(masked_l1(B, A, (rows, cols)), published(B, A, rows, cols), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-13)


def test_every_form_of_a_pattern_gives_the_same():
    rows, cols = lists(20, 33, 3, 1)
    B, A = factors(20, 33, 3, seed=2)
    wanted = published(B, A, rows, cols)
    pattern = Pattern.of((rows * 33 + cols).sort().values, (20, 33))
    forms = [
        pattern,
        torch.stack([rows, cols], 1),
        pattern.matrix(torch.ones(len(rows))),
        torch.sparse_coo_tensor(torch.stack([rows, cols]), torch.zeros(len(rows)), (20, 33), check_invariants=True),
    ]
    for form in forms:
        for ours, theirs in zip(masked_l1(B, A, form), wanted, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_multiplicity_counts_as_often_as_the_position_stood_in_the_list():
    rows, cols = lists(24, 18, 2, 1)
    counts = torch.arange(len(rows)) % 3 + 1
    B, A = factors(24, 18, 2, seed=5)
    wanted = published(B, A, rows.repeat_interleave(counts), cols.repeat_interleave(counts))
    for ours, theirs in zip(masked_l1(B, A, (rows, cols), counts), wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_float32_agrees_to_its_precision_and_half_precision_is_computed_in_float32():
    rows, cols = lists(30, 45, 4, 2)
    B, A = factors(30, 45, 4, seed=9, dtype=torch.float32)
    for ours, theirs in zip(masked_l1(B, A, (rows, cols)), published(B, A, rows, cols), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    half = masked_l1(B.bfloat16(), A.bfloat16(), (rows, cols))
    assert [x.dtype for x in half] == [torch.float32, torch.bfloat16, torch.bfloat16]
    whole = masked_l1(B.bfloat16().float(), A.bfloat16().float(), (rows, cols))
    assert torch.equal(half[0], whole[0]) and torch.equal(half[1], whole[1].bfloat16())


def test_a_fresh_adapter_is_not_pulled_and_an_empty_pattern_gives_zero():
    rows, cols = lists(30, 45, 4, 2)
    B, A = factors(30, 45, 4)
    for value in masked_l1(torch.zeros_like(B), A, (rows, cols)):
        assert torch.equal(value, torch.zeros_like(value))
    none = torch.empty(0, dtype=torch.long)
    for value, like in zip(masked_l1(B, A, (none, none)), (B.new_zeros(()), B, A), strict=True):
        assert torch.equal(value, torch.zeros_like(like))


def test_gradients_are_the_derivative_of_the_loss():
    rows, cols = lists(12, 10, 2, 2)
    B, A = factors(12, 10, 2, seed=4)
    mask = Mask.of((rows, cols), (12, 10))
    for norm in ("l1", "l2"):
        for reduction in ("mean", "sum"):
            _, d_b, d_a = penalty(B, A, mask, norm, reduction)
            for x, gradient in ((B, d_b), (A, d_a)):
                step = torch.zeros_like(x)
                step[1, 1] = 1e-6
                pair = [(B + s * step, A) if x is B else (B, A + s * step) for s in (1, -1)]
                up, down = (penalty(*p, mask, norm, reduction)[0] for p in pair)
                assert torch.isclose((up - down) / 2e-6, gradient[1, 1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_penalty_on_all_entries_equals_the_sparse_one_on_the_full_pattern(norm, reduction, monkeypatch):
    monkeypatch.setattr("clkit.strategies.reglora.sparse._BLOCK", 50)  # several blocks of rows
    B, A = factors(17, 23, 3)
    full = Mask.of(Pattern.of(torch.arange(17 * 23), (17, 23)), (17, 23))
    for dense, sparse in zip(dense_penalty(B, A, norm, reduction), penalty(B, A, full, norm, reduction), strict=True):
        assert torch.allclose(dense, sparse, rtol=1e-12, atol=1e-13)


def test_positions_outside_the_matrix_and_wrong_sizes_are_refused():
    B, A = factors(4, 5, 2)
    with pytest.raises(ValueError, match="outside the 4 x 5 matrix"):
        masked_l1(B, A, (torch.tensor([4]), torch.tensor([0])))
    with pytest.raises(ValueError, match="2 multiplicities for 1 positions"):
        masked_l1(B, A, (torch.tensor([1]), torch.tensor([0])), torch.ones(2))
    with pytest.raises(ValueError, match="does not fit"):
        masked_l1(B, A, Pattern.of(torch.tensor([0]), (5, 5)))


def test_no_warning_about_sparse_tensors_reaches_the_user():
    B, A = factors(4, 5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, _, _ = masked_l1(B, A, (torch.tensor([1]), torch.tensor([0])))
    assert float(loss) == pytest.approx(float((B @ A)[1, 0].abs()))


# --- selection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "fraction"), [(300, 200, 0.02), (64, 48, 0.5), (7, 5, 0.02), (29, 50, 0.02), (40, 30, 1.0)]
)
@pytest.mark.parametrize("block", [97, 1 << 20])
def test_the_chosen_entries_are_the_largest_of_the_whole_matrix(m, n, fraction, block, monkeypatch):
    monkeypatch.setattr("clkit.strategies.reglora.top._BLOCK", block)
    B, A = factors(m, n, 4)
    rows, cols = top_entries(B, A, fraction)
    values, wanted = (B @ A).abs().float().flatten().topk(int(fraction * m * n))
    assert torch.equal((rows * n + cols).sort().values, wanted.sort().values)
    assert torch.equal((B @ A).abs().float()[rows, cols], values)  # largest first


def test_of_equal_entries_the_first_in_row_major_order_wins(monkeypatch):
    monkeypatch.setattr("clkit.strategies.reglora.top._BLOCK", 10)
    B, A = torch.ones(8, 1), torch.ones(1, 10)
    rows, cols = top_entries(B, A, 0.3)
    assert (rows * 10 + cols).tolist() == list(range(24))
    B[5] = -2
    rows, cols = top_entries(B, A, 0.15)
    assert (rows * 10 + cols).tolist() == [*range(50, 60), 0, 1]


def test_the_selection_never_holds_the_dense_product(monkeypatch):
    monkeypatch.setattr("clkit.strategies.reglora.top._BLOCK", 1 << 12)
    largest = 0
    plain = torch.Tensor.abs

    def watched(self):
        nonlocal largest
        largest = max(largest, self.numel())
        return plain(self)

    monkeypatch.setattr(torch.Tensor, "abs", watched)
    B, A = factors(512, 256, 4, dtype=torch.float32)
    assert len(top_entries(B, A, 0.02)[0]) == int(0.02 * 512 * 256)
    assert 0 < largest <= 1 << 12


def test_random_entries_are_as_many_distinct_and_follow_the_generator():
    def draw(seed):
        rows, cols = random_entries((40, 30), 0.1, torch.Generator().manual_seed(seed))
        return (rows * 30 + cols).tolist()

    assert len(set(draw(0))) == 120 and max(draw(0)) < 1200
    assert draw(0) == draw(0) != draw(1)
    hits = torch.zeros(1200)
    for seed in range(200):
        hits[draw(seed)] += 1
    assert hits.view(40, 30).sum(1).std() / hits.view(40, 30).sum(1).mean() < 0.1  # no row is preferred


# --- masks ----------------------------------------------------------------------------------------------------------


def masks(accumulate, tasks=3, shape=(30, 45)):
    mask, listed = None, []
    for t in range(tasks):
        B, A = factors(*shape, 4)
        more = factors(*shape, 4, seed=t + 1)
        rows, cols = top_entries(B + 0.3 * more[0], A + 0.3 * more[1], 0.1)
        mask = extend(mask, rows, cols, shape, accumulate)
        listed.append(rows * shape[1] + cols)
    return mask, torch.cat(listed)


def test_concat_keeps_how_often_a_position_was_chosen_and_union_does_not():
    mask, listed = masks("concat")
    distinct, counts = listed.unique(return_counts=True)
    assert torch.equal(mask.pattern.flat(), distinct)
    assert torch.equal(mask.multiplicity.long(), counts) and mask.total == len(listed)
    union, _ = masks("union")
    assert torch.equal(union.pattern.flat(), distinct)
    assert union.multiplicity is None and union.total == len(distinct)


def test_without_overlap_concat_equals_union_and_an_entry_weighs_one_over_the_number_of_tasks():
    one, two = torch.tensor([0, 1]), torch.tensor([2, 3])
    zero = torch.zeros(2, dtype=torch.long)
    concat = extend(extend(None, zero, one, (4, 4), "concat"), zero, two, (4, 4), "concat")
    union = extend(extend(None, zero, one, (4, 4), "union"), zero, two, (4, 4), "union")
    assert torch.equal(concat.pattern.flat(), union.pattern.flat()) and concat.multiplicity is None
    B, A = torch.ones(4, 1), torch.ones(1, 4)
    assert penalty(B, A, concat)[1][0, 0] == 1.0  # four of four entries in row 0
    alone = extend(None, zero, one, (4, 4), "concat")
    assert penalty(B, A, alone)[2][0, 0] == 2 * penalty(B, A, concat)[2][0, 0]


@pytest.mark.parametrize("accumulate", ["concat", "union"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_masks_survive_storage_exactly(accumulate, tasks):
    mask, _ = masks(accumulate, tasks)
    state = to_state(mask)
    back = from_state(state, torch.device("cpu"))
    assert torch.equal(back.pattern.crow, mask.pattern.crow) and torch.equal(back.pattern.col, mask.pattern.col)
    assert back.total == mask.total
    if mask.multiplicity is None:
        assert back.multiplicity is None
    else:
        assert torch.equal(back.multiplicity, mask.multiplicity)
    assert {t.dtype for t in state.values() if isinstance(t, torch.Tensor)} <= {torch.int32, torch.uint8}
    # Above about 3 % one bit per entry is less than 32 bits per chosen one; with multiplicities bits do not do.
    assert ("bits" in state) == (mask.multiplicity is None)


def test_stored_masks_take_at_most_a_third_of_int64_pairs():
    shape, listed, mask = (576, 576), 0, None
    for t in range(3):
        rows, cols = top_entries(*factors(*shape, 4, seed=t, dtype=torch.float32), 0.02)
        mask = extend(mask, rows, cols, shape, "concat")
        listed += len(rows)
        assert stored_bytes(mask) <= 16 * listed / 3


# --- the published implementation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(data_root):
    path = data_root.parent / "golden" / "reglora" / "reglora.npz"
    if not path.is_file():
        pytest.skip(f"no golden numbers at {path}")
    return np.load(path)


def tensors(golden, key):
    return tuple(torch.from_numpy(golden[f"{key}/{x}"]) for x in "BA")


@pytest.mark.parametrize(("tag", "fraction"), [("top02", 0.02), ("top10", 0.1)])
def test_key_sets_equal_the_published_scripts_in_order(golden, tag, fraction):
    for linear in golden["linears"]:
        for t in (1, 2, 3):
            pairs = torch.stack(top_entries(*tensors(golden, f"{linear}/task{t}"), fraction), 1)
            np.testing.assert_array_equal(pairs.numpy(), golden[f"{linear}/task{t}/{tag}/new"])


@pytest.mark.parametrize("tag", ["top02", "top10"])
def test_loss_and_gradients_equal_the_published_ones_after_one_two_and_three_tasks(golden, tag):
    for t in (2, 3, 4):
        total = 0.0
        for linear in golden["linears"]:
            shape, mask = tuple(golden[f"{linear}/shape_out_in"].tolist()), None
            for past in range(1, t):
                rows, cols = torch.from_numpy(golden[f"{linear}/task{past}/{tag}/new"]).long().unbind(1)
                mask = extend(mask, rows, cols, shape, "concat")
            loss, d_b, d_a = penalty(*tensors(golden, f"{linear}/task{t}"), mask)
            total += float(loss)
            key, divisor = f"{linear}/task{t}/{tag}", int(golden["divisor_in_reference"])
            assert float(loss) == pytest.approx(float(golden[f"{key}/mean_abs"]), rel=1e-12)
            np.testing.assert_allclose(d_b.numpy() / divisor, golden[f"{key}/dB"], rtol=1e-12, atol=1e-15)
            np.testing.assert_allclose(d_a.numpy() / divisor, golden[f"{key}/dA"], rtol=1e-12, atol=1e-15)
        assert total / 224 == pytest.approx(float(golden[f"task{t}/{tag}/L_reg"]), rel=1e-12)


def test_the_number_of_keys_follows_the_published_expression(golden):
    for (m, n), k02, k10 in zip(
        golden["k_table/shape"].tolist(), golden["k_table/k_top02"], golden["k_table/k_top10"], strict=True
    ):
        if m * n > 1 << 21:
            assert int(0.02 * m * n) == k02 and int(0.1 * m * n) == k10
            continue
        B, A = torch.ones(m, 1), torch.ones(1, n)
        assert len(top_entries(B, A, 0.02)[0]) == k02 and len(top_entries(B, A, 0.1)[0]) == k10
