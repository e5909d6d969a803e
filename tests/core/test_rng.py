"""Random streams: one per purpose, independent of each other, exact after a resume."""

from __future__ import annotations

import random

import numpy as np
import torch

from clkit.checkpoint import pack, unpack
from clkit.rng import Streams, derive_seed, fresh_generator


def draws(streams, *names):
    return [torch.rand(3, generator=streams[n]).tolist() for n in names]


def test_a_stream_depends_on_seed_and_purpose_alone():
    assert draws(Streams(1), "a", "b") == draws(Streams(1), "a", "b")
    assert draws(Streams(1), "b", "a")[::-1] == draws(Streams(1), "a", "b"), "not on the order of use"
    assert draws(Streams(1), "a") != draws(Streams(2), "a")
    assert derive_seed(0, "a", 1) != derive_seed(0, "a", 2)
    assert derive_seed(7, "x") == 6_248_367_021_747_785_838, "the same on every machine and in every version"


def test_all_generators_go_on_where_they_were_through_a_checkpoint():
    streams = Streams(3)
    streams.seed_global()
    held = streams["replay"]
    draws(streams, "replay", "mask")
    saved = unpack(*pack(streams.state_dict()))

    def after():
        values = draws(streams, "replay", "mask", "new"), random.random(), np.random.rand(), torch.rand(2).tolist()  # noqa: NPY002
        return values, torch.rand(1, generator=held).item()

    expected = after()
    draws(streams, "replay")
    streams.load_state_dict(saved)
    assert after() == expected, "also for a generator that was handed out before"


def test_a_fresh_generator_is_a_function_of_its_purpose():
    assert torch.equal(
        torch.randperm(9, generator=fresh_generator(0, "order", 1)),
        torch.randperm(9, generator=fresh_generator(0, "order", 1)),
    )
