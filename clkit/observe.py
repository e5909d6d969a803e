"""What a run writes down about itself: events, samples of its answers, what it costs; and the trackers get it too."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from clkit.config import RunConfig
from clkit.cost import peak_memory
from clkit.evaluation.base import Score
from clkit.models.lora import true_shape
from clkit.resolve import to_dict
from clkit.rundir import RunDirectory
from clkit.scores import Scores
from clkit.strategy import Position, Strategy
from clkit.tasks.base import EditExamples, Examples, LabelledExamples, Task, TaskSequence, TextExamples
from clkit.tasks.images import thumbnail
from clkit.tracking import State, Tracker, open_trackers, scalars

SAMPLES = "samples.json"
_LONGEST = 600  # characters of a prompt or an answer that are kept


class Observer:
    """Writes down what happens in a run; without a directory it does nothing.

    Args:
        directory: the run directory, of the process that writes; None for all others.
        config: the run's.
        position: where the run is; read at each event.
    """

    def __init__(self, directory: RunDirectory | None, config: RunConfig, position: Position) -> None:
        self._directory, self._config, self._position = directory, config, position
        self._trackers: list[Tracker] = []
        self._samples: dict[str, list[dict[str, Any]]] = {}
        self._names: dict[str, str] = {}

    def begin(self, tasks: TaskSequence, scores: Scores, *, resumed: bool) -> None:
        """Say what the run is about, or that it goes on; open the trackers."""
        if self._directory is None:
            return
        config, self._names = self._config, _class_names([*tasks, *tasks.holdout])
        self._trackers = open_trackers(
            config.tracking.to, self._directory, config.name, to_dict(config), self._position.total_steps
        )
        if resumed:
            self._samples = self._directory.read(SAMPLES) or {}
            self.event("resume")
            return
        names = {"tasks": [t.name for t in tasks], "holdout": [t.name for t in tasks.holdout]}
        holds = [
            {
                "train": len(task.train),
                "eval": len(task.eval),
                "classes": [self._names.get(str(c), str(c)) for c in task.classes or ()],
            }
            for task in tasks
        ]
        better = scores.higher_is_better
        self.event("start", **names, task_metrics=scores.task_metrics, higher_is_better=better, holds=holds)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to ``events.jsonl`` and hand its numbers to the trackers."""
        if self._directory is None:
            return
        step = self._position.total_steps
        self._directory.event(kind, total_steps=step, time=round(time.time(), 3), **fields)
        numbers = scalars(kind, fields) if self._trackers else {}
        for tracker in self._trackers:
            tracker.log(numbers, step)

    def sample(self, task: Task, column: int, score: Score, when: str) -> None:
        """Keep what the model said to the first records of a task: before training, once learned, and lately."""
        count = self._config.tracking.samples
        if self._directory is None or not count or not any(d.prediction is not None for d in score.details[:count]):
            return
        stage = -1 if when == "before training" else self._position.stage
        rows = [
            {
                "id": detail.id,
                "prompt": _prompt(task.eval, i),
                "picture": _picture(task, i),
                "gold": _short(self._named(task, detail.gold)),
                "prediction": _short(self._named(task, detail.prediction)),
                "value": detail.value,
            }
            for i, detail in enumerate(score.details[:count])
        ]
        # What comes later than this was written before an earlier checkpoint was gone back to.
        kept = [entry for entry in self._samples.get(task.name, []) if entry["stage"] < stage]
        learned = [entry for entry in kept if entry["stage"] in (-1, column)]
        self._samples[task.name] = [*learned, {"stage": stage, "when": when, "metric": score.metric, "rows": rows}]
        self._directory.write(SAMPLES, self._samples)

    def _named(self, task: Task, value: str | None) -> str | None:
        """A class by its name, where the task has names."""
        return self._names.get(value, value) if task.kind == "classification" and value is not None else value

    def cost(self, tasks: TaskSequence, stage: int, strategy: Strategy) -> None:
        """Write down what learning up to ``stage`` takes: parameters, bytes of model and exemplars, peak memory."""
        if self._directory is None:
            return
        module, holds, device = strategy.run.model.module, strategy.holds(), strategy.run.engine.device
        tensors = [*module.parameters(), *module.buffers()]
        self.event(
            "cost",
            task=tasks[stage].name,
            stage=stage,
            parameters=sum(true_shape(p).numel() for p in module.parameters()),
            trainable_parameters=holds["trained_parameters"],
            model_bytes=sum(true_shape(t).numel() * t.element_size() for t in tensors),
            exemplars=holds["exemplars"],
            exemplar_bytes=holds["exemplar_bytes"],
            peak_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory(),
        )

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Finish what the trackers have begun."""
        state: State = "finished" if kind is None else "failed"
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            state = "interrupted"
        for tracker in self._trackers:
            tracker.close(state)
        self._trackers = []


def _prompt(examples: Examples, i: int) -> str | None:
    if isinstance(examples, (TextExamples, EditExamples)):
        return _short(examples.records[i].prompt)
    if isinstance(examples, LabelledExamples) and isinstance(examples.inputs, tuple):
        return _short(examples.inputs[i])
    return None


def _picture(task: Task, i: int) -> str | None:
    """The image of a record, small, where it is one: ``image_shape`` in a task's metadata says what vectors show."""
    examples = task.eval
    if not isinstance(examples, LabelledExamples) or isinstance(examples.inputs, tuple):
        return None
    pixels = examples.inputs[torch.tensor([i])][0]
    shape = task.metadata.get("image_shape")
    pixels = pixels.reshape(tuple(shape)) if shape else pixels
    return thumbnail(pixels) if pixels.ndim == 3 and pixels.shape[0] in (1, 3) else None


def _class_names(tasks: Iterable[Task]) -> dict[str, str]:
    """The name of each class of all tasks, by its number."""
    found: dict[str, str] = {}
    for task in tasks:
        names = task.metadata.get("class_names", ())
        pairs = names.items() if isinstance(names, dict) else zip(task.classes or (), names, strict=False)
        found |= {str(number): str(name) for number, name in pairs}
    return found


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
