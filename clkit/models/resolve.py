"""Decide what a model's name means, and find what is wrong with a model's configuration, before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from clkit.config import ModelConfig
from clkit.errors import Problem, did_you_mean
from clkit.models.aliases import ALIASES, Alias
from clkit.registry import Registry

Form = Literal["alias", "built-in", "directory", "gguf", "hub", "unknown"]

#: Architectures that are built rather than loaded; other packages add theirs by entry point. Each is a function
#: ``build(config: ModelConfig, input_shape, generator) -> Backbone``.
architectures: Registry[Any] = Registry("model", "clkit.models")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a model's name means.

    Attributes:
        form: where the model comes from; ``unknown`` when it can't be found, and ``why`` says so.
        path: of a directory or a GGUF file.
        alias: of an alias.
    """

    name: str
    form: Form
    path: Path | None = None
    alias: Alias | None = None
    why: str = ""


def resolve(name: str) -> Resolved:
    """Decide what ``name`` means: alias, built-in architecture, directory, GGUF file, else a hub id.

    Reads the file system, never the network. A directory called like an alias is reached as ``./name``.

    >>> resolve("smollm2-135m").form, resolve("owner/some-model").form
    ('alias', 'hub')
    """
    if name in ALIASES:
        return Resolved(name, "alias", alias=ALIASES[name])
    if name in architectures:
        return Resolved(name, "built-in")
    path = Path(name).expanduser()
    if path.is_dir():
        why = _directory_problem(path)
        return Resolved(name, "unknown" if why else "directory", path=path, why=why)
    if path.suffix == ".gguf":
        if path.is_file():
            return Resolved(name, "gguf", path=path)
        return Resolved(name, "unknown", why=f"there is no file '{name}'")
    if path.is_file():
        return Resolved(name, "unknown", why=f"'{name}' is a file, but not a .gguf one; give its directory")
    if _HUB_ID.fullmatch(name):
        return Resolved(name, "hub")
    if any(c in name for c in "/\\~") or name.startswith("."):
        return Resolved(name, "unknown", why=f"there is no directory '{name}'")
    known = [*ALIASES, *architectures.names()]
    near = did_you_mean(name.lower(), known)
    why = f"unknown model '{name}'.{near} Known: {', '.join(dict.fromkeys(known))}; a hub id has the form owner/name"
    return Resolved(name, "unknown", why=why)


DEFAULT_RANK = 16


def settled(config: ModelConfig, num_classes: int | None) -> ModelConfig:
    """The configuration with the adapter's rank decided where the user left it open."""
    if config.lora.r is not None:
        return config
    return replace(config, lora=replace(config.lora, r=DEFAULT_RANK if num_classes is None else 0))


def _directory_problem(path: Path) -> str:
    """Why a directory is no model; empty when it is one."""
    if (path / "adapter_config.json").is_file():
        return f"'{path}' holds a PEFT adapter; give the model it belongs to"
    if not (path / "config.json").is_file():
        return f"'{path}' has no config.json, so it is no Hugging Face model directory"
    if not any(path.glob("*.safetensors")):
        return f"'{path}' has no .safetensors file (pickled weights are not loaded; save it again with transformers)"
    return ""


def check(config: ModelConfig, where: str = "model") -> list[Problem]:
    """Everything that is wrong with a model's configuration and can be known without loading or fetching.

    Args:
        config: with all values in range.
        where: how the section is called in messages.
    """
    found = resolve(config.name)
    problems: list[Problem] = []

    def problem(key: str, what: str) -> None:
        problems.append(Problem(f"{where}.{key}", what))

    lora = config.lora
    if found.form == "unknown":
        problem("name", found.why)
    if found.form == "built-in" or (found.alias is not None and found.alias.task == "image backbone"):
        if lora.r:
            problem("lora.r", f"'{config.name}' takes no LoRA adapter (got {lora.r}, expected 0)")
        if config.gradient_checkpointing:
            problem("gradient_checkpointing", f"'{config.name}' can't recompute activations; set it to false")
    if lora.r and config.freeze_backbone:
        problem("freeze_backbone", "a frozen backbone takes no LoRA adapter; set lora.r to 0, or this to false")
    if lora.r and not lora.target_modules:
        problem("lora.target_modules", "the list is empty; 'all-linear' takes every linear layer")
    if "all-linear" in lora.target_modules and len(lora.target_modules) > 1:
        problem("lora.target_modules", "'all-linear' stands alone; remove it or the other names")
    if config.name == "mlp" and (not config.hidden or min(config.hidden) < 1):
        problem("hidden", f"got {list(config.hidden)}, expected at least one width, all above 0")
    return problems


def describe() -> list[tuple[str, str]]:
    """Name and one line of every alias and every built-in architecture; imports none of them."""
    lines = {name: architectures.describe(name) for name in architectures.names()}
    lines |= {alias.name: alias.summary for alias in ALIASES.values()}
    return sorted(lines.items())
