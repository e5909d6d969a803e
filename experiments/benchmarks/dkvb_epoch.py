"""What the discrete key-value bottleneck costs: cached pairs, or the search that the published module does each time.

    OMP_NUM_THREADS=1 python experiments/benchmarks/dkvb_epoch.py

10,000 random feature vectors of length 1280, C = 64 heads, K = 1024 pairs, k = 14, 10 classes, batch 256, float32. The
reference is a plain restatement of what the published module computes in an epoch: projection, all distances of a
batch at once, argmax, gather of distances, counters and values, one-hot counts, loss, backward, clipping, SGD. It is
timed inside one training run of clkit's own trainer, in turn: an epoch of ours, the search of all rows, an epoch of
the reference; ratios are medians over rounds, of processor time (one thread), because a machine that others use too
would favour what is short. Key initialisation alternates in the same way. Both see the same batches
in the same order, and the largest difference of the values after the first epoch is printed. Peak memory of the search
is that of a fresh process, above keys and queries.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.config import ModelConfig
from clkit.models import load_model
from clkit.strategies.dkvb.config import DKVBConfig
from clkit.strategies.dkvb.index import nearest, project
from clkit.strategies.dkvb.keys import EPSILON, KeyAverages
from clkit.strategies.dkvb.strategy import DKVB
from clkit.tasks.base import LabelledExamples, Task, TaskSequence
from clkit.trainer import SequentialTrainer

N, D, C, K, WIDTH, CLASSES, BATCH = 10_000, 1280, 64, 1024, 14, 10, 256


class Published:
    """The module's arithmetic, step by step, as a user of it would run it on features."""

    def __init__(self, projection: Tensor, keys: Tensor) -> None:
        self.projection, self.keys = projection, keys
        self.values = nn.Parameter(torch.zeros(C, K, CLASSES))
        self.counter = torch.zeros(C, K)
        self.masses, self.sums = torch.full((C, K), BATCH / K), keys * (BATCH / K)
        self.optimizer = torch.optim.SGD([self.values], lr=0.3)

    def search(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and negative squared distances of a batch, and the nearest keys."""
        queries = torch.einsum("bd,cdk->cbk", x, self.projection)
        distances = -(
            queries.square().sum(-1, keepdim=True)
            - 2 * torch.einsum("cik,cjk->cij", queries, self.keys)
            + self.keys.square().sum(-1).unsqueeze(1)
        )
        return queries, distances, distances.argmax(-1)

    def step(self, x: Tensor, y: Tensor) -> None:
        """One training step."""
        _, distances, index = self.search(x)
        distances.gather(2, index.unsqueeze(2))
        self.counter.unsqueeze(1).expand(-1, len(x), -1).gather(2, index.unsqueeze(2))
        read = self.values.gather(1, index.unsqueeze(2).expand(-1, -1, CLASSES))
        self.counter += F.one_hot(index, K).sum(1)
        loss = F.cross_entropy(read.mean(0), y, label_smoothing=0.1)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([self.values], 1.0)
        self.optimizer.step()

    def move_keys(self, x: Tensor, draws: Tensor) -> None:
        """One step of the key initialisation."""
        queries, _, index = self.search(x)
        hot = F.one_hot(index, K).to(queries.dtype)
        self.masses.mul_(0.95).add_(hot.sum(1), alpha=0.05)
        self.sums.mul_(0.95).add_(torch.einsum("cik,cij->cjk", queries, hot), alpha=0.05)
        total = self.masses.sum(-1, keepdim=True)
        smoothed = (self.masses + EPSILON) / (total + K * EPSILON) * total
        self.keys = self.sums / smoothed.unsqueeze(2)
        drawn = queries.gather(1, draws.unsqueeze(2).expand(-1, -1, WIDTH))
        self.keys = torch.where((self.masses < 0.1 * BATCH / K).unsqueeze(2), drawn, self.keys)


def timed(work: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    since = time.process_time()
    work()
    return time.process_time() - since


def ratio(name: str, theirs: list[float], ours: list[float], goal: float) -> None:
    """Print medians and the median of the rounds' ratios."""
    found = [a / b for a, b in zip(theirs, ours, strict=True)]
    print(
        f"{name}: reference {statistics.median(theirs):.3f} s, clkit {statistics.median(ours):.4f} s, "
        f"ratio {statistics.median(found):.1f} [{min(found):.1f}-{max(found):.1f}] (goal {goal:g})",
        flush=True,
    )


class Measured(DKVB):
    """The strategy, with an epoch of the reference after each of its own."""

    def __init__(self, config: Any, features: Tensor, labels: Tensor) -> None:
        super().__init__(config)
        self.features, self.labels = features, labels
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.indexing: list[float] = []
        self.difference = 0.0
        self.order: list[Tensor] = []

    def train_loader(self, task: Task) -> Any:
        """Remember the order of an epoch; the pairs are looked up before the clock starts."""
        self.run.encodings.train(0).batch(torch.arange(2))
        self.reference = Published(self.head.projection, self.head.keys)
        self._since = time.process_time()
        for batch in super().train_loader(task):
            self.order.append(batch.indices)
            yield batch

    def after_step(self) -> None:
        """At the end of an epoch, the reference's turn."""
        if self.run.position.step % -(-N // BATCH):
            return
        self.ours.append(time.process_time() - self._since)
        self.indexing.append(timed(lambda: self.head.lookup(self.features)))
        order, self.order = self.order, []
        self.theirs.append(timed(lambda: [self.reference.step(self.features[i], self.labels[i]) for i in order]))
        if len(self.ours) == 1:
            self.difference = (self.head.values - self.reference.values).abs().max().item()
        self._since = time.process_time()


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="only the memory of one search (used by this script)")
    arguments = parser.parse_args()
    if arguments.memory:
        print(search_memory())
        return
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, D, generator=generator).abs()  # positive, as after a ReLU
    labels = torch.randint(CLASSES, (N,), generator=generator)
    examples = LabelledExamples(features, labels, [f"{i}" for i in range(N)])
    few = examples.subset(range(100))
    tasks = TaskSequence([Task("all", examples, few, "classification", "accuracy", tuple(range(CLASSES)))])
    strategy = Measured(DKVBConfig(heads=C, pairs=K, key_dim=WIDTH, key_passes=1), features, labels)
    model = load_model(ModelConfig("identity"), num_classes=CLASSES, input_shape=(D,), generator=generator)
    train = {"epochs": arguments.rounds, "batch_size": BATCH, "optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.3}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    SequentialTrainer(model, strategy, {"train": train, "eval": {"initial": False}}).fit(tasks)
    print(f"largest difference of the values after one epoch: {strategy.difference:.1e}")
    ratio("training epoch in the trainer", strategy.theirs, strategy.ours, 100)
    ratio("indexing once, against one epoch", strategy.theirs, strategy.indexing, 4)
    key_initialisation(strategy, features, arguments.rounds, generator)
    used = subprocess.run([sys.executable, __file__, "--memory"], capture_output=True, text=True, check=True).stdout
    print(f"search at C = 256, K = 4096, batch 256: {float(used):.0f} MiB above keys and queries (goal < 200)")


def key_initialisation(strategy: Measured, features: Tensor, rounds: int, generator: torch.Generator) -> None:
    """Ten batches of each in turn."""
    reference = Published(strategy.head.projection, strategy.head.keys.clone())
    ours = KeyAverages(strategy.head.keys.clone(), reference.sums.clone(), reference.masses.clone())
    batches = torch.split(features[: 10 * BATCH], BATCH)

    def move() -> None:
        for x in batches:
            queries = project(x, strategy.head.projection, C)
            ours.step(queries, 0.95)
            ours.replace_dead(queries, 0.1 * BATCH / K, generator)

    def move_theirs() -> None:
        for x in batches:
            reference.move_keys(x, torch.randint(len(x), (C, K), generator=generator))

    pairs = [(timed(move_theirs), timed(move)) for _ in range(rounds)]
    ratio("key initialisation, 10 batches", [a for a, _ in pairs], [b for _, b in pairs], 4)


def search_memory() -> float:
    """MiB that one search takes above its inputs."""
    keys, queries = torch.randn(256, 4096, WIDTH), torch.randn(BATCH, 256, WIDTH)
    nearest(queries[:16, :2], keys[:2])  # libraries allocate their buffers
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nearest(queries, keys)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    warnings.simplefilter("default")
    main()
