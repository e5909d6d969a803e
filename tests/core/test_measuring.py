"""The measuring part of the benchmarks: order, ratios, peak memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def measuring(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "benchmarks"))
    import measuring

    yield measuring
    sys.modules.pop("measuring")


def test_each_round_runs_all_variants_and_begins_with_another_and_the_first_is_dropped(measuring):
    seen = []
    times = measuring.in_turn({name: lambda name=name: seen.append(name) for name in "abc"}, 3)
    assert "".join(seen) == "abcbcacababc"
    assert times.keys() == {"wall", "CPU"}
    assert all(len(taken) == 3 for clock in times.values() for taken in clock.values())


def test_a_ratio_pairs_times_of_the_same_round(measuring):
    times = {"CPU": {"a": [1.0, 2.0, 9.0, 4.0], "unit": [1.0, 1.0, 3.0, 4.0]}}
    assert measuring.ratios(times, "CPU", "a", "unit") == [1.0, 2.0, 3.0, 1.0]
    assert measuring.summary([1.0, 2.0, 3.0, 1.0], 1) == "1.5 (1.0 to 3.0)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the memory of the GPU")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_of_a_call_is_what_it_held_at_most_not_what_it_leaves(measuring):
    peak = measuring.peak_of(lambda: torch.ones(12 << 20).sum().item())
    assert 40 < peak < 60  # 48 MiB, and nothing is left of them
    assert measuring.peak_of(lambda: None) < 8
