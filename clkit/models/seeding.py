"""Initialise modules of any library from a generator, and leave torch's global generator as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Within, torch's global CPU generator is seeded by one draw from ``generator``; afterwards it is restored.

    ``nn.Linear``, peft and transformers draw their initial weights from the global generator and take no other.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would seed the GPUs too, which fork_rng(devices=[]) does not restore.
        torch.default_generator.manual_seed(seed)
        yield
