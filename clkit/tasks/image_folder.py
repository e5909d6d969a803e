"""Images in folders, one folder per class, decoded when a batch needs them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image

from clkit.config import opt
from clkit.errors import DataError, Problem, did_you_mean
from clkit.tasks.assemble import by_number
from clkit.tasks.base import LabelledExamples, TaskSequence, content_id
from clkit.tasks.images import DECODE_ERRORS, ImageFiles, contents_of, to_array, unique_ids
from clkit.tasks.sampling import held_out
from clkit.tasks.source import TaskSource
from clkit.tasks.splits import SplitConfig, split_examples, split_problems

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
PARTS = ("train", "test")


@dataclass
class ImageFolderConfig(SplitConfig):
    """Files ``root/train/CLASS/*`` and ``root/test/CLASS/*``, or ``root/CLASS/*``."""

    root: str = opt("", "folder of the images")
    size: int = opt(64, "images are centre-cropped to a square and resized to this many pixels", min=1)
    mode: str = opt("RGB", "colour or grey", choices=("RGB", "L"))
    eval_fraction: float = opt(0.2, "part of each class held out where there is no test folder", above=0, max=0.9)


class ImageFolderSource(TaskSource):
    """uint8 images (N, C, size, size); every file is decoded once at the start to find the broken ones."""

    config_class: ClassVar[type] = ImageFolderConfig

    @classmethod
    def check(cls, config: ImageFolderConfig) -> list[Problem]:
        """The folder exists and has classes, and the split fits them."""
        root = Path(config.root).expanduser()
        if not config.root:
            return [*split_problems(config), Problem("tasks.root", "is empty; give the folder of the images")]
        if not root.is_dir():
            near = did_you_mean(root.name, [p.name for p in root.parent.iterdir()]) if root.parent.is_dir() else ""
            return [*split_problems(config), Problem("tasks.root", f"folder '{root}' does not exist.{near}")]
        names = _classes(root / "train" if _has_parts(root) else root)
        if not names:
            what = f"'{root}' has no class folders (expected train/CLASS/ and test/CLASS/, or CLASS/)"
            return [*split_problems(config), Problem("tasks.root", what)]
        return split_problems(config, names)

    @classmethod
    def build(cls, config: ImageFolderConfig, seed: int) -> TaskSequence:
        """Find, decode and number all images.

        Raises:
            DataError: lists every broken image; or a class is empty, or only in one of the two parts.
        """
        root = Path(config.root).expanduser()
        folders = [root / part for part in PARTS] if _has_parts(root) else [root]
        names = _classes(folders[0])
        both = {name for folder in folders for name in _classes(folder)}
        problems = [
            Problem(str(folder / name), "is missing; every class needs a train and a test folder")
            for folder in folders
            for name in sorted(both - set(_classes(folder)))
        ]
        every = [_examples(folder, names, config, problems) for folder in folders]
        if problems:
            raise DataError.collect("The image folder is not usable:", problems)
        if len(every) == 1:
            ids, labels = every[0].ids, every[0].labels.tolist()
            kept, out = held_out(ids, labels, config.eval_fraction, seed, contents_of(ids))
            every = [every[0].subset(kept), every[0].subset(out)]
        files = [p for folder in folders for name in names for p in _images(folder / name)]
        return split_examples(every[0], every[1], names, config, seed, files)


def _has_parts(root: Path) -> bool:
    return all((root / part).is_dir() for part in PARTS)


def _classes(folder: Path) -> list[str]:
    """Names of the classes in their order: by number where they are numbers, so that 10 comes after 9."""
    return sorted((p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=by_number)


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def _examples(
    folder: Path, names: Sequence[str], config: ImageFolderConfig, problems: list[Problem]
) -> LabelledExamples:
    paths, labels = [], []
    for label, name in enumerate(names):
        found = _images(folder / name)
        if not found and (folder / name).is_dir():
            what = f"has no images ({', '.join(sorted(SUFFIXES))})"
            if any(_images(inner) for inner in (folder / name).iterdir()):
                what += f" of its own, only folders with images; parts must be called {' and '.join(PARTS)}"
            problems.append(Problem(str(folder / name), what))
        paths += found
        labels += [label] * len(found)

    def identify(path: Path) -> str | Problem:
        try:
            with Image.open(path) as image:
                return content_id(to_array(image, config.mode).tobytes())
        except DECODE_ERRORS as error:
            return Problem(str(path), f"can't be decoded: {error}")

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        results = list(pool.map(identify, paths))
    problems += [r for r in results if isinstance(r, Problem)]
    ids = unique_ids(r for r in results if isinstance(r, str))
    return LabelledExamples(ImageFiles(paths, config.size, config.mode), torch.tensor(labels, dtype=torch.long), ids)
