"""Avalanche's benchmarks as sequences of tasks, and the way back."""

from __future__ import annotations

import contextlib
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor

from clkit.config import opt
from clkit.errors import DataError, Problem, did_you_mean
from clkit.tasks.base import LabelledExamples, Task, TaskSequence
from clkit.tasks.images import pixel_ids, to_array
from clkit.tasks.source import TaskSource
from clkit.tasks.splits import Scenario

# Transforms are functions, which a configuration can't name; without them the images come as stored.
TRANSFORMS = ("train_transform", "eval_transform")


@dataclass
class AvalancheConfig:
    """A benchmark by its name in Avalanche, with its own arguments."""

    benchmark: str = opt("", "a ready-made benchmark of avalanche.benchmarks, such as SplitMNIST")
    kwargs: dict[str, Any] = opt({}, "its arguments, such as {n_experiences: 5}; a text is read like a YAML value")
    scenario: str = opt(
        "auto",
        "auto = task where the benchmark gives task labels, class where each class is in one experience, else domain",
        choices=("auto", "class", "task", "domain"),
    )


class AvalancheSource(TaskSource):
    """Any of Avalanche's classic benchmarks; other benchmark objects go through :func:`from_benchmark`."""

    config_class: ClassVar[type] = AvalancheConfig

    @classmethod
    def check(cls, config: AvalancheConfig) -> list[Problem]:
        """The benchmark exists and takes these arguments."""
        known = _classic()
        if config.benchmark not in known:
            what = f"unknown benchmark '{config.benchmark}'.{did_you_mean(config.benchmark, known)}"
            return [Problem("tasks.benchmark", f"{what} Known: {', '.join(sorted(known))}")]
        parameters = inspect.signature(known[config.benchmark]).parameters
        allowed = [p for p in parameters if p not in TRANSFORMS]
        problems = [
            Problem("tasks.kwargs", f"'{key}' is no argument of {config.benchmark}.{did_you_mean(key, allowed)}")
            for key in config.kwargs
            if key not in allowed
        ]
        problems += [
            Problem("tasks.kwargs", f"{config.benchmark} needs '{name}'")
            for name, p in parameters.items()
            if p.default is p.empty
            and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            and name not in config.kwargs
        ]
        return problems

    @classmethod
    def build(cls, config: AvalancheConfig, seed: int) -> TaskSequence:
        """Make the benchmark (this may download) and read all of it into memory.

        Raises:
            DataError: Avalanche could not make the benchmark, or it does not fit a sequence of tasks.
        """
        make = _classic()[config.benchmark]
        parameters = inspect.signature(make).parameters
        kwargs = {k: parse_scalar(v) if isinstance(v, str) else v for k, v in config.kwargs.items()}
        if "seed" in parameters:
            kwargs.setdefault("seed", seed)
        kwargs |= {key: None for key in TRANSFORMS if key in parameters}
        try:
            benchmark = make(**kwargs)
        # What torchvision, urllib and Avalanche's own checks raise for a bad argument or a download that fails.
        except (OSError, RuntimeError, ValueError, TypeError, LookupError, AssertionError, ImportError) as error:
            raise DataError(f"Avalanche can't make {config.benchmark}({config.kwargs}): {error}") from error
        return from_benchmark(benchmark, scenario=cast(Any, config.scenario))


def parse_scalar(text: str) -> Any:
    """``"5"`` is 5, ``"true"`` and ``"True"`` are True, ``"null"`` and ``"None"`` are None, ``"[1, 2]"`` is a list.

    Example:
        >>> [parse_scalar(t) for t in ("5", "0.5", "True", "none", "[1, 2]", "data/mnist")]
        [5, 0.5, True, None, [1, 2], 'data/mnist']
    """
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        return text


def from_benchmark(
    benchmark: Any, scenario: Literal["auto", "class", "task", "domain"] = "auto", files: Sequence[Path] = ()
) -> TaskSequence:
    """Make a TaskSequence of any Avalanche classification benchmark.

    Images that the benchmark gives as PIL images become uint8 (N, 3, H, W), or (N, 1, H, W) when grey; what it
    gives as tensors stays as it is. Evaluation transforms are applied to both streams, so that no random
    augmentation is frozen into the data. Classes are numbered in the order in which the tasks bring them;
    ``metadata["source_classes"]`` has the benchmark's own numbers.

    Args:
        benchmark: has ``train_stream`` and ``test_stream``. A test stream of one experience is shared: each task
            is scored on its own classes' part.
        scenario: see :class:`AvalancheConfig`.
        files: data files behind the benchmark.

    Raises:
        DataError: a stream is missing or empty, the streams do not match, or the inputs differ in shape.
    """
    count: dict[str, int] = {}  # training ids are unique over all experiences
    train = [_read(e, count) for e in getattr(benchmark, "train_stream", ())]
    test = [_read(e, {}) for e in getattr(benchmark, "test_stream", ())]
    if not train or not test:
        raise DataError("The benchmark needs a train_stream and a test_stream with at least one experience each.")
    if len(test) not in (1, len(train)):
        raise DataError(
            f"The benchmark has {len(train)} training but {len(test)} test experiences; expected 1 or as many."
        )
    if scenario == "auto":
        scenario = _scenario(train)
    numbers: dict[tuple[int, int], int] = {}
    tasks = []
    for k, part in enumerate(train):
        # With a task label per experience the same class number may mean something else in each of them.
        space = part.task_label if scenario == "task" else 0
        own = sorted(set(part.targets))
        for c in own:
            numbers.setdefault((space, c), len(numbers))
        shown = test[k if len(test) > 1 else 0]
        shown = shown.of_classes(own) if len(test) == 1 else shown
        extra = set(shown.targets) - set(own)
        if extra or not shown.targets:
            what = f"has test examples of other classes: {sorted(extra)}" if extra else "has no test example"
            raise DataError(f"Experience {k} of the benchmark {what}.")
        sets = [
            LabelledExamples(p.inputs, torch.tensor([numbers[space, c] for c in p.targets]), p.ids)
            for p in (part, shown)
        ]
        classes, source = zip(*sorted((numbers[space, c], c) for c in own), strict=True)
        names = [str(c) for c in source]
        metadata = {"class_names": names, "source_classes": list(source), "task_label": part.task_label}
        tasks.append(Task(f"task-{k + 1}", sets[0], sets[1], "classification", "accuracy", classes, metadata))
    return TaskSequence(tasks, scenario=scenario, files=files)


def to_benchmark(tasks: TaskSequence) -> Any:
    """Make an Avalanche benchmark (a ``CLScenario`` with train and test streams) of a classification sequence.

    Task labels are the positions of the tasks in scenario ``task``, else 0. Class numbers stay as they are. Inputs
    are given as stored: uint8 images are not scaled.

    Raises:
        DataError: a task is no classification task, or its inputs are texts.
    """
    _load()
    from avalanche.benchmarks import benchmark_from_datasets, with_task_labels
    from avalanche.benchmarks.scenarios.supervised import with_classes_timeline
    from avalanche.benchmarks.utils import DataAttribute, TaskAwareSupervisedClassificationDataset

    def dataset(examples: Any, task_label: int, name: str) -> Any:
        if not isinstance(examples, LabelledExamples) or isinstance(examples.inputs, tuple):
            raise DataError(f"Task '{name}': Avalanche takes images and vectors with classes, not texts or edits.")
        labels = examples.labels.tolist()
        return TaskAwareSupervisedClassificationDataset(
            [_Pairs(examples)],
            data_attributes=[
                DataAttribute(labels, "targets"),
                DataAttribute([task_label] * len(labels), "targets_task_labels", use_in_getitem=True),
            ],
        )

    streams = {
        part: [dataset(getattr(t, side), k if tasks.scenario == "task" else 0, t.name) for k, t in enumerate(tasks)]
        for part, side in (("train", "train"), ("test", "eval"))
    }
    return with_classes_timeline(with_task_labels(benchmark_from_datasets(**streams)))


class _Pairs(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Labelled examples as a map-style data set."""

    def __init__(self, examples: LabelledExamples) -> None:
        self.examples = examples
        self.targets = examples.labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        inputs = cast(Any, self.examples.inputs)
        return inputs[torch.tensor([index])][0], self.targets[index]


@dataclass(frozen=True)
class _Read:
    """One experience in memory."""

    inputs: Tensor
    targets: list[int]
    ids: list[str]
    task_label: int

    def of_classes(self, classes: Sequence[int]) -> _Read:
        """The part with these classes."""
        wanted = set(classes)
        chosen = [i for i, c in enumerate(self.targets) if c in wanted]
        return _Read(
            self.inputs[chosen], [self.targets[i] for i in chosen], [self.ids[i] for i in chosen], self.task_label
        )


def _read(experience: Any, count: dict[str, int]) -> _Read:
    """All examples of an experience with its evaluation transforms."""
    dataset = experience.dataset.eval()
    inputs, targets = [], []
    for position in range(len(dataset)):
        x, y = dataset[position][:2]
        inputs.append(_array(x))
        targets.append(int(y))
    shapes = sorted({tuple(x.shape) for x in inputs})
    number = experience.current_experience
    if len(shapes) != 1:
        what = f"inputs of different shapes ({', '.join(map(str, shapes[:3]))})" if shapes else "no examples"
        raise DataError(f"Experience {number} of the benchmark has {what}.")
    labels = getattr(experience, "task_labels", None) or [0]
    if len(set(labels)) > 1:
        raise DataError(
            f"Experience {number} of the benchmark mixes the task labels {sorted(set(labels))}; expected one."
        )
    return _Read(torch.from_numpy(np.stack(inputs)), targets, pixel_ids(inputs, count), int(next(iter(labels))))


def _array(x: Any) -> np.ndarray:
    if isinstance(x, Tensor):
        return np.asarray(x.detach().cpu().numpy())
    if hasattr(x, "getbands"):
        return to_array(x, "L" if len(x.getbands()) == 1 and x.mode != "P" else "RGB")
    return np.asarray(x, dtype=np.float32)


def _scenario(train: Sequence[_Read]) -> Scenario:
    if len(train) > 1 and len({part.task_label for part in train}) == len(train):
        return "task"
    seen: set[int] = set()
    for part in train:
        if seen & set(part.targets):
            return "domain"
        seen |= set(part.targets)
    return "class"


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Within, Avalanche is imported. Its dependencies warn of solvers and of a module that nothing here uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no QP solver found", category=UserWarning)
        warnings.filterwarnings("ignore", message="The distutils package is deprecated", category=DeprecationWarning)
        yield


def _load() -> ModuleType:
    with importing():
        import avalanche.benchmarks
    return cast(ModuleType, avalanche.benchmarks)


def _classic() -> dict[str, Callable[..., Any]]:
    """The ready-made benchmarks: what Avalanche exports from ``benchmarks.classic`` under a benchmark's name."""
    module = _load()
    found: dict[str, Callable[..., Any]] = {}
    for name in dir(module):
        value = getattr(module, name)
        home = getattr(value, "__module__", "") or ""
        if inspect.isfunction(value) and home.startswith("avalanche.benchmarks.classic.") and name[0].isupper():
            found[name] = value
    return found
