"""Reading rows out of JSON, JSON-lines, CSV and parquet files, with the place of each row for error messages."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clkit.errors import Problem


@dataclass(frozen=True, slots=True)
class Row:
    """One record as it stands in a file; ``where`` is ``file:line``."""

    where: str
    values: dict[str, Any]


def read_rows(path: Path, problems: list[Problem]) -> list[Row]:
    """Read all rows of a file; what can't be read is added to ``problems``.

    ``.jsonl`` has one object per line, ``.json`` the same or one array of objects. Cells of a ``.csv`` are text,
    empty ones count as missing, and ``options`` are a JSON array or separated by ``|``.
    """
    before = len(problems)
    try:
        rows = READERS[path.suffix.lower()](path, problems)
    except OSError as error:
        problems.append(Problem(str(path), f"can't be read: {error.strerror or error}"))
        return []
    if not rows and len(problems) == before:
        problems.append(Problem(str(path), "has no records"))
    return rows


def _text(path: Path, problems: list[Problem]) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.append(Problem(f"{path}:{line}", f"not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8"))
        return ""


def _read_json_lines(path: Path, problems: list[Problem]) -> list[Row]:
    return _json_lines(path, _text(path, problems), problems)


def _json_lines(path: Path, text: str, problems: list[Problem]) -> list[Row]:
    rows: list[Row] = []
    # Not splitlines(): U+2028 and the like are legal inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            problems.append(Problem(where, f"not valid JSON: {json_reason(error)}"))
        else:
            _add(rows, where, value, problems)
    return rows


def _read_json(path: Path, problems: list[Problem]) -> list[Row]:
    text = _text(path, problems)
    if not text.lstrip().startswith("["):
        if _is_one_object(text):
            problems.append(Problem(str(path), "is one object; give an array of records, or one record per line"))
            return []
        return _json_lines(path, text, problems)
    rows: list[Row] = []
    line, counted = 1, 0
    try:
        for start, value in _elements(text):
            line += text.count("\n", counted, start)
            counted = start
            _add(rows, f"{path}:{line}", value, problems)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", line)
        problems.append(Problem(f"{path}:{line}", f"not valid JSON: {json_reason(error)}"))
    return rows


def _is_one_object(text: str) -> bool:
    """Whether all of a text of several lines is one JSON object, as where records stand under a key."""
    if "\n" not in text.strip():
        return False
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _elements(text: str) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array with their offsets, which ``json.loads`` does not tell."""

    def decode(at: int) -> tuple[Any, int]:
        try:
            return _DECODER.raw_decode(text, at)
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # which does not say where
            raise json.JSONDecodeError(str(error), text, at) from error

    def skip(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    at = skip(skip(0) + 1)
    if text[at : at + 1] != "]":
        while True:
            value, end = decode(at)
            yield at, value
            at = skip(end)
            if text[at : at + 1] != ",":
                break
            at = skip(at + 1)
    if text[at : at + 1] != "]":
        raise json.JSONDecodeError("expected ',' or ']'", text, at)
    at = skip(at + 1)
    if at < len(text):
        raise json.JSONDecodeError("more text after the array", text, at)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which ``json`` itself would silently keep the last value of a key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key '{twice}' more than once")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_each_key_once)


def json_reason(error: Exception) -> str:
    """Why ``json.loads`` failed, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _add(rows: list[Row], where: str, value: Any, problems: list[Problem]) -> None:
    if isinstance(value, dict):
        rows.append(Row(where, value))
    else:
        problems.append(Problem(where, f"not a JSON object (got {type(value).__name__})"))


def _read_csv(path: Path, problems: list[Problem]) -> list[Row]:
    # The standard library rather than `datasets`: it knows the line of each row, and the answer "NA" stays a text.
    text = _text(path, problems)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    line = 1  # where the row that is being read begins; it may take several lines
    # Cells of any length can be read; how long a text may be is `max_chars`' to say. The limit is the process's own.
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        names = list(reader.fieldnames or ())
        expected = len(names)
        for name in sorted({name for name in names if name and names.count(name) > 1}):
            what = f"the header has {names.count(name)} columns '{name}'; give each column a name of its own"
            problems.append(Problem(f"{path}:1", what))
        line = reader.line_num + 1
        for record in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if None in record:
                problems.append(Problem(where, f"more cells than the header has columns ({expected})"))
                continue
            rows.append(Row(where, {k: v or None for k, v in record.items()}))
    except csv.Error as error:
        problems.append(Problem(f"{path}:{line}", f"not valid CSV: {error}"))
    finally:
        csv.field_size_limit(limit)
    return rows


def _read_parquet(path: Path, problems: list[Problem]) -> list[Row]:
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # one file is read in a moment
    try:
        with tempfile.TemporaryDirectory() as cache:
            table = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
            values = table.to_list()
            for column, feature in table.features.items():
                if isinstance(feature, datasets.ClassLabel):  # whose -1 means unlabelled, and is no class
                    values = [row | {column: None} if row[column] == -1 else row for row in values]
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        problems.append(Problem(str(path), f"not a readable parquet file: {error.__cause__ or error}"))
        return []
    finally:
        if bars:
            datasets.enable_progress_bars()
    return [Row(f"{path}:{number}", row) for number, row in enumerate(values, start=1)]


READERS: dict[str, Callable[[Path, list[Problem]], list[Row]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
