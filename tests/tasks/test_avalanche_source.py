"""Avalanche's benchmarks become sequences of tasks, and sequences become benchmarks."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import pytest
import torch

from clkit.errors import ConfigError, DataError
from clkit.tasks import build_tasks
from clkit.tasks.avalanche import from_benchmark, importing, to_benchmark
from clkit.tasks.base import TaskSequence

pytest.importorskip("avalanche")


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A stand-in for MNIST in its own file format: 40 training and 20 test images, each full of its class number."""
    root = tmp_path_factory.mktemp("mnist")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        noise = np.arange(count, dtype=np.uint8)[:, None, None]
        images = np.broadcast_to(labels[:, None, None], (count, 28, 28)).copy()
        images[:, :1, :1] = noise  # so that every image has its own id
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
    return root


def mnist_tasks(mnist, benchmark: str = "SplitMNIST", run_seed: int = 0, **kwargs: object) -> TaskSequence:
    with warnings.catch_warnings():
        # Avalanche reads MNIST through an API that torchvision deprecates.
        warnings.simplefilter("default")
        kwargs = {"n_experiences": 5, "dataset_root": str(mnist), **kwargs}
        return build_tasks("avalanche", {"benchmark": benchmark, "kwargs": kwargs}, run_seed)


def test_a_named_benchmark_becomes_class_incremental_tasks(mnist):
    tasks = mnist_tasks(mnist)
    assert tasks.scenario == "class" and len(tasks) == 5
    assert [t.classes for t in tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    for task in tasks:
        inputs = task.train.inputs
        assert inputs.dtype == torch.float32 and inputs.shape == (8, 1, 28, 28) and len(task.eval) == 4
        source = [task.metadata["source_classes"][task.classes.index(k)] for k in task.train.labels.tolist()]
        assert (inputs[:, 0, 5, 5] * 255).round().tolist() == source  # Avalanche gives MNIST as tensors in [0, 1]
    ids = [i for t in tasks for i in t.train.ids]
    assert len(set(ids)) == 40


def test_the_seed_decides_the_class_order_unless_it_is_given(mnist):
    def order(run_seed: int, **kwargs: object) -> list[int]:
        return [c for t in mnist_tasks(mnist, run_seed=run_seed, **kwargs) for c in t.metadata["source_classes"]]

    assert order(0) == order(0) != order(1)
    assert order(0, seed=7) == order(1, seed="7")
    descending = [8, 9, 6, 7, 4, 5, 2, 3, 0, 1]  # within a task by number
    assert order(0, fixed_class_order="[9,8,7,6,5,4,3,2,1,0]") == descending
    assert order(0, fixed_class_order=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]) == descending


def test_task_labels_with_reused_class_numbers_keep_the_classes_apart(mnist):
    tasks = mnist_tasks(mnist, return_task_id="true", class_ids_from_zero_in_each_exp="True")
    assert tasks.scenario == "task"
    assert [t.classes for t in tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert [t.metadata["task_label"] for t in tasks] == [0, 1, 2, 3, 4]
    assert all(t.metadata["source_classes"] == [0, 1] for t in tasks)


def test_permuted_digits_are_domains(mnist):
    tasks = mnist_tasks(mnist, "PermutedMNIST", n_experiences=2)
    assert tasks.scenario == "domain"
    assert [t.classes for t in tasks] == [tuple(range(10))] * 2
    assert len(tasks[0].train) == len(tasks[1].train) == 40


def test_unknown_benchmarks_and_arguments_are_told_with_near_names(mnist):
    with pytest.raises(ConfigError, match="unknown benchmark 'SplitMNST'. Did you mean 'SplitMNIST'"):
        build_tasks("avalanche", {"benchmark": "SplitMNST"})
    for name in ("nc_benchmark", "os.system", "warnings", "copy"):
        with pytest.raises(ConfigError, match="unknown benchmark"):
            build_tasks("avalanche", {"benchmark": name})
    with pytest.raises(ConfigError) as error:
        build_tasks("avalanche", {"benchmark": "SplitMNIST", "kwargs": {"n_experience": 5, "train_transform": "x"}})
    assert "'n_experience' is no argument of SplitMNIST. Did you mean 'n_experiences'?" in str(error.value)
    assert "'train_transform' is no argument" in str(error.value)
    assert "SplitMNIST needs 'n_experiences'" in str(error.value)


def test_what_avalanche_refuses_is_a_data_error(mnist):
    with pytest.raises(DataError, match="Avalanche can't make SplitMNIST"):
        mnist_tasks(mnist, n_experiences="3")


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_there_and_back_keeps_everything(scenario):
    config = {"scenario": scenario, "train_limit": 6, "eval_limit": 4, "num_tasks": 2}
    tasks = build_tasks("digits", config)
    benchmark = to_benchmark(tasks)
    labels = [e.task_labels for e in benchmark.train_stream]
    assert labels == ([[0], [1]] if scenario == "task" else [[0], [0]])
    again = from_benchmark(benchmark)
    assert again.scenario == scenario
    for before, after in zip(tasks, again, strict=True):
        assert before.classes == after.classes
        for a, b in ((before.train, after.train), (before.eval, after.eval)):
            assert torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels)


def test_avalanche_trains_on_a_sequence():
    with importing():
        from avalanche.evaluation.metrics import accuracy_metrics
        from avalanche.logging import TextLogger
        from avalanche.training.plugins import EvaluationPlugin
        from avalanche.training.supervised import LwF

    benchmark = to_benchmark(build_tasks("digits", {"num_tasks": 2, "train_limit": 40, "eval_limit": 20}))
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 10)
    strategy = LwF(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        criterion=torch.nn.CrossEntropyLoss(),
        alpha=1.0,
        temperature=2.0,
        train_mb_size=16,
        train_epochs=3,
        evaluator=EvaluationPlugin(accuracy_metrics(stream=True), loggers=[TextLogger(io.StringIO())]),
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    scores = strategy.eval(benchmark.test_stream[1:])
    assert next(iter(scores.values())) > 0.8


def test_a_single_test_experience_is_shared_by_class():
    tasks = build_tasks("digits", {"num_tasks": 2, "train_limit": 4, "eval_limit": 3})
    benchmark = to_benchmark(tasks)

    class Shared:
        train_stream = benchmark.train_stream
        test_stream = to_benchmark(build_tasks("digits", {"num_tasks": 1, "eval_limit": 3})).test_stream

    again = from_benchmark(Shared())
    assert [sorted(set(t.eval.labels.tolist())) for t in again] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [len(t.eval) for t in again] == [15, 15]


def test_what_is_no_sequence_of_classification_tasks_is_refused():
    benchmark = to_benchmark(build_tasks("digits", {"num_tasks": 3, "train_limit": 2, "eval_limit": 2}))

    class Other:
        train_stream = benchmark.train_stream
        test_stream = benchmark.test_stream[:2]

    with pytest.raises(DataError, match="3 training but 2 test experiences"):
        from_benchmark(Other())
    Other.test_stream = list(reversed(list(benchmark.test_stream)))
    with pytest.raises(DataError, match="Experience 0 of the benchmark has test examples of other classes"):
        from_benchmark(Other())
    with pytest.raises(DataError, match="needs a train_stream and a test_stream"):
        from_benchmark(object())
    with pytest.raises(DataError, match="Task 'city': Avalanche takes images"):
        to_benchmark(build_tasks("facts"))


def test_images_of_a_benchmark_become_uint8_and_their_shapes_must_agree():
    from PIL import Image

    class Experience:
        task_labels = (0,)
        current_experience = 0

        def __init__(self, sizes: list[int]) -> None:
            self.rows = [(Image.new("RGB", (s, s), (k, 0, 9)), k % 2) for k, s in enumerate(sizes)]

        @property
        def dataset(self) -> Experience:
            return self

        def eval(self) -> list:
            return self.rows

    class Images:
        train_stream = [Experience([4, 4, 4, 4])]
        test_stream = [Experience([4, 4])]

    task = from_benchmark(Images())[0]
    assert task.train.inputs.dtype == torch.uint8 and task.train.inputs.shape == (4, 3, 4, 4)
    assert task.train.inputs[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    Images.test_stream = [Experience([4, 5])]
    with pytest.raises(DataError, match=r"different shapes \(\(3, 4, 4\), \(3, 5, 5\)\)"):
        from_benchmark(Images())
    Images.test_stream[0].task_labels = (0, 1)
    Images.test_stream[0].rows = Images.test_stream[0].rows[:1]
    with pytest.raises(DataError, match=r"mixes the task labels \[0, 1\]"):
        from_benchmark(Images())
