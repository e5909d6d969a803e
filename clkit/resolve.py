"""From YAML and key=value overrides to a RunConfig: every problem found at once, before anything is loaded."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clkit.config import Plugin, RunConfig
from clkit.engine import ENGINES
from clkit.errors import CapabilityError, ConfigError, Problem, Unsupported, did_you_mean
from clkit.evaluation import SCORERS
from clkit.listing import shipped
from clkit.registry import STRATEGIES, Registry
from clkit.tasks import SOURCES

# Sections whose options depend on a plug-in: which key names it, and where plug-ins are registered.
_PLUGINS: dict[str, tuple[str, Registry[Any], str]] = {
    "tasks": ("source", SOURCES, "facts"),
    "strategy": ("name", STRATEGIES, "naive"),
    "engine": ("name", ENGINES, "local"),
}
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
T = typing.TypeVar("T")
_MISSING = object()
_SHORT = {section: key for section, (key, _, _) in _PLUGINS.items()} | {"model": "name"}


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``key=value`` overrides, validate.

    Raises:
        ConfigError: one error with all problems, as ``file:key: problem``.
    """
    return validate(read(path, overrides), origin=str(path), overridden=[o.partition("=")[0] for o in overrides])


def read(path: str | Path, overrides: Sequence[str] = (), *, interpolate: bool = True) -> dict[str, Any]:
    """The plain content of a configuration file with overrides applied; as a rule with interpolations resolved."""
    return merge(read_file(find(path)), overrides, origin=str(path), interpolate=interpolate)


def find(path: str | Path) -> Path:
    """A file as given, or the configuration of that name that is shipped with clkit.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(path)
    if path.is_file():
        return path
    known = shipped()
    if path.name.removesuffix(".yaml") in known and path.parent in (Path(), Path("configs")):
        return known[path.name.removesuffix(".yaml")]
    raise ConfigError(
        f"{path}: no such file, and no configuration of that name is shipped."
        f"{did_you_mean(path.name, known)} Shipped: {', '.join(known)} (clkit ls configs)."
    )


def read_file(path: Path) -> dict[str, Any]:
    """Parse YAML; a mistake in it is reported with its line."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise ConfigError(f"{where}: not valid YAML ({getattr(error, 'problem', error)})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping of sections (got {type(content).__name__})")
    return typing.cast(dict[str, Any], content)


def merge(
    content: Mapping[str, Any],
    overrides: Sequence[str],
    origin: str = "",
    *,
    values: Mapping[str, Any] | None = None,
    interpolate: bool = True,
) -> dict[str, Any]:
    """Apply overrides in order, after those of the form ``section=name``, which put a plug-in with its defaults there.

    Args:
        content: plain data.
        overrides: ``key=value`` texts.
        origin: the file it came from, for messages.
        values: plain data by dotted key, put in after the overrides; a mapping is a change of the section at its key.
        interpolate: put values in the place of ``${...}``.

    Raises:
        ConfigError: an override is not key=value, or an interpolation can't be resolved.
    """
    config = OmegaConf.create({k: _expand(k, v) for k, v in content.items()})
    problems = []
    # Naming a plug-in takes all options of its section away, so that comes before options of the new one.
    for override in sorted(overrides, key=lambda o: o.partition("=")[0] not in _SHORT):
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(
                Problem("command line", f"'{override}' is not an override (expected key=value, such as train.epochs=3)")
            )
            continue
        try:
            value = OmegaConf.from_dotlist([override])
            if key in _SHORT:
                config[key] = _expand(key, OmegaConf.to_container(value)[key])  # type: ignore[index, call-overload]
            else:
                alone = typing.cast(Any, OmegaConf.to_container(OmegaConf.from_dotlist([f"x={text}"])))["x"]
                if isinstance(alone, (int, float)) and _is_text(config, key):
                    OmegaConf.update(value, key, text.strip())  # 007 is not 7, and no is not False
                config = typing.cast(Any, OmegaConf.merge(config, value))
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
            problems.append(Problem(f"command line:{key}", f"can't be applied ({str(error).splitlines()[0]})"))
    for key, value in (values or {}).items():
        try:
            if key in _SHORT:
                config[key] = _expand(key, value)
            else:
                OmegaConf.update(config, key, value, merge=True, force_add=True)
        except (OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
            problems.append(Problem(key, f"can't be set ({str(error).splitlines()[0]})"))
    if problems:
        raise ConfigError.collect("The overrides are not usable:", problems)
    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=interpolate))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}:{getattr(error, 'full_key', '') or ''}: {str(error).splitlines()[0]}") from error


def _is_text(config: Any, key: str) -> bool:
    """Whether the option at a dotted key is a text, whatever YAML takes its value for."""
    first, *rest = key.split(".")
    at: Any = RunConfig
    if first in _PLUGINS:
        name, registry, default = _PLUGINS[first]
        section = config.get(first)
        chosen = section.get(name, default) if OmegaConf.is_dict(section) else default
        at = registry.get(chosen).config_class if chosen in registry else None
    else:
        rest = [first, *rest]
    for part in rest:
        at = typing.get_type_hints(at).get(part) if dataclasses.is_dataclass(at) else None
    return at is str


def _expand(section: str, value: Any) -> Any:
    """``strategy: naive`` stands for ``strategy: {name: naive}``."""
    return {_SHORT[section]: value} if section in _SHORT and isinstance(value, str) else value


def validate(content: Mapping[str, Any], origin: str = "config", overridden: Iterable[str] = ()) -> RunConfig:
    """Check plain content against the schema and every plug-in's own, and build the RunConfig.

    Raises:
        ConfigError: one error with all problems.
        CapabilityError: the only problems are options of another engine.
    """
    problems: list[Problem] = []
    if "sweep" in content:
        problems.append(Problem("sweep", "this is a sweep of many runs; start it with `clkit sweep`"))
    content = {k: _expand(k, v) for k, v in content.items() if k != "sweep"}
    plain = {k: v for k, v in content.items() if k not in _PLUGINS}
    config: RunConfig = _fill(RunConfig, plain, "", problems, skip=_PLUGINS)
    known = set()
    for section, (key, registry, default) in _PLUGINS.items():
        plugin = _plugin(section, content.get(section), key, registry, default, problems)
        if plugin is not None:
            setattr(config, section, plugin)
            known.add(section)
    problems += _not_of(problems, _place(config))
    config.name = config.name or Path(config.output_dir).absolute().name
    problems += _not_of(problems, _cross_checks(config, known))
    if problems:
        over = set(overridden)
        located = [Problem(f"{'command line' if p.where in over else origin}:{p.where}", p.what) for p in problems]
        count = f"{len(located)} problem{'s' if len(located) > 1 else ''}"
        kind = CapabilityError if all(isinstance(p, Unsupported) for p in problems) else ConfigError
        raise kind.collect(f"The configuration has {count}:", located)
    return config


def _place(config: RunConfig) -> list[Problem]:
    """Put the user's home in the place of ``~`` in `output_dir`, which no shell does behind ``output_dir=``."""
    if not config.output_dir:
        return [Problem("output_dir", "is empty; give a directory (. is the current one)")]
    if config.output_dir.startswith("~"):
        try:
            config.output_dir = str(Path(config.output_dir).expanduser())
        except RuntimeError as error:  # ~name, of a user that there is not
            return [Problem("output_dir", f"{error} (got '{config.output_dir}')")]
    return []


def options(cls: type, overrides: Sequence[str], where: str = "") -> Any:
    """An options dataclass from ``key=value`` texts.

    Raises:
        ConfigError: one error with all problems.
    """
    problems: list[Problem] = []
    filled = _fill(cls, merge({}, overrides, origin=where), where, problems)
    if problems:
        raise ConfigError.collect("The options are not usable:", problems)
    return filled


def _plugin(
    section: str, raw: Any, key: str, registry: Registry[Any], default: str, problems: list[Problem]
) -> Plugin | None:
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        problems.append(Problem(section, f"got {raw!r}, expected a mapping with '{key}' and its options"))
        return None
    name = raw.get(key, default)
    if not isinstance(name, str) or name not in registry:
        problems.append(Problem(f"{section}.{key}", registry.unknown(str(name))))
        return None
    try:
        target = registry.get(name)
    except ConfigError as error:
        problems.append(Problem(f"{section}.{key}", str(error)))
        return None
    options = {k: v for k, v in raw.items() if k != key}
    before = len(problems)
    elsewhere = target.elsewhere(options) if hasattr(target, "elsewhere") else {}
    problems += [Unsupported(f"{section}.{option}", why) for option, why in elsewhere.items()]
    options = {k: v for k, v in options.items() if k not in elsewhere}
    filled = _fill(target.config_class, options, f"{section}.", problems, extra=(key,))
    if hasattr(target, "check"):
        problems += _not_of(problems[before:], target.check(filled))
    return Plugin(name, filled)


def _not_of(told: Sequence[Problem], found: Iterable[Problem]) -> list[Problem]:
    """What was found with defaults in the place of wrong values, without what those may be the reason of."""
    wrong = {p.where.rpartition(".")[2] for p in told}
    wrong |= {near for p in told for near in re.findall(r"Did you mean '(\w+)'", p.what)}
    return [p for p in found if not wrong & {p.where.rpartition(".")[2], *re.findall(r"\w+", p.what)}]


def section(cls: type[T], raw: Mapping[Any, Any], prefix: str, problems: list[Problem]) -> T:
    """A dataclass of options from plain data; what is wrong with it is added to ``problems`` under ``prefix + key``."""
    return typing.cast(T, _fill(cls, raw, prefix, problems))


def lookup(content: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key in plain content, or its default; a plug-in's section stands for its name.

    Raises:
        KeyError: there is no such option.
    """
    key = f"{key}.{_SHORT[key]}" if key in _SHORT else key
    first, *rest = key.split(".")
    at: Any = _expand(first, content.get(first, {}))
    for part in rest:
        at = at.get(part, _MISSING) if isinstance(at, Mapping) else _MISSING
    if at is not _MISSING and (rest or first in content):
        return at
    if first in _PLUGINS:
        name, registry, default = _PLUGINS[first]
        chosen = _expand(first, content.get(first) or {}).get(name, default)
        if rest == [name]:
            return chosen
        at = registry.get(chosen).config_class() if chosen in registry else None
    else:
        at, rest = RunConfig(), [first, *rest]
    for part in rest:
        if not dataclasses.is_dataclass(at) or not hasattr(at, part):
            raise KeyError(key)
        at = getattr(at, part)
    return at


def _fill(
    cls: type,
    raw: Mapping[Any, Any],
    prefix: str,
    problems: list[Problem],
    skip: Iterable[str] = (),
    extra: tuple[str, ...] = (),
    base: Any = None,
) -> Any:
    """Build ``cls`` (or change a copy of ``base``) from plain values; what does not fit becomes a problem."""
    base = cls() if base is None else base
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in skip}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    node = OmegaConf.structured(_leaves(cls, fields, hints))
    for key, value in raw.items():
        where = f"{prefix}{key}"
        if key not in fields:
            known = [*extra, *fields, *skip]
            problems.append(
                Problem(where, f"unknown key.{did_you_mean(str(key), known)} Known here: {', '.join(known)}")
            )
        elif dataclasses.is_dataclass(hints[key]):
            if isinstance(value, Mapping):
                values[key] = _fill(
                    typing.cast(type, hints[key]), value, f"{where}.", problems, base=getattr(base, key)
                )
            else:
                problems.append(Problem(where, f"got {value!r}, expected a mapping of options"))
        else:
            try:
                # `key=` without a value is YAML's null; where a text is expected it is an empty one.
                node[key] = "" if value is None and hints[key] is str else _widen(value, hints[key])
                values[key] = _plain(node[key])
            except (OmegaConfBaseException, LookupError, ValueError, TypeError):
                quotes = "; put it in quotes" if hints[key] is str and isinstance(value, (bool, float)) else ""
                problems.append(
                    Problem(where, f"wrong type (got {value!r}, expected {_type_name(hints[key])}{quotes})")
                )
                continue
            if wrong := _out_of_range(values[key], fields[key].metadata):
                problems.append(Problem(where, f"out of range (got {value!r}, expected {wrong})"))
    return dataclasses.replace(base, **values)


def _leaves(cls: type, fields: Mapping[str, Any], hints: Mapping[str, Any]) -> type:
    """A dataclass with only the plain fields of ``cls``, which is what OmegaConf types and converts."""
    plain = [
        (n, hints[n], dataclasses.field(default=f.default, default_factory=f.default_factory))
        if f.default is dataclasses.MISSING
        else (n, hints[n], dataclasses.field(default=f.default))
        for n, f in fields.items()
        if not dataclasses.is_dataclass(hints[n])
    ]
    return dataclasses.make_dataclass(f"{cls.__name__}Leaves", plain)


def _widen(value: Any, hint: Any) -> Any:
    """A value as its field wants it where that is plain: 1 as a learning rate, "3" as a number, 25 as a name.

    Raises:
        TypeError, ValueError: it would have to be guessed, such as the text that YAML took for 1.5 or True.
    """
    if isinstance(value, list):
        return [_widen(v, *typing.get_args(hint)[:1] or (None,)) for v in value]
    wanted = {hint, *typing.get_args(hint)}
    if isinstance(value, str) and not wanted & {str, Any, None}:
        number = next((kind for kind in (int, float) if kind in wanted), None)
        return number(value) if number else _TRUTH[value.lower()] if bool in wanted else value
    if hint is str and isinstance(value, (bool, float)):
        raise TypeError(f"{value} is no text")
    if not isinstance(value, int) or isinstance(value, bool) or int in wanted:
        return value
    if hint is bool:
        return {0: False, 1: True}[value]
    return float(value) if float in wanted else str(value) if hint is str else value


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _out_of_range(value: Any, meta: Mapping[str, Any]) -> str:
    """What was expected, or an empty string when the value is in range."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high, above = meta.get("min"), meta.get("max"), meta.get("above")
        if (low is not None or high is not None or above is not None) and not (
            math.isfinite(value)
            and (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
        ):
            bounds = [
                f">= {low}" if low is not None else "",
                f"> {above}" if above is not None else "",
                f"<= {high}" if high is not None else "",
            ]
            return " and ".join(b for b in bounds if b)
    choices: tuple[str, ...] = meta.get("choices", ())
    wrong = [v for v in (value if isinstance(value, list) else [value]) if choices and v not in choices]
    if wrong:
        return f"one of {', '.join(choices)}.{did_you_mean(str(wrong[0]), choices)}"
    return ""


def _cross_checks(config: RunConfig, known: Collection[str]) -> list[Problem]:
    """Problems between sections, of which ``known`` name the plug-ins that there are."""
    from clkit.models import check as check_model

    problems = [
        Problem(p.where if p.where.startswith("model") else f"model.{p.where}", p.what)
        for p in check_model(config.model)
    ]
    abilities = STRATEGIES.get(config.strategy.name).capabilities
    if {"strategy", "engine"} <= set(known) and config.engine.name not in abilities.engines:
        engines = ", ".join(sorted(abilities.engines))
        problems.append(
            Problem(
                "engine.name",
                f"strategy '{config.strategy.name}' does not run on '{config.engine.name}' (expected {engines})",
            )
        )
    if abilities.needs_lora and config.model.lora.r == 0:
        problems.append(
            Problem("model.lora.r", f"strategy '{config.strategy.name}' needs a LoRA adapter (got 0, expected >= 1)")
        )
    if len(config.train.betas) != 2 or not all(0 <= b < 1 for b in config.train.betas):
        problems.append(Problem("train.betas", f"got {config.train.betas}, expected two numbers in [0, 1)"))
    problems += [Problem("eval.also", SCORERS.unknown(name)) for name in config.eval.also if name not in SCORERS]
    for name in sorted({name for name in config.eval.also if config.eval.also.count(name) > 1}):
        problems.append(Problem("eval.also", f"'{name}' is listed twice"))
    if config.eval.lm_eval:
        from clkit.tasks.harness import problems as harness_problems

        problems += harness_problems(config.eval.lm_eval)
    for i, overrides in enumerate(config.compare):
        problems += [Problem(f"compare[{i}]", f"got {o!r}, expected key=value") for o in overrides if "=" not in o]
    return problems


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain data, every default written out; :func:`validate` reads it back."""
    bare = copy.copy(config)
    for section in _PLUGINS:
        setattr(bare, section, None)
    plain = dataclasses.asdict(bare)
    for section, (key, _, _) in _PLUGINS.items():
        plugin: Plugin = getattr(config, section)
        plain[section] = {key: plugin.name, **(dataclasses.asdict(plugin.config) if plugin.config is not None else {})}
    return plain
