"""The run directory: lock, status, events, matrix and metrics. It is the only state of a run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clkit.cost import Meter
from clkit.errors import BusyError, CheckpointError, ClkitError, ConfigError
from clkit.files import disk_errors, write_json, write_text
from clkit.resolve import read_file, to_dict, validate

if TYPE_CHECKING:
    from clkit.checkpoint import CheckpointStore

# Keys of the configuration that change no number of a run; a resume may differ in them.
_FREE = ("name", "output_dir", "checkpoint", "tracking", "compare")

# What a run writes, in the order in which --fresh deletes it: when that is cut short, no checkpoint is left to a
# configuration that did not make it, and run.json still says that the rest is a run's.
_OWN = (
    "checkpoints",
    "events.jsonl",
    "matrix.json",
    "metrics.json",
    "further.json",
    "answer_styles.jsonl",
    "samples.json",
    "tracking.json",
    "tensorboard",
    "wandb",
    "mlruns",
    "noisy_steps.txt",
    "report.html",
    "report_figures",
    "export",
    ".tmp-export",
    "config.yaml",
    "status.json",
    "run.json",
)
_MARKS = ("run.json", "status.json")  # one of them is in every run's directory
_MEND = "Restore the file from a backup, or start again with --fresh."


class RunDirectory:
    """Reads and writes one run's files.

    ``config.yaml`` resolved configuration; ``run.json`` versions, git revision, data and model hashes; ``status.json``;
    ``events.jsonl``; ``matrix.json``; ``metrics.json``; ``further.json`` further matrices; ``answer_styles.jsonl``
    converted training records; ``samples.json`` what the model answered to a few records; ``noisy_steps.txt``
    what a private engine spent; ``checkpoints/``;
    ``export/``; ``report.html`` and ``report_figures/``; ``tracking.json``, ``tensorboard/``, ``wandb/`` and
    ``mlruns/`` of the trackers that are on.
    """

    def __init__(self, path: str | Path, keep: int = 2) -> None:
        self.path = Path(path).expanduser()
        self._keep = keep
        self._lock = FileLock(self.path / ".lock")
        self._events: Any = None
        self._meter: Meter | None = None

    @cached_property
    def checkpoints(self) -> CheckpointStore:
        """What is resumed from. The class is imported when it is asked for: reading a result needs no torch."""
        from clkit.checkpoint import CheckpointStore

        return CheckpointStore(self.path / "checkpoints", self._keep)

    @contextlib.contextmanager
    def locked(self, *, to_read: bool = False) -> Iterator[None]:
        """Hold the run directory for this process; a second process is refused. May be nested.

        ``to_read``: where this process can't write it holds nothing; it can read all the same.

        Raises:
            BusyError: another process holds it.
            CheckpointError: the directory can't be made or written.
        """
        if to_read and self.path.is_dir() and not os.access(self.path, os.W_OK):
            yield
            return
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise CheckpointError(f"{self.path}: no permission to write. Choose another output_dir.")
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise BusyError(
                    f"{self.path}: another process is running in this directory. "
                    "Wait for it, or choose another output_dir."
                ) from None
        try:
            yield
        finally:
            self._lock.release()
            if not self._lock.is_locked:
                self._close()

    def clear(self) -> None:
        """Delete what an earlier run left (``--fresh``), and nothing else.

        Where there is neither run.json nor status.json was no run: what has a run's file names there is someone else's.
        """
        if not any(os.path.lexists(self.path / name) for name in _MARKS):
            return
        for name in _OWN:
            entry = self.path / name
            with disk_errors(entry):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)

    # --- configuration ----------------------------------------------------------------------------------------------
    def begin(self, config: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write ``config.yaml`` and ``run.json``, or check that they are those of the run that is here.

        A run that failed before its first checkpoint has learned nothing: another one may take its place, but for one
        that spent privacy, whose count of noisy steps is not to be lost.

        Raises:
            CheckpointError: the directory holds a run with another configuration or other data, or a damaged run.
        """
        file = self.path / "config.yaml"
        if file.exists():
            changed = self.differences(config, facts["data"])
            if not (changed and self._in_vain):
                self._refuse(changed, _clkit_versions(self._object("run.json"), facts))
                return
            self.clear()
        elif self.checkpoints.list():
            raise CheckpointError(
                f"{file}: missing, though there are checkpoints. "
                "Restore it, choose another output_dir, or start again with --fresh."
            )
        write_json(self.path / "run.json", facts)
        write_text(file, OmegaConf.to_yaml(OmegaConf.create(config)))

    @property
    def _in_vain(self) -> bool:
        """Whether the run that is here stopped before anything of it was kept."""
        ended = self.state.get("state") in ("failed", "interrupted")
        kept = [p for p in (self.path / "checkpoints").glob("*") if not p.name.startswith(".")]
        kept += [p for p in (self.path / "matrix.json", self.path / "noisy_steps.txt") if os.path.lexists(p)]
        return ended and not kept

    def differences(self, config: dict[str, Any], data: dict[str, Any]) -> list[str]:
        """Where the run that is here differs in what changes its numbers; empty when there is none.

        Args:
            config: a resolved configuration.
            data: fingerprints of its tasks, as in ``run.json``.

        Raises:
            CheckpointError: what is here is damaged.
        """
        file = self.path / "config.yaml"
        if not file.exists():
            return []
        here = self._object("run.json")
        if not isinstance(here.get("data"), dict):
            ours = any(os.path.lexists(self.path / name) for name in _MARKS)
            mend = _MEND if ours else "If it is not a run's, choose another output_dir; else restore run.json."
            raise CheckpointError(f"{file}: next to it is no run.json that says what data was used. {mend}")
        return self._changes(config) + _differences(here["data"], data, "data")

    def bind_model(self, provenance: dict[str, Any]) -> None:
        """Write where the weights come from into ``run.json``, or check that they are those of the run that is here."""
        facts = self._object("run.json")
        if "model" not in facts:
            self.write("run.json", facts | {"model": provenance})
        elif isinstance(facts["model"], dict):
            self._refuse(_differences(facts["model"].get("weights"), provenance.get("weights"), "model.weights"))
        else:
            raise CheckpointError(f"{self.path / 'run.json'}: 'model' is not an object. {_MEND}")

    def _changes(self, config: dict[str, Any]) -> list[str]:
        """Where the configuration of the run that is here differs; options it did not know have their defaults."""
        try:
            old = read_file(self.path / "config.yaml")
        except ConfigError as error:
            raise CheckpointError(f"{error}. {_MEND}") from error
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{self.path / 'config.yaml'}: can't be read ({reason}). {_MEND}") from error
        if not old:
            raise CheckpointError(f"{self.path / 'config.yaml'}: is empty. {_MEND}")
        changed = _differences(fixed(old), fixed(config))
        if changed:
            with contextlib.suppress(ClkitError):  # options that are gone, or plug-ins: compare what is written
                changed = _differences(fixed(to_dict(validate(old))), fixed(config))
        return changed

    def _refuse(self, changed: list[str], note: str = "") -> None:
        if changed:
            shown = changed[:10] + ([f"... and {len(changed) - 10} more"] if len(changed) > 10 else [])
            raise CheckpointError(
                f"{self.path}: holds a run with another configuration:\n  "
                + "\n  ".join(shown)
                + note
                + "\nChoose another output_dir, restore the configuration, or start again with --fresh."
            )

    def read(self, name: str) -> Any:
        """The content of a JSON file, or None when it is not there."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self.path / name}: can't be read ({error}). {_MEND}") from error

    def _object(self, name: str) -> dict[str, Any]:
        """The JSON object in a file, empty when the file is not there."""
        value = self.read(name)
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{self.path / name}: is not a JSON object. {_MEND}")
        return value or {}

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file atomically; NaN becomes null."""
        write_json(self.path / name, finite(value))

    def write_rows(self, name: str, rows: Sequence[Any]) -> None:
        """Write a JSON-lines file atomically; no file without rows."""
        if rows:
            lines = (json.dumps(finite(row), ensure_ascii=False) for row in rows)
            write_text(self.path / name, "".join(f"{line}\n" for line in lines))

    def status(self, state: str, **detail: Any) -> None:
        """Write ``status.json``: running, finished, interrupted or failed, and what the run cost so far."""
        if self._meter is not None:
            detail["cost"] = self._meter.total()
        write_json(self.path / "status.json", {"state": state, **detail, "time": round(time.time(), 3)})

    @property
    def state(self) -> dict[str, Any]:
        """What ``status.json`` says; empty where there is none."""
        return self._object("status.json")

    @property
    def finished(self) -> bool:
        """Whether the run that is here came to its end and its result is there."""
        with disk_errors(self.path):  # a name that is too long for the disk
            whole = all((self.path / name).is_file() for name in ("matrix.json", "metrics.json"))
        return whole and self.state.get("state") == "finished"

    @contextlib.contextmanager
    def recording_failure(self) -> Iterator[None]:
        """Write into ``status.json`` why the run stopped, when it stops early, and measure its cost. May be nested."""
        if self._meter is None:
            self._meter = Meter(self.state.get("cost"))
        try:
            yield
        except BaseException as error:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            if state == "interrupted" and not error.args:
                again = "the same call or command again goes on from the last checkpoint"
                error.args = (f"{self.path}: interrupted; {again}",)  # the last line of the traceback that Python shows
            with contextlib.suppress(CheckpointError):  # a full disk must not hide the error itself
                self.status(state, reason=str(error) or type(error).__name__)
            raise

    # --- events -----------------------------------------------------------------------------------------------------
    def open_events(self, offset: int) -> None:
        """Go on with ``events.jsonl`` at byte ``offset``; what was written after the checkpoint is cut off.

        Until it is called, events go nowhere: a run that is only read leaves its file alone.
        """
        self._close()
        path = self.path / "events.jsonl"
        with disk_errors(path):
            path.touch()
            self._events = path.open("r+b")
            size = self._events.seek(0, os.SEEK_END)
            if size < offset:  # lost with the disk's cache: go on after the last line that is whole
                self._events.seek(0)
                offset = self._events.read().rfind(b"\n") + 1
            self._events.truncate(offset)
            self._events.seek(0, os.SEEK_END)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one JSON object."""
        if self._events is not None:
            line = json.dumps(finite({"event": kind, **fields}), ensure_ascii=False)
            with disk_errors(self.path / "events.jsonl"):
                self._events.write(line.encode() + b"\n")
                self._events.flush()

    def events_offset(self) -> int:
        """Bytes of events so far, on disk."""
        if self._events is None:
            return 0
        with disk_errors(self.path / "events.jsonl"):
            os.fsync(self._events.fileno())
        return int(self._events.tell())

    def _close(self) -> None:
        events, self._events = self._events, None
        if events is not None:
            with contextlib.suppress(OSError):  # it tries once more to write the line that `event` could not
                events.close()


class Follower(RunDirectory):
    """The run directory as every process but the first sees it: it reads and never writes."""

    @cached_property
    def checkpoints(self) -> CheckpointStore:
        """Read only."""
        from clkit.checkpoint import FollowerStore

        return FollowerStore(self.path / "checkpoints", self._keep)

    @contextlib.contextmanager
    def locked(self, *, to_read: bool = False) -> Iterator[None]:
        """The first process holds the lock."""
        yield

    def clear(self) -> None:
        """Nothing."""

    def begin(self, config: dict[str, Any], facts: dict[str, Any]) -> None:
        """Nothing."""

    def bind_model(self, provenance: dict[str, Any]) -> None:
        """Nothing."""

    def write(self, name: str, value: Any) -> None:
        """Nothing."""

    def write_rows(self, name: str, rows: Sequence[Any]) -> None:
        """Nothing."""

    def status(self, state: str, **detail: Any) -> None:
        """Nothing."""

    def open_events(self, offset: int) -> None:
        """Nothing: events go nowhere."""


def run_directory(path: str | Path, keep: int, main: bool) -> RunDirectory:
    """The run directory for this process; ``main``: it is the one that writes."""
    return RunDirectory(path, keep) if main else Follower(path, keep)


def fixed(config: Any) -> dict[str, Any]:
    """The options of a resolved configuration that change a run's numbers."""
    return {k: v for k, v in config.items() if k not in _FREE}


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in sorted({*old, *new}, key=str):
            found += _differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
        return found
    return [] if old == new else [f"{where}: {_short(old)} -> {_short(new)}"]


def _clkit_versions(old: dict[str, Any], new: dict[str, Any]) -> str:
    """A line for an error message when two versions of clkit met."""
    then, now = (
        facts["versions"].get("clkit") if isinstance(facts.get("versions"), dict) else None for facts in (old, new)
    )
    return "" if then == now else f"\nThe run was made by clkit {then or '(unknown)'}; this is clkit {now}."


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def finite(value: Any) -> Any:
    """Plain data as they are written: what is NaN or infinite becomes None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value
