"""scikit-learn's real 8x8 handwritten digits, split by class; nothing to download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from clkit.config import opt
from clkit.errors import Problem
from clkit.tasks.base import LabelledExamples, TaskSequence
from clkit.tasks.images import pixel_ids
from clkit.tasks.sampling import held_out
from clkit.tasks.source import TaskSource
from clkit.tasks.splits import SplitConfig, split_examples, split_problems

NAMES = tuple("0123456789")


@dataclass
class DigitsConfig(SplitConfig):
    """1,797 digits; by default five tasks of two classes."""

    flat: bool = opt(True, "vectors (N, 64); false = images (N, 1, 8, 8)")
    eval_fraction: float = opt(0.2, "part of each class held out for evaluation", above=0, max=0.9)


class DigitsSource(TaskSource):
    """Grey values as float32 in [0, 1]."""

    config_class: ClassVar[type] = DigitsConfig

    @classmethod
    def check(cls, config: DigitsConfig) -> list[Problem]:
        """Options that exclude each other or do not fit ten classes."""
        problems = split_problems(config, NAMES)
        if config.flat and config.scenario == "domain" and config.domain == "rotate":
            problems.append(Problem("tasks.flat", "domain 'rotate' needs images; set flat: false"))
        return problems

    @classmethod
    def build(cls, config: DigitsConfig, seed: int) -> TaskSequence:
        """Load, hold out a part of each class, split.

        Raises:
            DataError: the options do not fit the data.
        """
        from sklearn.datasets import load_digits

        data = load_digits()
        pixels = np.asarray(data.images)  # (N, 8, 8), whole numbers 0..16
        labels = np.asarray(data.target)
        inputs = torch.from_numpy(pixels / 16.0).float()
        inputs = inputs.flatten(1) if config.flat else inputs.unsqueeze(1)
        every = LabelledExamples(inputs, torch.from_numpy(labels).long(), pixel_ids(pixels.astype(np.uint8)))
        train, eval = held_out(every.ids, labels.tolist(), config.eval_fraction, seed)
        shape = {"image_shape": (1, 8, 8)}
        return split_examples(every.subset(train), every.subset(eval), NAMES, config, seed, metadata=shape)
