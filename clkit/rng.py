"""Random streams: one generator per purpose, all derived from the run's seed, all saved in a checkpoint."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed for a purpose; the same on every machine and in every process."""
    text = ":".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def fresh_generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for something that is a function of its purpose alone, such as the order of one epoch."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


class Streams:
    """Named generators that go on from draw to draw (replay draws, reservoir, masks, noise)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[str, torch.Generator] = {}

    def __getitem__(self, purpose: str) -> torch.Generator:
        if purpose not in self._generators:
            self._generators[purpose] = fresh_generator(self.seed, "stream", purpose)
        return self._generators[purpose]

    def seed_global(self) -> None:
        """Seed Python's, numpy's and torch's global generators, which dropout and other libraries use."""
        random.seed(derive_seed(self.seed, "python"))
        np.random.seed(derive_seed(self.seed, "numpy") % 2**32)  # noqa: NPY002 - the global state is the point
        torch.manual_seed(derive_seed(self.seed, "torch"))

    def state_dict(self) -> dict[str, Any]:
        """State of all streams and of the three global generators."""
        kind, keys, pos, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
        state: dict[str, Any] = {
            "streams": {name: g.get_state() for name, g in self._generators.items()},
            "python": _to_lists(random.getstate()),
            "numpy": {
                "kind": kind,
                "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
                "rest": [pos, has_gauss, gauss],
            },
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = list(torch.cuda.get_rng_state_all())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put every generator back to where it was; generators that were handed out stay the same objects."""
        for name, generator in self._generators.items():
            generator.manual_seed(derive_seed(self.seed, "stream", name))
        for name, value in state["streams"].items():
            self[name].set_state(_bytes(value))
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        saved = state["numpy"]
        np.random.set_state((saved["kind"], saved["keys"].numpy().astype(np.uint32), *saved["rest"]))  # noqa: NPY002
        torch.set_rng_state(_bytes(state["torch"]))
        if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
            torch.cuda.set_rng_state_all([_bytes(s) for s in state["cuda"]])


def _to_lists(value: Any) -> Any:
    return [_to_lists(v) for v in value] if isinstance(value, tuple) else value


def _bytes(value: Tensor) -> Tensor:
    return value.to(torch.uint8).cpu()
