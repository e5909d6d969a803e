"""The Editor: load a model, edit it, ask it, see why it answers, take edits back, save."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clkit.config import Plugin
from clkit.editing import judging
from clkit.editing.journal import Journal
from clkit.editing.request import EditRequest, asked, checked, conflicts, lasting, replaced
from clkit.editing.store import (
    Saved,
    check_base,
    fingerprint,
    held,
    make_strategy,
    read_edits,
    state_of,
    states,
    write_head,
)
from clkit.editing.strategy import EditStrategy, Explanation, language_model
from clkit.engine.local import pick_device
from clkit.errors import CheckpointError, ClkitError, ConfigError, ModelError, Problem, RequestError, did_you_mean
from clkit.evaluation.base import evaluation_mode
from clkit.files import disk_errors
from clkit.models import load_model
from clkit.models.causal_lm import CausalLM
from clkit.models.encoded_text import EncodedText
from clkit.models.precision import DTYPES, pick_dtype
from clkit.models.resolve import resolve
from clkit.modes import plainly
from clkit.resolve import validate
from clkit.rng import fresh_generator
from clkit.signals import Interrupted, stop_on_signal
from clkit.tasks.base import EditRecord, TextRecord

ON_CONFLICT = ("error", "replace")


@dataclass(frozen=True)
class Rollback:
    """What a rollback changed.

    Attributes:
        removed: ids of the edits that are gone.
        relearned: ids of edits in the same memory, learned again without them.
    """

    removed: tuple[str, ...]
    relearned: tuple[str, ...]


@contextlib.contextmanager
def _undivided(done: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until model, list and journal say the same again; a second one does not wait.

    Raises:
        Interrupted: one came; what is within is done.
    """
    stop: list[bool] = []
    with stop_on_signal(lambda: stop.append(True)):
        yield
    if stop:
        raise Interrupted(f"interrupted, after {done}")


class Editor:
    """A language model and the edits on it.

    Made by :meth:`load`. With a directory every edit is on the disk before the next one begins: the state is written
    whole, then a line is added to ``journal.jsonl``. Only one process at a time edits in a directory.

    Attributes:
        model: the language model; ``model.module`` is an ordinary transformers model that answers with the edits.
        strategy: the method.
        records: active edits by id, in the order in which they were learned.
        journal: what was done.
        directory: where everything is kept, or None.
    """

    def __init__(
        self,
        model: CausalLM,
        strategy: EditStrategy,
        plugin: Plugin,
        seed: int = 0,
        directory: Path | None = None,
        base: str | None = None,
    ) -> None:
        self.model, self.strategy, self.seed = model, strategy, seed
        self.records: dict[str, EditRecord] = {}
        self.journal = Journal()
        self.directory: Path | None = None
        self._newest: str | None = None  # the state in the directory that this one wrote or read
        self._owed: dict[str, Any] | None = None  # a journal entry that could not be written yet (a full disk)
        self._settled = True  # whether the last batch of edits was finished
        self._plugin = plugin
        self._base = base or fingerprint(model.module)
        model.module.eval()
        strategy.attach(model, seed)
        if directory is not None:
            self._settle_in(directory)

    @classmethod
    def load(
        cls,
        model: str | Path,
        strategy: str | Mapping[str, Any] = "wise",
        *,
        directory: str | Path | None = None,
        seed: int = 0,
        device: str | None = None,
        **options: Any,
    ) -> Editor:
        """Load a model to edit, or a directory of edits with its model.

        Args:
            model: alias, hub id or directory of a model; or a directory written by :meth:`save`.
            strategy: a method's name, or its section of a configuration; a saved directory brings its own.
            directory: where edits are kept as they are made; one that holds edits is gone on with.
            seed: of the method.
            device: cpu or cuda; by default a GPU when there is one.
            **options: further options of the model. ``dtype``: what its weights are kept and computed in, float32 by
                default; edits are learned in float32 in any case. ``prompt``, ``max_length``.

        Raises:
            ConfigError, ModelError: an option is wrong, the model can't be loaded, or it is not the one of the edits.
            CapabilityError: there is no such device.
            CheckpointError: the directory can't be read.
            BusyError: another process is editing in ``directory``.

        Example:
            >>> editor = clkit.Editor.load("smollm2-135m", strategy="wise")  # doctest: +SKIP
        """
        home = Path(directory).resolve() if directory is not None else None  # the same place wherever the process goes
        place = pick_device(device or "auto", "device")
        with plainly(place), held(home) if home is not None else contextlib.nullcontext():
            return cls._load(model, strategy, home, seed, place, options)

    @classmethod
    def _load(
        cls,
        model: str | Path,
        strategy: str | Mapping[str, Any],
        home: Path | None,
        seed: int,
        place: torch.device,
        options: dict[str, Any],
    ) -> Editor:
        path = Path(model).resolve()
        source = next((p for p in (home, path) if p is not None and (p / "edits.json").is_file()), None)
        saved = read_edits(source, keeps=source == home) if source is not None else None
        if saved is not None:
            name = saved.model["name"] if source == path else str(model)
            options = {k: saved.model[k] for k in ("prompt", "max_length", "dtype") if k in saved.model} | options
            strategy, seed = saved.strategy, saved.seed
        else:
            name = str(model)
        if resolve(name).form in ("directory", "gguf"):
            name = str(Path(name).expanduser().resolve())
        options = {"dtype": "float32", **options}
        if options["dtype"] not in ("auto", *DTYPES):
            raise ConfigError(f"dtype: got '{options['dtype']}', expected one of auto, {', '.join(DTYPES)}")
        config = validate({"tasks": "facts", "model": {"lora": {"r": 0}, **options}}, origin="editing").model
        method, plugin = make_strategy(strategy)
        try:
            loaded = load_model(
                replace(config, name=name),
                generator=fresh_generator(seed, "model"),
                device=place,
            )
        except ModelError as error:
            if saved is None or name != saved.model["name"]:
                raise
            raise ModelError(
                f"{error}\nThe edits in {source} were made on it. If it lies in another place here, say where: "
                "Editor.load(MODEL, directory=EDITS), or --model MODEL."
            ) from error
        loaded.module.to(place)
        base = fingerprint(loaded.module)  # before float16 rounds them: it is that of the model, whatever `dtype` says
        kept = pick_dtype(options["dtype"], place)
        for parameter in loaded.module.parameters():  # none is trained, so none has to be float32; buffers have to be
            parameter.data = parameter.data.to(kept)
        if saved is not None and saved.base != base:
            check_base(loaded.module, saved)  # directories of before have that of the rounded weights
            base = saved.base
        editor = cls(language_model(loaded), method, plugin, seed, None, base)
        if saved is not None:
            editor._resume(saved, keep=source == home)
        if home is not None and (saved is None or source != home):
            editor._settle_in(home)
        return editor

    # --- editing ----------------------------------------------------------------------------------------------------
    def edit(
        self,
        requests: Iterable[EditRequest | Mapping[str, Any]] | Sequence[EditRecord],
        *,
        on_conflict: str = "error",
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Learn edits one after another; those that are active already are left out.

        Args:
            requests: what to change.
            on_conflict: ``error``, or ``replace``: the last of several answers to one prompt wins. Where it can't be
                learned, the one before is learned again.
            progress: gets each journal entry.

        Returns:
            The journal's entries of the edits made.

        Raises:
            RequestError: a request is malformed or conflicts with another; nothing was edited.
            DataError: an answer is too long for the model; nothing was edited.
            BusyError: another process is editing in the directory.
            CheckpointError: another one has edited there since it was loaded, or it can't be written.
            Interrupted: Ctrl-C; the edit that was being made is made. A KeyboardInterrupt.
        """
        given = list(requests)
        records = [r for r in given if isinstance(r, EditRecord)]
        if len(records) < len(given):
            records = checked(given)  # type: ignore[arg-type]
        self._check(records, on_conflict)
        with self._holding(), plainly(self.model.device):
            return self._learned(lasting(records), progress)

    def _learned(
        self, records: Sequence[EditRecord], progress: Callable[[dict[str, Any]], None] | None
    ) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        stop: list[bool] = []
        with stop_on_signal(lambda: stop.append(True)):  # an edit cut after its learning would stand nowhere
            for record in records:
                if self.holds(record):
                    continue
                earlier = replaced(record, self.records.values())
                if earlier:
                    self._take_back([r.id for r in earlier])
                try:
                    made.append(self._edit(record))
                except ClkitError:
                    for before in earlier if record.id not in self.records else []:
                        self._edit(before)
                    raise
                if progress is not None:
                    progress(made[-1])
                if stop:
                    again = "the same call or command again goes on from there"
                    raise Interrupted(f"interrupted, after edit '{record.id}'; {again}")
        if made or not self._settled:  # all may have been made by a process that was killed right after
            self.strategy.settle()
            self._settled = True
            self._keep(None)
        return made

    def _check(self, records: Sequence[EditRecord], on_conflict: str) -> None:
        if on_conflict not in ON_CONFLICT:
            raise RequestError(f"on_conflict: got '{on_conflict}', expected one of: {', '.join(ON_CONFLICT)}")
        problems = []
        seen: dict[str, EditRecord] = dict(self.records)
        for record in records:
            same = seen.setdefault(record.id, record)
            if asked(same) != asked(record):
                problems.append(Problem(f"edit '{record.id}'", "the id is used by another edit already"))
        if on_conflict == "error":
            problems += [
                Problem(
                    f"edit '{later.id}'",
                    f"{later.prompt!r} -> {later.target_new!r}, but edit '{earlier.id}' says {earlier.target_new!r}",
                )
                for earlier, later in conflicts(records, self.records.values())
            ]
        if problems:
            hint = " (on_conflict='replace' lets the last one win)" if on_conflict == "error" else ""
            raise RequestError.collect(f"Some edits conflict; nothing was edited{hint}:", problems)
        new = [(r.id, judging.queries(r)) for r in records if not self.holds(r)]
        rows = [TextRecord(*row, f"{i} ({query})") for i, found in new for query, row in found.items()]
        EncodedText(rows, self.model.form, self.model.max_length)  # refuses answers that do not fit

    def holds(self, record: EditRecord) -> bool:
        """Whether an edit is active: one with its id and its answer."""
        same = self.records.get(record.id)
        return same is not None and same.target_new == record.target_new

    def _edit(self, record: EditRecord) -> dict[str, Any]:
        entry = judging.learn(self.strategy, self.model, record)
        self.records[record.id] = record
        self._settled = False
        return self._record({"kind": "edit", **entry})

    def rollback(self, name: str) -> Rollback:
        """Take back an edit, or all edits of a memory.

        Args:
            name: id of an active edit, or a memory's name as in :meth:`explain`.

        Raises:
            RequestError: there is no such edit or memory.
            BusyError, CheckpointError: as for :meth:`edit`.
            Interrupted: Ctrl-C; all is taken back.
        """
        memories = self.memories()
        ids = [name] if name in self.records else memories.get(name, [])
        if not ids:
            known = [*self.records, *memories]
            raise RequestError(f"There is no active edit or memory '{name}'.{did_you_mean(name, known)}")
        with self._holding(), plainly(self.model.device), _undivided(f"'{name}' was taken back"):
            return self._take_back(ids)

    def _take_back(self, ids: list[str]) -> Rollback:
        again = self.strategy.forget(ids, dict(self.records))
        for i in ids:
            del self.records[i]
        self._record({"kind": "rollback", "ids": ids, "relearned": again})
        return Rollback(tuple(ids), tuple(again))

    def consolidate(self) -> bool:
        """Merge the finished memories of ``wise`` into one now, beside what its option ``merge_every`` does.

        One memory takes less room, and what its edits say mixes: measure before and after. An edit that is taken out
        of it later has all others in it learned again.

        Returns:
            Whether there were any to merge. Methods without several memories have none.

        Raises:
            BusyError, CheckpointError: as :meth:`edit`.
            Interrupted: Ctrl-C; they are merged.
        """
        with self._holding(), plainly(self.model.device), _undivided("memories were merged"):
            merged = self.strategy.consolidate()
            if merged:
                self._record({"kind": "merge", "memories": self.memories()})
        return merged

    def memories(self) -> dict[str, list[str]]:
        """The edits of each memory, by its name."""
        return {name: [i for i in ids if i in self.records] for name, ids in self.strategy.holdings().items()}

    # --- asking -----------------------------------------------------------------------------------------------------
    def generate(self, prompt: str, max_new_tokens: int = 64) -> str:
        """Answer a prompt greedily, to its natural end."""
        record = TextRecord(prompt, "the", "prompt")
        encoded = EncodedText([record], self.model.form, self.model.max_length)
        with evaluation_mode(self.model):
            return self.model.generate(encoded, [0], max_new_tokens)[0]

    def explain(self, prompt: str) -> Explanation:
        """Which memory answers a prompt, with which score, and which edits are nearest."""
        with evaluation_mode(self.model):
            return self.strategy.explain(prompt)

    def scores(self, record: EditRecord) -> dict[str, float]:
        """Teacher-forced token accuracy of prompt, rephrase and locality answer, as the model is now."""
        return self.judge(record)[0]

    def judge(self, record: EditRecord) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
        """:meth:`scores`, and how each of these queries was routed: see :func:`clkit.editing.judging.judge`."""
        return judging.judge(self.strategy, self.model, record)

    # --- keeping ----------------------------------------------------------------------------------------------------
    def save(self, directory: str | Path) -> Path:
        """Write the edits, without the base weights, into a new directory.

        Raises:
            CheckpointError: there are edits in it already, or it can't be written.
        """
        path = Path(directory)
        with held(path):
            if (path / "edits.json").exists():
                raise CheckpointError(f"{path}: holds edits already; choose another directory")
            if (path / "journal.jsonl").exists() and not states(path).list():  # a killed process left a state before it
                raise CheckpointError(f"{path}: has a journal.jsonl that is not of edits; choose another directory")
            with disk_errors(path):
                (path / "journal.jsonl").unlink(missing_ok=True)  # of a process that was killed while it wrote here
            states(path).save(self._state(self._owed))
            copy = Journal(path / "journal.jsonl")
            for entry in self.journal.entries:
                copy.append(entry)
            copy.complete(self._owed)
            write_head(path, self.model, self._plugin, self.seed, self._base)  # last: with it the directory counts
        return path

    def _settle_in(self, directory: Path) -> None:
        self.save(directory)
        self._newest = states(directory).newest()
        self.journal = Journal(directory / "journal.jsonl", self.journal.entries)
        self.directory = directory

    def _resume(self, saved: Saved, keep: bool) -> None:
        self.strategy.load_memory_state(dict(saved.state["memory"]))
        self.records, self._settled = saved.records(), saved.state["settled"]
        journal = Journal.open(saved.path / "journal.jsonl")
        if keep:
            journal.complete(saved.state["entry"])
            self.directory, self._newest = saved.path, states(saved.path).newest()
        self.journal = journal if keep else Journal(None, journal.entries)

    def _record(self, entry: dict[str, Any]) -> dict[str, Any]:
        self._owed = {"number": self.journal.next, "time": round(time.time(), 3), **entry}
        return self._written(self._owed)

    def _written(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Put what was done on the disk, state first; what can't be written is owed before all else."""
        self._keep(entry)
        self.journal.append(entry)
        self._owed = None
        return entry

    def _keep(self, entry: dict[str, Any] | None) -> None:
        if self.directory is not None:
            self._newest = states(self.directory).save(self._state(entry)).name

    @contextlib.contextmanager
    def _holding(self) -> Iterator[None]:
        """Hold the directory, if there is one, and refuse one in which something else was done in the meantime."""
        if self.directory is None:
            yield
            return
        with held(self.directory):
            if states(self.directory).newest() != self._newest:
                raise CheckpointError(
                    f"{self.directory}: another process has edited here since it was loaded. Load it again."
                )
            if self._owed is not None:
                self._written(self._owed)
            yield

    def _state(self, entry: dict[str, Any] | None) -> dict[str, Any]:
        last = entry or (self.journal.entries[-1] if self.journal.entries else None)
        return state_of(self.strategy, self.records, last, settled=self._settled)
