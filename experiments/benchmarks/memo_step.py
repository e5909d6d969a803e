"""What a training step of MEMO costs in the fourth task, against the straightforward implementation.

    OMP_NUM_THREADS=1 python experiments/benchmarks/memo_step.py --rounds 5

ResNet-32, four blocks, 40 classes, batches of 128 images of 32 x 32 pixels. Both sides start from the same weights and
see the same images; one step of each without augmentation is compared first. A step is everything from stored uint8
images to updated weights. The straightforward side is what one would write first: one image at a time through
torchvision's transforms, the default memory layout, frozen blocks run as they are. Ours is the strategy inside the
trainer, as in a run.

Rounds alternate the order of the sides in one process; the ratio is the median over rounds, by CPU time of the process
(which other jobs on the machine disturb little) and by wall time.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit import resolve
from clkit.build import make_strategy
from clkit.config import ModelConfig
from clkit.models import load_model
from clkit.models.backbones.cifar_resnet import CIFAR
from clkit.strategies.memo import Memo
from clkit.tasks.base import LabelledExamples, Task, TaskSequence
from clkit.tasks.batch import Batch
from clkit.trainer import SequentialTrainer

TASKS, CLASSES, BATCH = 4, 10, 128
CASES = {
    "base trained, augmented": (True, True, 1.3),
    "base frozen, augmented": (False, True, 1.3),
    "base frozen, features cached": (False, False, 3.0),
}


def sequence() -> TaskSequence:
    """Four tasks of random images."""
    generator, tasks = torch.Generator().manual_seed(0), []
    for t in range(TASKS):
        images = torch.randint(0, 256, (2 * BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
        labels = torch.arange(2 * BATCH) % CLASSES + t * CLASSES
        examples = LabelledExamples(images, labels, [f"{t}/{i}" for i in range(2 * BATCH)])
        tasks.append(Task(f"t{t}", examples, examples, "classification", "accuracy", tuple(labels.unique().tolist())))
    return TaskSequence(tasks, scenario="class")


def ours(train_base: bool, augmented: bool, tasks: TaskSequence) -> SequentialTrainer:
    """A trainer at the start of the fourth task."""
    train = {
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "momentum": 0.9,
        "weight_decay": 2e-4,
        "clip": 0.0,
        "batch_size": BATCH,
        "augment": "crop-flip-brightness" if augmented else "none",
    }
    strategy = {"name": "memo", "train_base": train_base, "replay": {"size": 0}}
    config = resolve.validate({"tasks": "facts", "train": train, "strategy": strategy, "engine": {"device": "cpu"}})
    model = load_model(
        ModelConfig(name="cifar-resnet-32"),
        num_classes=TASKS * CLASSES,
        input_shape=(3, 32, 32),
        generator=torch.Generator().manual_seed(1),
    )
    trainer = SequentialTrainer(model, make_strategy(config.strategy), config)
    trainer.prepare(tasks)
    generator = torch.Generator().manual_seed(2)
    for m in model.module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr]
            m.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
    for stage in range(TASKS):
        trainer.position.stage = stage
        trainer.strategy.begin_task(tasks[stage])
    trainer._start_optimizer(1000)
    model.module.train()
    return trainer


class Straightforward:
    """The same network and step, written plainly."""

    def __init__(self, trainer: SequentialTrainer, train_base: bool, augmented: bool) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, Memo) and strategy.aux is not None
        plain = copy.deepcopy(strategy.backbone).to(memory_format=torch.contiguous_format)
        self.general, self.blocks = plain.general, plain.blocks
        self.head = nn.Linear(64 * TASKS, TASKS * CLASSES)
        self.aux = copy.deepcopy(strategy.aux)
        with torch.no_grad():
            self.head.weight.copy_(strategy.head.weight)
            self.head.bias.copy_(strategy.head.bias)
        self.modules = nn.ModuleList([self.general, *self.blocks, self.head, self.aux])
        self.modules.train()
        for frozen in [*self.blocks[:-1], *([] if train_base else [self.general])]:
            frozen.eval()
        self.parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.01, momentum=0.9, weight_decay=2e-4)
        self.transform = transform(augmented)

    def step(self, images: list[object], labels: Tensor) -> dict[str, float]:
        """One step on a list of PIL images."""
        x = torch.stack([self.transform(image) for image in images])
        maps = self.general(x)
        features = [block(maps) for block in self.blocks]
        logits, auxiliary = self.head(torch.cat(features, 1)), self.aux(features[-1])
        known = (TASKS - 1) * CLASSES
        targets = torch.where(labels - known + 1 > 0, labels - known + 1, 0)
        terms = {"cross_entropy": F.cross_entropy(logits, labels), "auxiliary": F.cross_entropy(auxiliary, targets)}
        self.optimizer.zero_grad()
        sum(terms.values()).backward()  # type: ignore[union-attr]
        self.optimizer.step()
        return {name: value.item() for name, value in terms.items()}


def transform(augmented: bool) -> Callable[[object], Tensor]:
    """torchvision's transforms of one PIL image, as the published code has them."""
    from torchvision import transforms

    changes = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    changes += [transforms.ColorJitter(brightness=63 / 255)]
    last = [transforms.ToTensor(), transforms.Normalize(CIFAR.mean, CIFAR.std)]
    found: Callable[[object], Tensor] = transforms.Compose([*(changes if augmented else []), *last])
    return found


def batches(trainer: SequentialTrainer) -> Iterator[Batch]:
    """The loader's source cut into batches, for ever; what is cached is cached before."""
    loader = trainer.strategy.train_loader(trainer.tasks[-1])
    positions = loader.positions.split(BATCH)  # type: ignore[attr-defined]
    for part in itertools.cycle(positions):
        yield loader.source.batch(part)  # type: ignore[attr-defined]


def compare(name: str, rounds: int) -> None:
    """Time one case."""
    from torchvision.transforms.functional import to_pil_image

    train_base, augmented, wanted = CASES[name]
    tasks = sequence()
    examples = tasks[-1].train
    pictures = [to_pil_image(image) for image in examples.inputs]

    def exact() -> float:
        trainer = ours(train_base, False, tasks)
        plain = Straightforward(trainer, train_base, False)
        batch = next(batches(trainer))
        terms = trainer._step(batch, tasks[-1])
        theirs = plain.step(pictures[:BATCH], batch.labels)
        gap = max(abs(float(terms[k]) - theirs[k]) for k in theirs)
        strategy = trainer.strategy
        assert isinstance(strategy, Memo)
        pairs = zip(strategy.backbone.blocks[-1].parameters(), plain.blocks[-1].parameters(), strict=True)
        return max(gap, max(float((a - b).detach().abs().max()) for a, b in pairs))

    difference = exact()
    trainer = ours(train_base, augmented, tasks)
    plain = Straightforward(trainer, train_base, augmented)
    source = batches(trainer)
    turns = itertools.cycle(range(0, 2 * BATCH, BATCH))

    def ours_step() -> None:
        trainer._step(next(source), tasks[-1])

    def plain_step() -> None:
        start = next(turns)
        plain.step(pictures[start : start + BATCH], examples.labels[start : start + BATCH])

    times: dict[str, list[tuple[float, float]]] = {"ours": [], "plain": []}
    sides = {"ours": ours_step, "plain": plain_step}
    for round_ in range(rounds + 1):
        for side in list(sides) if round_ % 2 else reversed(list(sides)):
            cpu, wall = time.process_time(), time.perf_counter()
            sides[side]()
            if round_:  # the first warms up
                times[side].append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu_ratio, wall_ratio = (
        statistics.median(p[i] / o[i] for p, o in zip(times["plain"], times["ours"], strict=True)) for i in (0, 1)
    )
    mine, theirs = (1e3 * statistics.median(t[0] for t in times[side]) for side in ("ours", "plain"))
    print(
        f"{name:<29} plain {theirs:6.0f} ms  ours {mine:6.0f} ms CPU  ratio {cpu_ratio:.2f} CPU, {wall_ratio:.2f} wall "
        f"(wanted {wanted})  largest difference after one step {difference:.1e}",
        flush=True,
    )


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    print(f"ResNet-32, 4 blocks, batch {BATCH}, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}")
    for name in CASES if arguments.case == "all" else [arguments.case]:
        compare(name, arguments.rounds)


if __name__ == "__main__":
    main()
