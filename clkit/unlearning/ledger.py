"""The ledger: an SQLite file that says how far each batch of requests has come, and which records are forgotten.

It holds no id, text or name of a record: only keyed hashes. Every change is one transaction, on disk before it counts,
so a process killed anywhere leaves the state before or after it. One process serves at a time (:meth:`Ledger.serving`).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from clkit.errors import CheckpointError, RequestError
from clkit.files import disk_errors

STATES = ("received", "validated", "selected", "trained", "verified", "certified")
FOLDER = "unlearning"
FILE = "ledger.sqlite"
CERTIFICATE = "certificate.json"  # in a job's own folder
ENVIRONMENT = "CLKIT_LEDGER"
_SCHEMA = 1
_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE jobs (key TEXT PRIMARY KEY, state TEXT NOT NULL, reason TEXT, detail TEXT NOT NULL);
CREATE TABLE requests (request_id TEXT NOT NULL, digest TEXT NOT NULL, job TEXT NOT NULL,
                       PRIMARY KEY (request_id, job));
CREATE TABLE history (serial INTEGER PRIMARY KEY, job TEXT NOT NULL, state TEXT NOT NULL, reason TEXT,
                      time REAL NOT NULL);
CREATE TABLE tombstones (serial INTEGER PRIMARY KEY, id TEXT NOT NULL, content TEXT NOT NULL, job TEXT NOT NULL,
                         UNIQUE (id, content));
"""


def find_folder(run_dir: Path | None) -> Path | None:
    """The folder of the ledger that holds for a run directory, or None.

    It is ``$CLKIT_LEDGER``, or ``unlearning/`` in the nearest folder above the run that has one.
    """
    return next(iter(find_folders(run_dir)), None)


def find_folders(run_dir: Path | None) -> list[Path]:
    """The folders of all ledgers whose tombstones hold for a run directory; requests are written into the first."""
    chosen = os.environ.get(ENVIRONMENT)
    found = [Path(chosen).expanduser().absolute()] if chosen else []
    above = () if run_dir is None else (*run_dir.absolute().parents, *run_dir.resolve().parents)
    found += [parent / FOLDER for parent in above if (parent / FOLDER / FILE).is_file()]
    return list(dict.fromkeys(found))


class Ledger:
    """One ledger; made when it is not there.

    Raises:
        CheckpointError: it can't be made, read or written, or a newer clkit made it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE
        with disk_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
        with self._errors():
            self._database = sqlite3.connect(self.path, isolation_level=None, timeout=30)
            self._database.execute("PRAGMA synchronous = FULL")
            with self._transaction():
                if not self._rows("SELECT 1 FROM sqlite_master WHERE name = 'meta'"):
                    for statement in _TABLES.split(";")[:-1]:
                        self._database.execute(statement)
                    facts = [("schema", str(_SCHEMA)), ("key", secrets.token_hex(32))]
                    self._database.executemany("INSERT INTO meta VALUES (?, ?)", facts)
            meta = dict(self._rows("SELECT name, value FROM meta"))
        if meta.get("schema") != str(_SCHEMA):
            raise CheckpointError(f"{self.path}: ledger schema {meta.get('schema')}; this clkit reads {_SCHEMA}")
        self.key = bytes.fromhex(meta["key"])

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Hold the ledger for this process; a second one is refused.

        Raises:
            RequestError: another process serves a request.
        """
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RequestError(f"{self.folder}: another process is serving a request. Wait for it.") from None
        try:
            yield
        finally:
            lock.release()

    # --- jobs -------------------------------------------------------------------------------------------------------
    def state(self, job: str) -> tuple[str, str | None, dict[str, Any]] | None:
        """State, reason of a failure, and detail of a job; None when it is unknown."""
        rows = self._rows("SELECT state, reason, detail FROM jobs WHERE key = ?", job)
        return (rows[0][0], rows[0][1], json.loads(rows[0][2])) if rows else None

    def served(self, request_id: str, job: str) -> tuple[str, str] | None:
        """Another job with that request that has selected records and did not fail, and the request's digest there."""
        rows = self._rows(
            "SELECT job, digest FROM requests WHERE request_id = ? AND job != ? AND job IN "
            "(SELECT key FROM jobs WHERE state IN ('selected', 'trained', 'verified', 'certified'))",
            request_id,
            job,
        )
        return (str(rows[0][0]), str(rows[0][1])) if rows else None

    def receive(self, job: str, requests: Iterable[tuple[str, str]]) -> None:
        """Begin a job, or begin it again after it failed; ``requests`` are ids and digests."""
        with self._transaction():
            found = self.state(job)
            if found is None:
                self._database.execute("INSERT INTO jobs VALUES (?, 'received', NULL, '{}')", (job,))
                rows = [(request_id, digest, job) for request_id, digest in requests]
                self._database.executemany("INSERT INTO requests VALUES (?, ?, ?)", rows)
            elif found[0] == "failed":
                self._database.execute("UPDATE jobs SET state = 'received', reason = NULL WHERE key = ?", (job,))
            else:
                return
            self._remember(job, "received", None)

    def advance(self, job: str, state: str, tombstones: Iterable[tuple[str, str]] = (), **detail: Any) -> None:
        """Go on to the next state; tombstones (keyed id and content) and detail are written in the same transaction.

        Raises:
            CheckpointError: it is not the next state: the ledger was changed by something else.
        """
        with self._transaction():
            found = self.state(job)
            if found is None or found[0] not in STATES or STATES.index(state) != STATES.index(found[0]) + 1:
                raise CheckpointError(f"{self.path}: a job in state {found and found[0]} can't become {state}")
            for record_id, content in tombstones:
                self._database.execute(
                    "INSERT OR IGNORE INTO tombstones (id, content, job) VALUES (?, ?, ?)", (record_id, content, job)
                )
            merged = json.dumps({**found[2], **detail})
            self._database.execute("UPDATE jobs SET state = ?, detail = ? WHERE key = ?", (state, merged, job))
            self._remember(job, state, None)

    def fail(self, job: str, reason: str) -> None:
        """Write down why a job stopped; the same request begins again. The reason must name no record."""
        with self._transaction():
            self._database.execute("UPDATE jobs SET state = 'failed', reason = ? WHERE key = ?", (reason, job))
            self._remember(job, "failed", reason)

    def history(self, job: str) -> list[tuple[str, str | None, float]]:
        """Every state that a job was in, with reason and time."""
        return self._rows("SELECT state, reason, time FROM history WHERE job = ? ORDER BY serial", job)

    # --- tombstones -------------------------------------------------------------------------------------------------
    def tombstones(self, upto: int | None = None) -> list[tuple[int, str, str]]:
        """Serial, keyed id and keyed content of every forgotten record, up to a serial."""
        return self._rows(
            "SELECT serial, id, content FROM tombstones WHERE serial <= ? ORDER BY serial",
            2**62 if upto is None else upto,
        )

    # --- the database -----------------------------------------------------------------------------------------------
    def _remember(self, job: str, state: str, reason: str | None) -> None:
        self._database.execute(
            "INSERT INTO history (job, state, reason, time) VALUES (?, ?, ?, ?)", (job, state, reason, time.time())
        )

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with self._errors():
            return self._database.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise CheckpointError(
                f"{self.path}: the ledger can't be used ({error}). Restore it from a backup; without it nothing is "
                "trained, because forgotten records could come back."
            ) from error
