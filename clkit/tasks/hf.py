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

from clkit.config import opt
from clkit.errors import DataError, Problem, did_you_mean
from clkit.tasks.assemble import Named, NamedTask, RawTask, build_sequence, classification_sequence
from clkit.tasks.base import TaskSequence
from clkit.tasks.images import DECODE_ERRORS, pixel_ids, to_array
from clkit.tasks.jsonl import record_problems
from clkit.tasks.readers import Row
from clkit.tasks.records import RecordsConfig
from clkit.tasks.sampling import held_out
from clkit.tasks.source import TaskSource
from clkit.tasks.splits import split_problems


@dataclass
class HubConfig(RecordsConfig):
    """One data set per task, or one data set cut into tasks by a column (or, for classification, by class)."""

    datasets: list[str] = opt([], "hub ids, id:config, or directories (save_to_disk, or data files)")
    task_column: str = opt("", "cut the one data set into tasks by the values of this column, in sorted order")
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
        problems = record_problems(config)
        if not config.datasets:
            problems.append(Problem("tasks.datasets", "is empty; give at least one data set"))
        if config.task_column and len(config.datasets) > 1:
            what = f"cuts one data set into tasks (got {len(config.datasets)} data sets)"
            problems.append(Problem("tasks.task_column", what))
        if config.image_field and config.kind != "classification":
            problems.append(Problem("tasks.image_field", f"needs kind classification (got '{config.kind}')"))
        if config.kind == "classification" and len(config.datasets) == 1 and not config.task_column:
            problems += split_problems(config)
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
        files: list[Path] = []
        loaded = []
        for entry in config.datasets:
            try:
                train, eval = _load(entry, config)
            except DataError as error:
                problems.append(Problem(entry, str(error)))
                continue
            files += [Path(f["filename"]) for part in (train, eval) if part is not None for f in part.cache_files]
            loaded += _by_column(entry, train, eval, config, problems)
        if config.image_field:
            return _image_tasks(loaded, config, seed, files, problems)
        raw = [
            RawTask(name, name, _rows(name, train), None if eval is None else _rows(f"{name}[eval]", eval))
            for name, train, eval in loaded
        ]
        return build_sequence(raw, [], config, seed, list(dict.fromkeys(files)), problems)


def _load(entry: str, config: HubConfig) -> tuple[Any, Any]:
    """The training and the evaluation split; the latter None when some of the former is to be held out.

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
    if isinstance(found, datasets.Dataset):
        return found, None
    for split in (config.train_split, config.eval_split):
        if split and split not in found:
            near = did_you_mean(split, found)
            hint = (
                "" if split == config.train_split else " With eval_split '' a part of the training split is held out."
            )
            raise DataError(f"has no split '{split}'.{near} It has: {', '.join(found)}.{hint}")
    return found[config.train_split], found[config.eval_split] if config.eval_split else None


def _by_column(
    entry: str, train: Any, eval: Any, config: HubConfig, problems: list[Problem]
) -> list[tuple[str, Any, Any]]:
    """The data set as one task, or one task for each value of ``task_column``."""
    name = Path(entry).name.replace(":", "-")
    column = config.task_column
    if not column:
        return [(name, train, eval)]
    parts = [part for part in (train, eval) if part is not None]
    if any(column not in part.column_names for part in parts):
        near = did_you_mean(column, train.column_names)
        problems.append(Problem("tasks.task_column", f"'{entry}' has no column '{column}'.{near}"))
        return []
    values = [[str(v) for v in _named_column(part, column)] for part in parts]
    only = sorted(set(values[-1]) ^ set(values[0]))
    if only:
        what = f"these values of '{column}' are in one split only: {', '.join(only[:10])}"
        problems.append(Problem(entry, what))
        return []
    return [
        (
            value,
            *(
                part.select([i for i, v in enumerate(found) if v == value])
                for part, found in zip(parts, values, strict=True)
            ),
            *([None] if eval is None else []),
        )
        for value in sorted(set(values[0]))
    ]


def _named_column(dataset: Any, column: str) -> list[Any]:
    """A column with the names of its classes where it has them; -1, which means unlabelled, becomes None."""
    from datasets import ClassLabel

    feature, values = dataset.features[column], dataset[column][:]
    if not isinstance(feature, ClassLabel):
        return list(values)
    return [None if v is None or v < 0 else feature.int2str(v) for v in values]


def _rows(name: str, dataset: Any) -> list[Row]:
    from datasets import ClassLabel

    rows = list(dataset)
    for column, feature in dataset.features.items():
        if isinstance(feature, ClassLabel):
            for row, value in zip(rows, _named_column(dataset, column), strict=True):
                row[column] = value
    return [Row(f"{name}:{number}", row) for number, row in enumerate(rows, start=1)]


def _image_tasks(
    loaded: Sequence[tuple[str, Any, Any]], config: HubConfig, seed: int, files: Sequence[Path], problems: list[Problem]
) -> TaskSequence:
    count: dict[str, int] = {}  # training ids are unique over all tasks
    tasks = []
    for name, train, eval in loaded:
        parts = [_decode(name, train, config, count, problems)]
        if eval is not None:
            parts.append(_decode(f"{name}[eval]", eval, config, {}, problems))
        elif not problems:
            kept, out = held_out(parts[0].ids, parts[0].labels, config.eval_fraction, seed)
            parts = [_subset(parts[0], kept), _subset(parts[0], out)]
        tasks.append(NamedTask(name, parts[0], parts[-1], {}))
    return classification_sequence(tasks, config, seed, list(dict.fromkeys(files)), problems)


def _subset(part: Named, indices: list[int]) -> Named:
    return Named(
        part.inputs[indices], *([values[i] for i in indices] for values in (part.labels, part.ids, part.where))
    )


def _decode(name: str, dataset: Any, config: HubConfig, count: dict[str, int], problems: list[Problem]) -> Named:
    """All images of a split as one uint8 tensor (N, C, H, W) with the names of their classes."""
    from datasets import Image

    empty = Named(torch.empty(0), [], [], [])
    for column in (config.image_field, config.label_field):
        if column not in dataset.column_names:
            problems.append(Problem(name, f"has no column '{column}'.{did_you_mean(column, dataset.column_names)}"))
            return empty
    if not isinstance(dataset.features[config.image_field], Image):
        problems.append(Problem(name, f"column '{config.image_field}' holds no images"))
        return empty
    encoded = dataset.cast_column(config.image_field, Image(decode=False))
    labels = _named_column(dataset, config.label_field)
    arrays, names, where = [], [], []
    for number, (row, label) in enumerate(zip(encoded, labels, strict=True), start=1):
        place = f"{name}:{number}"
        if label is None:
            problems.append(Problem(place, f"'{config.label_field}' is empty"))
            continue
        raw = row[config.image_field]
        try:
            with PIL.Image.open(io.BytesIO(raw["bytes"]) if raw["bytes"] else raw["path"]) as image:
                arrays.append(to_array(image, config.image_mode, config.image_size))
        except (*DECODE_ERRORS, TypeError) as error:  # a TypeError where the row has no image at all
            problems.append(Problem(place, f"can't be decoded: {error}"))
            continue
        if arrays[-1].shape != arrays[0].shape:
            got, first = (f"{a.shape[2]} x {a.shape[1]}" for a in (arrays[-1], arrays[0]))
            problems.append(Problem(place, f"is {got} pixels, the first image {first}; set image_size"))
            arrays.pop()
            continue
        names.append(str(label))
        where.append(place)
    if not arrays:
        problems.append(Problem(name, "has no usable images"))
        return empty
    return Named(torch.from_numpy(np.stack(arrays)), names, pixel_ids(arrays, count), where)
