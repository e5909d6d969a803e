"""Many small images in one large one: tiles row by row, labels in a JSON file beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from clkit.config import opt
from clkit.errors import DataError, Problem, did_you_mean
from clkit.tasks.base import LabelledExamples, TaskSequence
from clkit.tasks.images import DECODE_ERRORS, pixel_ids, to_array
from clkit.tasks.source import TaskSource
from clkit.tasks.splits import SplitConfig, split_examples, split_problems

SUFFIXES = (".webp", ".png")


@dataclass
class MosaicConfig(SplitConfig):
    """A folder with train.json, train.webp (or .png), test.json and test.webp (or .png).

    The JSON has ``classes`` (names), ``labels`` (a class number per tile), ``tile`` (pixels) and ``columns``.
    """

    root: str = opt("", "folder of the mosaics")


@dataclass(frozen=True)
class _Part:
    """One mosaic: its index and its image."""

    index: Path
    image: Path


class MosaicSource(TaskSource):
    """uint8 images (N, 3, tile, tile)."""

    config_class: ClassVar[type] = MosaicConfig

    @classmethod
    def check(cls, config: MosaicConfig) -> list[Problem]:
        """The four files exist, and the split fits the classes."""
        problems: list[Problem] = []
        part = _find(config, "train", problems)
        _find(config, "test", problems)
        if part is None:
            return split_problems(config) + problems
        unreadable: list[Problem] = []
        index = _read_index(part.index, unreadable)  # its problems are data errors; build() lists them with the rest
        return split_problems(config, index["classes"] if index else None) + problems

    @classmethod
    def build(cls, config: MosaicConfig, seed: int) -> TaskSequence:
        """Decode both mosaics and cut them into tiles.

        Raises:
            DataError: a file is missing or broken, or the image does not fit its labels.
        """
        problems: list[Problem] = []
        files: list[Path] = []
        parts, classes = [], []
        for name in ("train", "test"):
            part = _find(config, name, problems)
            index = _read_index(part.index, problems) if part else None
            if part is None or index is None:
                continue
            files += [part.index, part.image]
            classes.append(index["classes"])
            tiles = _tiles(part.image, index, problems)
            if tiles is not None:
                labels = torch.tensor(index["labels"], dtype=torch.long)
                parts.append(LabelledExamples(torch.from_numpy(tiles), labels, pixel_ids(tiles)))
        if len(classes) == 2 and classes[0] != classes[1]:
            problems.append(Problem(config.root, "train.json and test.json have different classes"))
        if problems:
            raise DataError.collect("The mosaic is not usable:", problems)
        return split_examples(parts[0], parts[1], classes[0], config, seed, files)


def _find(config: MosaicConfig, name: str, problems: list[Problem]) -> _Part | None:
    root = Path(config.root).expanduser()
    if not config.root or not root.is_dir():
        near = did_you_mean(root.name, [p.name for p in root.parent.iterdir()]) if root.parent.is_dir() else ""
        problem = Problem("tasks.root", f"folder '{config.root}' does not exist.{near}")
        if problem not in problems:
            problems.append(problem)
        return None
    index = root / f"{name}.json"
    images = [root / f"{name}{suffix}" for suffix in SUFFIXES if (root / f"{name}{suffix}").is_file()]
    if not index.is_file():
        problems.append(Problem("tasks.root", f"'{index}' does not exist"))
    if not images:
        problems.append(Problem("tasks.root", f"'{root}' has neither {name}.webp nor {name}.png"))
    return _Part(index, images[0]) if images and index.is_file() else None


def _read_index(path: Path, problems: list[Problem]) -> dict[str, Any] | None:
    """The JSON beside a mosaic, every field checked."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(Problem(str(path), f"not readable JSON: {error}"))
        return None
    if not isinstance(index, dict):
        problems.append(Problem(str(path), f"expected a JSON object (got {type(index).__name__})"))
        return None
    found: list[str] = []
    classes, labels = index.get("classes"), index.get("labels")
    if not (isinstance(classes, list) and classes and all(isinstance(c, str) for c in classes)):
        found.append("'classes' must be a list of names")
    elif len(set(classes)) < len(classes):
        found.append("'classes' lists a class twice")
    elif not (isinstance(labels, list) and labels and all(type(k) is int and 0 <= k < len(classes) for k in labels)):
        found.append(f"'labels' must be a list of class numbers from 0 to {len(classes) - 1}")
    for key in ("tile", "columns"):
        if type(index.get(key)) is not int or index[key] < 1:
            found.append(f"'{key}' must be a whole number above 0 (got {index.get(key)!r})")
    problems += [Problem(str(path), what) for what in found]
    return None if found else index


def _tiles(path: Path, index: dict[str, Any], problems: list[Problem]) -> np.ndarray | None:
    """Tiles (N, 3, tile, tile), row by row."""
    count, tile, columns = len(index["labels"]), index["tile"], index["columns"]
    rows = -(-count // columns)
    try:
        with Image.open(path) as image:
            if image.size != (columns * tile, rows * tile):
                got, expected = f"{image.width} x {image.height}", f"{columns * tile} x {rows * tile}"
                what = f"is {got} pixels; {count} tiles of {tile} in {columns} columns need {expected}"
                problems.append(Problem(str(path), what))
                return None
            pixels = to_array(image, "RGB")
    except DECODE_ERRORS as error:
        problems.append(Problem(str(path), f"can't be decoded: {error}"))
        return None
    grid = pixels.reshape(3, rows, tile, columns, tile).transpose(1, 3, 0, 2, 4)
    return np.ascontiguousarray(grid.reshape(rows * columns, 3, tile, tile)[:count])
