"""What a memory says to other prompts is left alone while it learns: the projection, the mask, whole edits."""

from __future__ import annotations

import pytest
import torch
from wise_models import edited, quick, record, tiny

from clkit.checkpoint import pack, unpack
from clkit.strategies.wise.core import Wise
from clkit.strategies.wise.protect import Protection


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_step_is_the_masked_ridge_solution_of_each_row():
    others, own, gradient = drawn(5, 48), drawn(48, seed=1), drawn(6, 48, seed=2)
    mask = torch.rand(6, 48, generator=torch.Generator().manual_seed(3)) < 0.5
    step = Protection(others, own, 2.0, 30.0).step(gradient, mask)
    for row, kept, g in zip(step, mask, gradient, strict=True):
        k = others[:, kept]
        wanted = torch.linalg.solve(torch.eye(int(kept.sum())) + 15.0 * k.T @ k, g[kept])
        torch.testing.assert_close(
            row[kept] / step.norm(), wanted / step.norm() * _longer(step, others, mask, gradient)
        )
        assert not bool(row[~kept].any())
    assert float((step @ own).norm()) == pytest.approx(float(((gradient * mask) @ own).norm()), rel=1e-4)


def _longer(step, others, mask, gradient):
    """By what all rows were made longer."""
    rows = []
    for kept, g in zip(mask, gradient, strict=True):
        k = others[:, kept]
        rows.append(torch.linalg.solve(torch.eye(int(kept.sum())) + 15.0 * k.T @ k, g[kept]).norm())
    return step.norm() / torch.stack(rows).norm()


def test_many_other_readings_hardly_move_and_the_edits_own_do():
    shared = drawn(1, 1024, seed=4)  # as activations at the last token of a template are
    others, own = shared + 0.8 * drawn(200, 1024), shared[0] + 0.8 * drawn(1024, seed=1)
    gradient = drawn(16, 1, seed=2) * own
    mask = torch.rand(16, 1024, generator=torch.Generator().manual_seed(3)) < 0.2
    size = float(own.square().sum())
    step = Protection(others, own, size, 30.0).step(gradient, mask)
    plain = Protection(others, own, size, 0.0).step(gradient, mask)
    assert torch.equal(plain, gradient * mask) and not bool(step[~mask].any())
    assert float((step @ others.T).norm()) < 0.2 * float((plain @ others.T).norm())
    assert float((step @ own).norm()) == pytest.approx(float((plain @ own).norm()), rel=1e-4)


def test_a_further_edit_changes_less_of_what_the_first_one_says():
    moved = {}
    for keep in (0.0, 30.0):
        wise = Wise(tiny(), quick(keep=keep, steps=15, mask_ratio=0.5))
        wise.learn(record(0))
        before = wise.said("e0") @ wise.layer.all()[0].matrix.T
        wise.learn(record(1))
        now = wise.said("e0") @ wise.layer.all()[0].matrix.T
        moved[keep] = float((now - before).norm() / before.norm())
        learned = wise.said("e1") @ wise.layer.all()[0].matrix.T
        assert float(learned.norm()) > 0.5 * float(now.norm())  # it was learned all the same
    assert moved[30.0] < 0.7 * moved[0.0]


def test_what_is_left_alone_is_the_same_after_loading():
    whole = edited(1)
    again = Wise(tiny(), quick())
    again.load_state_dict(unpack(*pack(whole.state_dict())))
    for wise in (whole, again):
        wise.learn(record(1))
    assert torch.equal(whole.layer.all()[0].matrix, again.layer.all()[0].matrix)


def test_a_memory_changes_nothing_before_the_end_of_the_prompt():
    wise = edited(2)
    read = {}
    hook = wise.location.projection.register_forward_hook(
        lambda m, args, out: read.__setitem__("now", out), prepend=False
    )
    ids = torch.tensor([wise.model.tokenizer("Town of 1? ").input_ids])
    wise.model.module(input_ids=ids)
    edited_output = read["now"]
    with wise.router.switched_off():
        wise.model.module(input_ids=ids)
    hook.remove()
    same = (edited_output == read["now"]).all(dim=-1)[0]
    assert bool(same[:-1].all()) and not bool(same[-1])
