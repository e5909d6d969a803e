"""A directory of edits: safetensors and JSON without the base weights, checked against the base when it is loaded."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from clkit import __version__
from clkit.checkpoint import CheckpointStore, FollowerStore
from clkit.config import Plugin
from clkit.editing.strategy import EditStrategy
from clkit.errors import BusyError, CheckpointError, ConfigError, ModelError
from clkit.files import disk_errors, write_json
from clkit.models.causal_lm import CausalLM
from clkit.models.loading import load_tokenizer
from clkit.models.lora import base_parameters
from clkit.models.routing import forget_compiled
from clkit.registry import STRATEGIES
from clkit.resolve import validate
from clkit.tasks.base import EditRecord

_FORMAT = 1
_EDITS = "_clkit_edits"  # on a model that carries edits: where they came from
_DAMAGED = "Restore a backup, or make the edits again in another directory: journal.jsonl has their requests."
_CHUNK = 1 << 22  # values that are rounded and hashed at once


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over all weights, rounded to bfloat16; adapters do not count.

    The same for a model in float32 and in bfloat16, alone and inside peft; another for any other model or training.
    Takes about as long as reading the weights from a disk.
    """
    digest = hashlib.sha256()
    named = {name: p for name, p in base_parameters(module).items() if "lora_" not in name}
    for name in sorted(named):
        digest.update(f"{name} {tuple(named[name].shape)}".encode())
        for piece in torch.split(named[name].detach().reshape(-1), _CHUNK):
            digest.update(piece.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Saved:
    """What a directory of edits says.

    Attributes:
        path: the directory.
        model: as the user named it, with the options it was loaded with.
        strategy: name and options.
        seed: of the strategy.
        base: the fingerprint of the base weights.
        state: memories, records of the edits that are active, the newest journal entry, and whether the last batch of
            edits was finished.
    """

    path: Path
    model: Mapping[str, Any]
    strategy: Mapping[str, Any]
    seed: int
    base: str
    state: Mapping[str, Any]

    def records(self) -> dict[str, EditRecord]:
        """The active edits by id, in the order in which they were learned."""
        return {r["id"]: EditRecord(**r) for r in self.state["records"]}


def write_head(directory: Path, model: CausalLM, plugin: Plugin, seed: int, base: str) -> None:
    """Write what never changes: model, strategy and the tokenizer."""
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        model.tokenizer.save_pretrained(directory)
    head = {
        "format": _FORMAT,
        "clkit": __version__,
        "model": {
            "name": model.name,
            "prompt": "chat" if model.form.chat else "plain",
            "max_length": model.max_length,
            "dtype": str(next(model.module.parameters()).dtype).removeprefix("torch."),
            "origin": model.provenance.get("origin", ""),
        },
        "strategy": {"name": plugin.name, **asdict(plugin.config)},
        "seed": seed,
        "base": base,
    }
    write_json(directory / "edits.json", head)


def state_of(
    strategy: EditStrategy, records: Mapping[str, EditRecord], entry: Mapping[str, Any] | None, *, settled: bool
) -> dict[str, Any]:
    """What is saved after each edit; ``settled`` says whether ``strategy.settle`` came after the last one."""
    active = [asdict(r) for r in records.values()]
    return {"memory": strategy.memory_state(), "records": active, "entry": entry, "settled": settled}


def write_edits(
    directory: Path,
    strategy: EditStrategy,
    model: CausalLM,
    plugin: Plugin,
    seed: int,
    records: Mapping[str, EditRecord],
) -> str:
    """Write a directory of edits; returns the snippet that loads it."""
    with strategy.unedited():
        base = fingerprint(model.module)
    write_head(directory, model, plugin, seed, base)
    states(directory).save(state_of(strategy, records, None, settled=True))
    return (
        "import clkit\n"
        f"editor = clkit.Editor.load({str(directory)!r})\n"
        "# or, on a transformers model that is in memory already:\n"
        f"# from clkit.editing import attach; attach(model, {str(directory)!r})\n"
    )


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold a directory of edits for this process; a second one is refused. May be nested.

    Raises:
        BusyError: another process, or another thread, holds it.
        CheckpointError: the directory can't be made or written.
    """
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory.resolve() / ".lock", is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BusyError(
                f"{directory}: another process is editing here. Wait for it, or choose another directory."
            ) from None
    try:
        yield
    finally:
        lock.release()


def states(directory: Path) -> CheckpointStore:
    """Where a directory keeps its states: written whole, verified when read, the newest two kept."""
    return CheckpointStore(directory / "state", keep=2, advice=_DAMAGED)


def read_edits(directory: str | Path, keeps: bool = False) -> Saved:
    """Read a directory of edits.

    Args:
        directory: of edits.
        keeps: this process holds it, and sets damaged states aside; else nothing in it is changed.

    Raises:
        CheckpointError: it is none, it is damaged, or a newer clkit wrote it.
    """
    path = Path(directory)
    try:
        head = json.loads((path / "edits.json").read_text(encoding="utf-8"))
        parts = head["model"], head["strategy"], int(head["seed"]), str(head["base"])
        written = int(head["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no directory of edits (edits.json: {error}).") from error
    if written > _FORMAT:
        raise CheckpointError(f"{path}: written in format {written} by a newer clkit; this one reads {_FORMAT}.")
    state = (states(path) if keeps else FollowerStore(path / "state", advice=_DAMAGED)).load()
    if state is None:
        raise CheckpointError(f"{path}: there is no saved state in it.")
    return Saved(path, *parts, state)


def make_strategy(section: str | Mapping[str, Any]) -> tuple[EditStrategy, Plugin]:
    """An editing strategy by its name or its section of a configuration.

    Raises:
        ConfigError: it is unknown, an option is wrong, or it does not edit.
    """
    plugin = validate({"tasks": "facts", "strategy": section}, origin="editing").strategy
    made = STRATEGIES.get(plugin.name)(plugin.config)
    if not isinstance(made, EditStrategy):
        able = [n for n in STRATEGIES.names() if "edit" in STRATEGIES.get(n).capabilities.kinds]
        raise ConfigError(f"strategy: '{plugin.name}' does not edit; take one of: {', '.join(able)}")
    return made, plugin


def attach(model: nn.Module, directory: str | Path, *, check: bool = True) -> EditStrategy:
    """Put saved edits on a transformers model that is in memory, with or without a peft adapter.

    Its ``generate``, pipelines and servers then answer with the edits, without further change. What ``torch.compile``
    made so far in this process is compiled anew.

    Args:
        model: the same base model as the edits were made on.
        directory: written by ``Editor.save``, or the export of a run.
        check: refuse a model with other base weights; switch it off for a quantised copy of the same model.

    Returns:
        The strategy; its ``detach()`` takes the edits off again.

    Raises:
        CheckpointError: the directory can't be read.
        ModelError: the model has other base weights, or carries edits already.
    """
    saved = read_edits(directory)
    model = getattr(model, "_orig_mod", model)  # what torch.compile gave back; it is compiled anew below
    unwrapped: Any = getattr(model, "get_base_model", None)  # peft's
    base = model if unwrapped is None else unwrapped()
    if _EDITS in base.__dict__:
        raise ModelError(
            f"This model carries the edits of {base.__dict__[_EDITS]} already, and edits on top of edits are "
            "neither's. Call detach() of what attach returned, or load the model anew."
        )
    if check:
        check_base(model, saved)
    tokenizer = load_tokenizer(saved.path, str(saved.path))
    options = {k: saved.model[k] for k in ("prompt", "max_length")}
    strategy, _ = make_strategy(saved.strategy)
    strategy.attach(CausalLM(saved.model["name"], model, tokenizer, **options), saved.seed)
    take_off = strategy.detach

    def detach() -> None:
        take_off()
        base.__dict__.pop(_EDITS, None)

    strategy.detach = detach  # type: ignore[method-assign]
    base.__dict__[_EDITS] = str(saved.path)
    try:
        strategy.load_memory_state(saved.state["memory"])
    except BaseException:
        detach()
        raise
    forget_compiled()
    return strategy


def check_base(model: nn.Module, saved: Saved) -> None:
    """Refuse a model that the edits were not made on.

    Raises:
        ModelError: its base weights are others.
    """
    if fingerprint(model) != saved.base:
        raise ModelError(
            f"{saved.path}: these edits were made on '{saved.model['name']}' ({saved.model['origin'] or 'no origin'}), "
            "and this model has other weights. Load that model; or, for a copy of it that is quantised or in float16, "
            "clkit.editing.attach takes check=False."
        )
