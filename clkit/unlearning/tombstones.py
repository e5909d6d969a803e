"""Tombstones: records that a deletion request took out stay out of every later run, whatever its strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clkit.tasks.base import TaskSequence
from clkit.unlearning.ledger import FILE, Ledger, find_folders
from clkit.unlearning.manifest import keyed
from clkit.unlearning.records import Place, Record, records, without


class Tombstones:
    """The forgotten records of one ledger, as of some serial, and of the further ledgers that hold beside it.

    A record is forgotten if its id **or** its content is, so that neither a new id nor a corrected text brings it back.
    """

    def __init__(
        self, key: bytes = b"", rows: list[tuple[int, str, str]] | None = None, further: Sequence[Tombstones] = ()
    ) -> None:
        self._key = key
        self._ids = {record_id for _, record_id, _ in rows or []}
        self._contents = {content for _, _, content in rows or []}
        self._further = further
        self.serial = max((serial for serial, _, _ in rows or []), default=0)

    @property
    def name(self) -> str:
        """Of the ledger: a hash of its key."""
        return keyed(self._key, "ledger")[:16]

    def hashes(self, record: Record) -> tuple[str, str]:
        """What the ledger keeps of a record."""
        return keyed(self._key, "id", record.id), keyed(self._key, "content", record.content)

    def covers(self, record: Record) -> bool:
        """Whether the record is forgotten."""
        record_id, content = self.hashes(record)
        return record_id in self._ids or content in self._contents or any(t.covers(record) for t in self._further)

    def places(self, tasks: TaskSequence) -> set[Place]:
        """Where forgotten records stand in a sequence."""
        return {r.place for r in records(tasks) if self.covers(r)} if self.facts() else set()

    def apply(self, tasks: TaskSequence) -> TaskSequence:
        """The sequence without the forgotten records.

        Raises:
            RequestError: they can't be left out of it.
        """
        return without(tasks, self.places(tasks))

    def facts(self) -> dict[str, Any]:
        """For run.json: what :func:`in_force` needs to see the run's data as it did."""
        found = {t.name: t.serial for t in (self, *self._further) if t.serial}
        return {"tombstones": found} if found else {}


def known_to(facts: Mapping[str, Any], ledger: str, nearest: bool) -> int:
    """Up to which serial of a ledger a run began with, by its ``run.json``; a number is of the nearest one."""
    known: Any = facts.get("tombstones", {})
    if isinstance(known, Mapping):
        return int(known.get(ledger, 0))
    return int(known) if nearest else 0


def in_force(run_dir: Path | str | None, began: Mapping[str, Any] | None = None) -> Tombstones:
    """The tombstones that hold for a run directory; none where no request was ever served.

    They are those of every ledger above it, and of ``$CLKIT_LEDGER``.

    Args:
        run_dir: the run directory; None for a run without one.
        began: the run's ``run.json``: only those that it began with. None = all.

    Raises:
        CheckpointError: there is a ledger, and it can't be read.
    """
    found: list[Tombstones] = []
    for folder in find_folders(None if run_dir is None else Path(run_dir)):
        if not (folder / FILE).is_file():
            continue
        ledger = Ledger(folder)
        try:
            upto = None if began is None else known_to(began, Tombstones(ledger.key).name, nearest=not found)
            found.append(Tombstones(ledger.key, ledger.tombstones(upto)))
        finally:
            ledger.close()
    return _together(found)


def _together(found: Sequence[Tombstones]) -> Tombstones:
    return Tombstones(further=found) if len(found) > 1 else found[0] if found else Tombstones()
