"""Tasks from Hugging Face data sets, on the hub or on disk; code that comes with a data set is never run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from clkit.config import opt
from clkit.errors import DataError, Problem, did_you_mean
from clkit.tasks.assemble import Named, NamedTask, RawTask, build_sequence, by_number, classification_sequence
from clkit.tasks.base import TaskSequence
from clkit.tasks.images import DECODE_ERRORS, contents_of, pixel_ids, to_array
from clkit.tasks.readers import Row
from clkit.tasks.records import RecordsConfig, record_problems
from clkit.tasks.sampling import held_out
from clkit.tasks.source import TaskSource


@dataclass
class HubConfig(RecordsConfig):
    """One data set per task, or one data set cut into tasks by a column (or, for classification, by class)."""

    datasets: list[str] = opt([], "hub ids, id:config, or directories (save_to_disk, or data files)")
    task_column: str = opt("", "cut the one data set into tasks by the values of this column, sorted (10 after 9)")
    train_split: str = opt("train", "split to train on")
    eval_split: str = opt("test", "split to score on; '' = hold out eval_fraction of the training split")
    revision: str = opt("", "commit or tag on the hub, to pin what is read")
    image_field: str = opt("", "column of the image to classify; '' = classify the text of prompt_field")
    image_size: int = opt(0, "images are centre-cropped and resized to this many pixels; 0 = as they are", min=0)
    image_mode: str = opt("RGB", "colour or grey", choices=("RGB", "L"))


class HubSource(TaskSource):
    """Text, edits or classification; class names come from ClassLabel columns."""

    config_class: ClassVar[type] = HubConfig

    @classmethod
    def check(cls, config: HubConfig) -> list[Problem]:
        """Options that exclude each other. Whether a data set exists is known only when it is read."""
        single = len(config.datasets) == 1 and not config.task_column
        problems = record_problems(config, single)
        if not config.datasets:
            problems.append(Problem("tasks.datasets", "is empty; give at least one data set"))
        if config.task_column and len(config.datasets) > 1:
            what = f"cuts one data set into tasks (got {len(config.datasets)} data sets)"
            problems.append(Problem("tasks.task_column", what))
        if config.image_field and config.kind != "classification":
            problems.append(Problem("tasks.image_field", f"needs kind classification (got '{config.kind}')"))
        for entry in config.datasets:
            path = Path(entry).expanduser()
            if entry.startswith((".", "/", "~")) and not path.is_dir():
                near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
                problems.append(Problem("tasks.datasets", f"folder '{entry}' does not exist.{near}"))
        return problems

    @classmethod
    def build(cls, config: HubConfig, seed: int) -> TaskSequence:
        """Load every data set and check every row.

        Raises:
            DataError: a data set, a split or a column is missing, or rows are malformed.
        """
        problems: list[Problem] = []
        tasks: list[_Loaded] = []
        for entry in config.datasets:
            try:
                tasks += _by_column(_load(entry, config), config.task_column)
            except DataError as error:
                problems.append(Problem(entry, str(error)))
        files = list(dict.fromkeys(file for task in tasks for part in task.parts for file in part.files))
        names = list(dict.fromkeys(name for task in tasks for name in task.parts[0].class_names(config.label_field)))
        if config.image_field:
            return _image_tasks(tasks, config, seed, files, problems, names)
        raw = [RawTask(task.name, task.parts[0].where, *(_rows(part) for part in task.parts)) for task in tasks]
        return build_sequence(raw, [], config, seed, files, problems, names)


@dataclass(frozen=True)
class _Part:
    """Some rows of a split; ``numbers`` are their places in it, from 1, for error messages."""

    where: str
    dataset: Any
    numbers: Sequence[int]

    @property
    def files(self) -> list[Path]:
        return [Path(file["filename"]) for file in self.dataset.cache_files]

    def column(self, column: str) -> list[Any]:
        """Values, with the names of classes where there are any; -1, which means unlabelled, becomes None.

        Raises:
            DataError: there is no such column.
        """
        from datasets import ClassLabel

        if column not in self.dataset.column_names:
            raise DataError(f"has no column '{column}'.{did_you_mean(column, self.dataset.column_names)}")
        feature, values = self.dataset.features[column], list(self.dataset[column])
        if not isinstance(feature, ClassLabel):
            return values
        return [None if v is None or v < 0 else feature.int2str(v) for v in values]

    def class_names(self, column: str) -> list[str]:
        """The classes of a ClassLabel column in the data set's order; none of another column."""
        from datasets import ClassLabel

        feature = self.dataset.features.get(column)
        return list(feature.names) if isinstance(feature, ClassLabel) else []

    def rows_with(self, values: Sequence[Any], wanted: str) -> _Part:
        """The rows whose value is the wanted one."""
        chosen = [i for i, value in enumerate(values) if str(value) == wanted]
        return _Part(self.where, self.dataset.select(chosen), [self.numbers[i] for i in chosen])


@dataclass(frozen=True)
class _Loaded:
    """A task: its training rows and, unless some of them are to be held out, its evaluation rows."""

    name: str
    parts: tuple[_Part, ...]


def _load(entry: str, config: HubConfig) -> _Loaded:
    """Load a data set from disk or from the hub.

    Raises:
        DataError: the data set or a split can't be loaded.
    """
    import datasets

    path = Path(entry).expanduser()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
        elif path.is_dir():
            found = datasets.load_dataset(str(path))
        else:
            name, _, subset = entry.partition(":")
            found = datasets.load_dataset(name, subset or None, revision=config.revision or None)
    # Missing, private or malformed data sets, no network, scripts (which are refused): all say what is wrong.
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"can't be loaded: {str(error).strip()}") from error
    name = path.name.replace(":", "-")
    if isinstance(found, datasets.Dataset):
        found, splits = {config.train_split: found}, [config.train_split]
    else:
        splits = [split for split in (config.train_split, config.eval_split) if split]
    for split in splits:
        if split not in found:
            hint = "" if split == config.train_split else " With eval_split '' some training data are held out."
            raise DataError(f"has no split '{split}'.{did_you_mean(split, found)} It has: {', '.join(found)}.{hint}")
    parts = (_Part(f"{name}[{split}]", found[split], range(1, len(found[split]) + 1)) for split in splits)
    return _Loaded(name, tuple(parts))


def _by_column(loaded: _Loaded, column: str) -> list[_Loaded]:
    """The data set as one task, or one task for each value of the column.

    Raises:
        DataError: there is no such column, a value is missing, or one is in one split only.
    """
    if not column:
        return [loaded]
    values = [part.column(column) for part in loaded.parts]
    if any(v is None for found in values for v in found):
        raise DataError(f"column '{column}' has empty values, which belong to no task")
    names = [{str(v) for v in found} for found in values]
    if lonely := sorted(names[0] ^ names[-1]):
        raise DataError(f"these values of '{column}' are in one split only: {', '.join(lonely[:10])}")
    return [
        _Loaded(name, tuple(part.rows_with(v, name) for part, v in zip(loaded.parts, values, strict=True)))
        for name in sorted(names[0], key=by_number)
    ]


def _rows(part: _Part) -> list[Row]:
    from datasets import ClassLabel

    rows = list(part.dataset)
    for column, feature in part.dataset.features.items():
        if isinstance(feature, ClassLabel):
            for row, value in zip(rows, part.column(column), strict=True):
                row[column] = value
    return [Row(f"{part.where}:{number}", row) for number, row in zip(part.numbers, rows, strict=True)]


def _image_tasks(
    loaded: Sequence[_Loaded],
    config: HubConfig,
    seed: int,
    files: Sequence[Path],
    problems: list[Problem],
    class_names: Sequence[str],
) -> TaskSequence:
    count: dict[str, int] = {}  # training ids are unique over all tasks
    tasks = []
    for task in loaded:
        parts = [
            decoded
            for part, seen in zip(task.parts, (count, {}), strict=False)
            if (decoded := _decode(part, config, seen, problems)) is not None
        ]
        if problems:
            continue
        if len(parts) == 1:
            ids = parts[0].ids
            kept, out = held_out(ids, parts[0].labels, config.eval_fraction, seed, contents_of(ids))
            parts = [_subset(parts[0], kept), _subset(parts[0], out)]
        tasks.append(NamedTask(task.name, parts[0], parts[1], {}))
    return classification_sequence(tasks, config, seed, files, problems, class_names)


def _subset(part: Named, indices: list[int]) -> Named:
    labels, ids, where = ([values[i] for i in indices] for values in (part.labels, part.ids, part.where))
    return Named(part.inputs[indices], labels, ids, where)


def _decode(part: _Part, config: HubConfig, count: dict[str, int], problems: list[Problem]) -> Named | None:
    """All images of a part as one uint8 tensor (N, C, H, W) with the names of their classes; None if there is none."""
    from datasets import Image

    columns = part.dataset.column_names
    missing = [column for column in (config.image_field, config.label_field) if column not in columns]
    found = [f"has no column '{column}'.{did_you_mean(column, columns)}" for column in missing]
    if config.image_field in columns and not isinstance(part.dataset.features[config.image_field], Image):
        found.append(f"column '{config.image_field}' holds no images")
    if found:
        problems += [Problem(part.where, what) for what in found]
        return None
    labels = part.column(config.label_field)
    encoded = part.dataset.cast_column(config.image_field, Image(decode=False))[config.image_field]
    arrays: list[NDArray[np.uint8]] = []
    names, where = [], []
    for number, raw, label in zip(part.numbers, encoded, labels, strict=True):
        place = f"{part.where}:{number}"
        try:
            with PIL.Image.open(io.BytesIO(raw["bytes"]) if raw["bytes"] else raw["path"]) as image:
                array = to_array(image, config.image_mode, config.image_size)
        except (*DECODE_ERRORS, TypeError, AttributeError) as error:  # the latter two where a row has no image
            problems.append(Problem(place, f"can't be decoded: {error}"))
            continue
        if label is None:
            problems.append(Problem(place, f"'{config.label_field}' is empty"))
        if arrays and array.shape != arrays[0].shape:
            got, first = (f"{a.shape[2]} x {a.shape[1]}" for a in (array, arrays[0]))
            problems.append(Problem(place, f"is {got} pixels, the first image {first}; set image_size"))
            continue
        arrays.append(array)
        names.append(str(label))
        where.append(place)
    if not arrays:
        problems.append(Problem(part.where, "has no usable images"))
        return None
    return Named(torch.from_numpy(np.stack(arrays)), names, pixel_ids(arrays, count), where)
