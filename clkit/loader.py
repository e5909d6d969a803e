"""Data order: epochs cut into batches of similar length, rehearsal mixed in, resumable at any step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from clkit.cache import RowCache
from clkit.config import TrainConfig
from clkit.errors import DataError, Problem
from clkit.memory import Buffer, Ref
from clkit.models.base import Model
from clkit.rng import derive_seed, fresh_generator
from clkit.tasks.base import Examples, LabelledExamples, Task, TaskSequence, TextExamples
from clkit.tasks.batch import Batch, Encoded, count_targets

# Sorting windows of this many batches by length keeps padding low while batches still differ from epoch to epoch.
WINDOW = 32


class Encodings:
    """The examples of each task in the model's form, encoded on first use and kept."""

    def __init__(self, model: Model, tasks: TaskSequence, cache: RowCache | None = None) -> None:
        self._model = model
        self._tasks = tasks
        self._cache = cache or RowCache(None)
        self._train: dict[int, Encoded] = {}
        self._eval: dict[int, tuple[Task, Encoded]] = {}
        self._classes: dict[int, Tensor] = {}

    def check(self) -> None:
        """Encode everything now, so that a record that does not fit is found before anything is trained.

        Raises:
            DataError: with the records of all tasks that do not fit.
        """
        problems: list[Problem] = []

        def attempt(what: str, encode: Callable[[], Encoded]) -> None:
            try:
                encode()
            except DataError as error:
                found = error.problems or (Problem("", str(error)),)
                problems.extend(Problem(f"task '{what}' {p.where}".rstrip(), p.what) for p in found)

        for index, task in enumerate(self._tasks):
            attempt(f"{task.name}", partial(self.train, index))
        for task in (*self._tasks, *self._tasks.holdout):
            attempt(f"{task.name} (scored)", partial(self.eval, task))
        if problems:
            raise DataError.collect("Some records do not fit the model:", problems)

    def encode(self, examples: Examples) -> Encoded:
        """Any examples in the model's form; features of a frozen backbone come from the cache."""
        return self._model.precompute(self._model.encode(examples), self._cache)

    def train(self, index: int) -> Encoded:
        """Training examples of task ``index``."""
        if index not in self._train:
            self._train[index] = self.encode(self._tasks[index].train)
        return self._train[index]

    def eval(self, task: Task) -> Encoded:
        """Evaluation examples of a task."""
        if id(task) not in self._eval:
            self._eval[id(task)] = (task, self.encode(task.eval))  # holding the task keeps its id its own
        return self._eval[id(task)][1]

    def classes(self, index: int) -> Tensor:
        """(N,) the class of each training example, for class-balanced buffers; the task's index without classes."""
        if index not in self._classes:
            self._classes[index] = training_classes(self._tasks[index], index)
        return self._classes[index]


def training_classes(task: Task, index: int) -> Tensor:
    """(N,) the class of each training example of the task at ``index``; the same for all where there are none."""
    examples = task.train
    if isinstance(examples, LabelledExamples):
        return examples.labels
    # Classes of different tasks are different; 2**20 leaves room for a million classes per task.
    if isinstance(examples, TextExamples) and all(r.label is not None for r in examples.records):
        names = sorted({f"{r.label}" for r in examples.records})
        labels = [names.index(f"{r.label}") + (index << 20) for r in examples.records]
        return torch.tensor(labels, dtype=torch.long)
    return torch.full((len(examples),), index << 20, dtype=torch.long)


class Pool(Encoded):
    """Several encoded sets as one; the position of example ``i`` of part ``p`` is ``offsets[p] + i``."""

    def __init__(self, parts: Sequence[Encoded]) -> None:
        self.parts = list(parts)
        self.offsets = np.cumsum([0, *(len(p) for p in self.parts)])
        known = [p.lengths for p in self.parts if p.lengths is not None]
        self.lengths = np.concatenate(known) if len(known) == len(self.parts) else None
        self._ids: list[str] | None = None

    @property
    def ids(self) -> Sequence[str]:  # type: ignore[override]
        """Record ids of all parts."""
        if self._ids is None:
            self._ids = [i for p in self.parts for i in p.ids]
        return self._ids

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def batch(self, indices: Tensor) -> Batch:
        """Collate rows of any parts, in the order given."""
        if len(self.parts) == 1:
            return replace(self.parts[0].batch(indices), source=self)
        part = np.searchsorted(self.offsets, indices.numpy(), side="right") - 1
        found = [(torch.from_numpy(np.flatnonzero(part == p)), int(p)) for p in np.unique(part)]
        pieces = [self.parts[p].batch(indices[rows] - int(self.offsets[p])) for rows, p in found]
        order = torch.cat([rows for rows, _ in found]).argsort()
        inputs = {name: self._join([piece.inputs[name] for piece in pieces], 0)[order] for name in pieces[0].inputs}
        labels = self._join([piece.labels for piece in pieces], -100)[order]
        return Batch(inputs, labels, count_targets(labels), indices, self)

    def _join(self, pieces: list[Tensor], fill: int) -> Tensor:
        """Stack rows; token tensors (B, T) are padded on the right to the longest."""
        if self.lengths is not None and pieces[0].dim() == 2:
            width = max(piece.shape[1] for piece in pieces)
            pieces = [torch.nn.functional.pad(p, (0, width - p.shape[1]), value=fill) for p in pieces]
        return torch.cat(pieces)


def epoch_order(
    count: int, batch_size: int, generator: torch.Generator, lengths: np.ndarray | None = None
) -> list[Tensor]:
    """Cut a random order of ``count`` examples into batches.

    With ``lengths``, examples are shuffled, sorted by length within windows of 32 batches, cut, and the batches
    shuffled: rows of one batch have similar lengths and little is wasted on padding.

    Returns:
        LongTensors of ``batch_size`` positions each (the last may be shorter); every example occurs once.
    """
    order = torch.randperm(count, generator=generator)
    if lengths is None:
        return list(torch.split(order, batch_size))
    keys = torch.from_numpy(lengths)
    window = batch_size * WINDOW
    batches: list[Tensor] = []
    for chunk in torch.split(order, window):
        batches += torch.split(chunk[keys[chunk].argsort(stable=True)], batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def record_order(
    ids: Sequence[str], batch_size: int, key: tuple[object, ...], lengths: np.ndarray | None = None
) -> list[Tensor]:
    """Cut an order into batches in which each record's place is decided by its id and ``key`` alone.

    Leaving a record out leaves every batch before its own as it was; with ``lengths`` every window of 32 batches
    before its own. Within a window examples are sorted by length, and its batches shuffled by their records' ids.

    Args:
        ids: of the examples, each once.
        batch_size: examples per batch.
        key: what else decides, such as seed, stage and epoch.
        lengths: as in :func:`epoch_order`.
    """
    ranks = [derive_seed(0, *key, id) for id in ids]
    order = sorted(range(len(ids)), key=ranks.__getitem__)
    if lengths is None:
        return [torch.tensor(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    batches: list[Tensor] = []
    window = batch_size * WINDOW
    for start in range(0, len(order), window):
        chunk = sorted(order[start : start + window], key=lambda i: int(lengths[i]))  # stable
        cut = [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
        batches += [torch.tensor(b) for b in sorted(cut, key=lambda b: min(ranks[i] for i in b))]
    return batches


def steps_in_stage(count: int, train: TrainConfig) -> int:
    """Optimiser steps for ``count`` new examples."""
    return train.steps or train.epochs * -(-count // train.batch_size)


class StepLoader:
    """Batches of one stage, one per optimiser step, from step ``start`` on.

    The order of an epoch is a function of (seed, stage, epoch), so a position is enough to resume. Rehearsed examples
    are drawn before the new ones of the same step enter the buffer, and every new example is offered to the buffer
    once, in the first epoch. Nothing is drawn ahead of the step that is asked for, so buffer and generators are exact
    at every step. With ``union`` the buffer's examples are part of the epoch instead, and nothing is drawn.

    Attributes:
        source: where batches are cut from; may be replaced by something with the same positions.
        positions: (N,) positions in ``source`` of the examples of one epoch, the new ones first.
    """

    def __init__(
        self,
        encodings: Encodings,
        tasks: Sequence[int],
        train: TrainConfig,
        *,
        seed: int,
        stage: int,
        start: int,
        buffer: Buffer | None,
        ratio: float,
        draws: torch.Generator,
        keeps: torch.Generator,
        union: bool = False,
    ) -> None:
        self._encodings = encodings
        self._tasks = list(tasks)
        self._train = train
        self._seed, self._stage, self._start = seed, stage, start
        self._buffer, self._ratio = buffer, ratio
        self._draws, self._keeps = draws, keeps
        self._new = Pool([encodings.train(t) for t in self._tasks])
        self._union = union and buffer is not None
        self._lookup: dict[int, int] = {}
        self.source: Encoded = self._new
        self.positions = torch.arange(len(self._new))
        if buffer is not None:
            past = [t for t in range(stage) if t not in self._tasks]
            pool = Pool([*self._new.parts, *(encodings.train(t) for t in past)])
            self._lookup = {t: int(pool.offsets[p]) for p, t in enumerate([*self._tasks, *past])}
            self.source = pool
            if self._union:
                self.positions = torch.cat([self.positions, self._places(buffer.refs)])
        self._lengths = self.source.lengths if train.group_by_length else None

    def __len__(self) -> int:
        return self._total() - self._start

    def _total(self) -> int:
        """Steps of the stage; none where nothing is new, as where every record was forgotten."""
        return steps_in_stage(len(self.positions), self._train) if len(self._new) else 0

    def _order(self, epoch: int) -> list[Tensor]:
        lengths = None if self._lengths is None else self._lengths[self.positions.numpy()]
        if self._train.order == "record":
            ids = [self.source.ids[i] for i in self.positions.tolist()]
            return record_order(ids, self._train.batch_size, (self._seed, "order", self._stage, epoch), lengths)
        generator = fresh_generator(self._seed, "order", self._stage, epoch)
        return epoch_order(len(self.positions), self._train.batch_size, generator, lengths)

    def __iter__(self) -> Iterator[Batch]:
        total = self._total()
        per_epoch = -(-len(self.positions) // self._train.batch_size)
        epoch, order, shown = -1, [], 0
        for step in range(self._start, total):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = self._order(epoch)
                shown = epoch * len(self.positions) + sum(map(len, order[: step % per_epoch]))
            new = order[step % per_epoch]
            # Of all so far, not of this batch alone: of a twentieth nothing would be left in each batch of eight.
            replayed = int((shown + len(new)) * self._ratio + 0.5) - int(shown * self._ratio + 0.5)
            shown += len(new)
            if self._buffer is None:
                yield self.source.batch(new)
                continue
            if self._union:
                batch = self.source.batch(self.positions[new])
                if len(self.positions) > len(self._new):
                    batch.replayed = new >= len(self._new)
                yield batch
                continue
            old = self._draw(self._buffer, replayed)
            batch = self.source.batch(torch.cat([new, old]) if len(old) else new)
            if len(old):
                batch.replayed = torch.arange(len(batch)) >= len(new)
            if epoch == 0 and not self._buffer.by_features:
                self._offer(self._buffer, new)
            yield batch

    def _draw(self, buffer: Buffer, count: int) -> Tensor:
        """Positions in the pool of rehearsed examples of *earlier* stages."""
        if self._stage == 0 or not len(buffer):
            return torch.empty(0, dtype=torch.long)
        return self._places(buffer.sample(count, self._draws, exclude_tasks=frozenset(self._tasks)))

    def _places(self, refs: Sequence[Ref]) -> Tensor:
        """Positions in the pool; records of this stage's own tasks are there already."""
        kept = [self._lookup[r.task] + r.index for r in refs if r.task not in self._tasks]
        return torch.tensor(kept, dtype=torch.long)

    def _offer(self, buffer: Buffer, new: Tensor) -> None:
        part = np.searchsorted(self._new.offsets, new.numpy(), side="right") - 1
        tasks = [self._tasks[p] for p in part.tolist()]
        rows = (new - torch.from_numpy(self._new.offsets[part])).tolist()
        buffer.add(
            [
                buffer.ref(t, i, int(self._encodings.classes(t)[i]), self._encodings.train(t).ids[i])
                for t, i in zip(tasks, rows, strict=True)
            ],
            self._keeps,
        )
