"""The journal of an edited model: one JSON object per line for every edit and every rollback, never rewritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clkit.errors import CheckpointError
from clkit.files import append_line, disk_errors

# What is asked of an edit, and the aspect that its score stands for.
QUERIES = {"prompt": "reliability", "rephrase": "generalisation", "locality": "locality"}
FINAL = "scores.json"  # beside the journal: the edits of the newest `clkit edit` on the model after all of them


class Journal:
    """An append-only JSONL file; every line is on the disk before :meth:`append` returns.

    Args:
        path: the file; None keeps the journal in memory only.
        entries: what is in it already.
    """

    def __init__(self, path: Path | None = None, entries: list[dict[str, Any]] | None = None) -> None:
        self.path = path
        self.entries = list(entries or [])
        self._torn: int | None = None  # where a last line without an end begins

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Read an existing journal, or start one. A last line that a crash cut off does not count.

        The file stays as it is until something is appended: that line may be one that another process is writing.

        Raises:
            CheckpointError: a line before the last one is no entry.
        """
        journal = cls(path)
        if not path.is_file():
            return journal
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict) or not isinstance(entry.get("number"), int):
                    raise ValueError("not an entry with a number")
            except ValueError as error:
                raise CheckpointError(f"{path}:{number}: damaged journal ({error}); restore it from a copy.") from error
            journal.entries.append(entry)
        journal._torn = len(whole) if len(whole) < len(raw) else None
        return journal

    @property
    def next(self) -> int:
        """The number of the next entry."""
        return self.entries[-1]["number"] + 1 if self.entries else 1

    def append(self, entry: dict[str, Any]) -> None:
        """Write one entry and wait until it is on the disk.

        Raises:
            CheckpointError: it can't be written; the journal is as it was.
        """
        if self.path is not None:
            if self._torn is not None:
                with disk_errors(self.path), self.path.open("r+b") as file:
                    file.truncate(self._torn)
                self._torn = None
            append_line(self.path, json.dumps(entry, ensure_ascii=False, allow_nan=False))
        self.entries.append(entry)

    def complete(self, entry: dict[str, Any] | None) -> None:
        """Append an entry that was saved with the state, if the process was killed before it got here."""
        if entry is not None and (not self.entries or self.entries[-1]["number"] < entry["number"]):
            self.append(entry)
