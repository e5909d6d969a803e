"""Gathering under ZeRO: whole on every process after each update, and what is written stays written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sometimes_worker
import torch
import torch.nn.functional as F
from processes import talk
from torch import nn

SPLIT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def by_hand() -> list[list[float]]:
    """Plain gradient descent on the sum of the loss and 0.005 ||W||^2 of the first matrix."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x, y = torch.arange(10.0).view(2, 5) / 10, torch.tensor([0, 2])
    found = []
    for _ in range(4):
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]).tolist())
        loss = F.cross_entropy(net(x), y) + 0.005 * net[0].weight.square().sum()
        for p, g in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True):
            p.data -= 0.1 * g
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_every_process_gathers_the_same_after_each_update_and_writes_last(tmp_path, stage):
    (tmp_path / "split.json").write_text(json.dumps(SPLIT_ALL))
    first, second = talk("gather_worker.py", [stage, str(tmp_path / "split.json")], 2)
    expected = by_hand()
    for step in range(4):
        assert first["weights"][step] == second["weights"][step]
        assert first["weights"][step] == pytest.approx(expected[step], abs=1e-6)
    assert first["refused"] == "parameters that are gathered for reading can't be written"
    if stage == 3:
        assert first["split"] == second["split"] == [0, 0, 0], "outside the context nothing is whole"
        assert first["written"] == second["written"] == [0.5] * 35
        assert first["after a step of 0"] == second["after a step of 0"] == [0.5] * 35


@pytest.mark.slow
def test_a_parameter_without_a_gradient_in_a_step_gets_no_earlier_one_and_none_of_a_pass_is_lost():
    """By torch itself: a layer that some steps, or some passes of a step, leave out, and a penalty on all weights."""
    net, x, y = sometimes_worker.data()
    expected = []
    for passes in sometimes_worker.STEPS:
        losses = []
        for net.used in passes:
            losses.append(F.cross_entropy(net(x), y) / len(passes))
        gradients = torch.autograd.grad(torch.stack(losses).sum(), list(net.parameters()), allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                whole = sometimes_worker.PULL * parameter + (0 if gradient is None else gradient)
                parameter -= sometimes_worker.RATE * whole
        expected.append(torch.cat([p.detach().flatten() for p in net.parameters()]).tolist())
    cases = [(0, "none"), (1, "cpu"), (2, "none"), (2, "cpu"), (3, "none"), (3, "cpu")]
    for found in talk("sometimes_worker.py", cases, 2):
        for case, weights in zip(cases, found, strict=True):
            np.testing.assert_allclose(weights, expected, atol=1e-5, err_msg=str(case))
