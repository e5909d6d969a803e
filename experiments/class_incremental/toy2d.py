"""The paper's figure in the plane: four tasks of two Gaussians, learned one after another, eight classes at the end.

    python experiments/class_incremental/toy2d.py [--seeds 0 1 2]

Classes t and t + 4 come with task t; no two tasks share a region, but a line that parts the classes of one task cuts
through the others. Prints the mean accuracy over the four tasks after the last, on 250 new points each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from clkit.config import ModelConfig
from clkit.models import load_model
from clkit.strategies.dkvb.config import DKVBConfig
from clkit.strategies.dkvb.strategy import DKVB
from clkit.strategy import Strategy
from clkit.tasks.base import LabelledExamples, Task, TaskSequence
from clkit.trainer import SequentialTrainer

CENTRES = (
    *((0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75)),
    *((0.75, 0.5), (0.5, 0.75), (0.25, 0.5), (0.5, 0.25)),
)
SPREAD = 0.035
SMALL_STEPS = {"steps": 100, "optimizer": "sgd", "momentum": 0.0, "learning_rate": 20.0}


def tasks(seed: int) -> TaskSequence:
    """Four tasks of 100 training and 250 evaluation points."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for t in range(4):
        parts = []
        for count in (100, 250):
            y = torch.tensor([t, t + 4]).repeat(count // 2)
            x = torch.tensor(CENTRES)[y] + SPREAD * torch.randn(len(y), 2, generator=generator)
            parts.append(LabelledExamples(x, y, [f"{t}-{count}-{i}" for i in range(len(y))]))
        found.append(Task(f"task-{t}", *parts, "classification", "accuracy", (t, t + 4)))
    return TaskSequence(found, scenario="class")


def bottleneck(**options: object) -> Callable[[], Strategy]:
    """A strategy with keys placed on the points of all tasks, without their labels."""
    return lambda: DKVB(DKVBConfig(key_dim=2, key_data="all", label_smoothing=0.0, **options))


METHODS: dict[str, tuple[str, str | Callable[[], Strategy], dict[str, object]]] = {
    "linear probe": ("identity", "naive", {"steps": 1000, "optimizer": "adam", "learning_rate": 0.01}),
    "mlp 2-32-8": ("mlp", "naive", {"steps": 1000, "optimizer": "adam", "learning_rate": 0.001}),
    "dkvb, 1 x 400, chunk": ("identity", bottleneck(heads=1, pairs=400, split="chunk"), SMALL_STEPS),
    "dkvb, 20 x 20, random projections": ("identity", bottleneck(heads=20, pairs=20), SMALL_STEPS),
    "dkvb, 20 x 20, votes": ("identity", bottleneck(heads=20, pairs=20, decoder="votes"), SMALL_STEPS),
}


def main() -> None:
    """Print one line per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    for name, (backbone, strategy, train) in METHODS.items():
        scores = []
        for seed in arguments.seeds:
            config = ModelConfig(backbone, hidden=[32])
            generator = torch.Generator().manual_seed(seed)
            model = load_model(config, num_classes=8, input_shape=(2,), generator=generator)
            sections = {"seed": seed, "train": {"batch_size": 100, "clip": 0.0, **train}, "eval": {"initial": False}}
            made = strategy if isinstance(strategy, str) else strategy()
            result = SequentialTrainer(model, made, sections).fit(tasks(seed))
            scores.append(100 * result.metrics["average_accuracy"])
        print(f"{name}: {'  '.join(f'{s:.1f} %' for s in scores)}", flush=True)


if __name__ == "__main__":
    main()
