"""Tombstones: records that a deletion request took out stay out of every later run, whatever its strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clkit.tasks.base import TaskSequence
from clkit.unlearning.ledger import FILE, Ledger, find_folder
from clkit.unlearning.manifest import keyed
from clkit.unlearning.records import Place, Record, records, without


class Tombstones:
    """The forgotten records of one ledger, as of some serial.

    A record is forgotten if its id **or** its content is, so that neither a new id nor a corrected text brings it back.
    """

    def __init__(self, key: bytes = b"", rows: list[tuple[int, str, str]] | None = None) -> None:
        self._key = key
        self._ids = {record_id for _, record_id, _ in rows or []}
        self._contents = {content for _, _, content in rows or []}
        self.serial = max((serial for serial, _, _ in rows or []), default=0)

    def hashes(self, record: Record) -> tuple[str, str]:
        """What the ledger keeps of a record."""
        return keyed(self._key, "id", record.id), keyed(self._key, "content", record.content)

    def covers(self, record: Record) -> bool:
        """Whether the record is forgotten."""
        record_id, content = self.hashes(record)
        return record_id in self._ids or content in self._contents

    def places(self, tasks: TaskSequence) -> set[Place]:
        """Where forgotten records stand in a sequence."""
        return {r.place for r in records(tasks) if self.covers(r)} if self._ids else set()

    def apply(self, tasks: TaskSequence) -> TaskSequence:
        """The sequence without the forgotten records.

        Raises:
            RequestError: they can't be left out of it.
        """
        return without(tasks, self.places(tasks))

    def facts(self) -> dict[str, Any]:
        """For run.json: what :func:`in_force` needs to see the run's data as it did."""
        return {"tombstones": self.serial} if self.serial else {}


def in_force(run_dir: Path | str | None, upto: int | None = None) -> Tombstones:
    """The tombstones that hold for a run directory, all or up to a serial; none where no request was ever served.

    Raises:
        CheckpointError: there is a ledger, and it can't be read.
    """
    folder = find_folder(None if run_dir is None else Path(run_dir))
    if folder is None or not (folder / FILE).is_file() or upto == 0:
        return Tombstones()
    ledger = Ledger(folder)
    try:
        return Tombstones(ledger.key, ledger.tombstones(upto))
    finally:
        ledger.close()
