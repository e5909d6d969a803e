"""Which of Avalanche's plug-ins run here, their options, and repairs of two of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch

from clkit.errors import CapabilityError, Problem, did_you_mean
from clkit.tasks.avalanche import importing, parse_scalar


@dataclass(frozen=True)
class Supported:
    """A plug-in whose state is known to be numbers, tensors and examples.

    Attributes:
        class_name: in ``avalanche.training.plugins``.
        text: whether it makes sense for language models too.
        unavailable: arguments that a configuration can't or must not set.
    """

    class_name: str
    text: bool = True
    unavailable: tuple[str, ...] = ()


SUPPORTED = {
    "ewc": Supported("EWCPlugin"),
    "si": Supported("SynapticIntelligencePlugin", unavailable=("device",)),
    "mas": Supported("MASPlugin", text=False, unavailable=("verbose",)),
    "rwalk": Supported("RWalkPlugin"),
    "lwf": Supported("LwFPlugin", text=False),
    "gem": Supported("GEMPlugin"),
    "agem": Supported("AGEMPlugin"),
    "replay": Supported("ReplayPlugin", unavailable=("storage_policy",)),
    "gdumb": Supported("GDumbPlugin", text=False),
}

# What the values of options must be; Avalanche looks at few of them before it uses them, which may be at a late task.
_COUNTS = ("mem_size", "batch_size", "batch_size_mem", "patterns_per_experience", "sample_size", "delta_t")
_FLAGS = ("keep_importance_data", "task_balanced_dataloader")
_PER_TASK = {"lwf": "alpha", "si": "si_lambda"}  # may be a list, with a number for each task

OWN_BATCHES = ("replay", "gdumb")  # what is trained on comes from the plug-in, not from the trainer's loader


def load() -> ModuleType:
    """Import ``avalanche.training.plugins``."""
    with importing():
        import avalanche.training.plugins
    return cast(ModuleType, avalanche.training.plugins)


def problems(name: str, options: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with a plug-in's name and options.

    Raises:
        CapabilityError: Avalanche has the plug-in, and it can't run here.
    """
    module = load()
    if name not in SUPPORTED:
        if others := [n for n in dir(module) if n.lower() in (name.lower(), f"{_letters(name)}plugin")]:
            raise CapabilityError(
                f"strategy.plugin: Avalanche's {others[0]} keeps a state that can't be saved and resumed exactly, or "
                f"replaces parts of the trainer. Supported: {', '.join(sorted(SUPPORTED))}."
            )
        what = f"unknown plug-in '{name}'.{did_you_mean(name, SUPPORTED)} Known: {', '.join(sorted(SUPPORTED))}"
        return [Problem("strategy.plugin", what)]
    target = getattr(module, SUPPORTED[name].class_name)
    parameters = inspect.signature(target).parameters
    allowed = [p for p in parameters if p not in SUPPORTED[name].unavailable]
    found = [
        Problem("strategy.options", f"'{key}' is no argument of {name}.{did_you_mean(key, allowed)} {_list(allowed)}")
        for key in options
        if key not in allowed
    ]
    found += [
        Problem("strategy.options", f"{name} needs '{key}'")
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty and key not in options
    ]
    for key, value in options.items():
        if key in allowed and (expected := _wrong(name, key, _read(value), parameters[key].default)):
            found.append(Problem("strategy.options", f"{key} is {value!r}, expected {expected}"))
    if not found:
        try:
            make(name, options)
        except (AssertionError, TypeError, ValueError) as error:
            found.append(Problem("strategy.options", f"{name} refuses {dict(options)}: {error}"))
    return found


def make(name: str, options: Mapping[str, Any]) -> Any:
    """A fresh plug-in; a text among the options is read like a YAML value."""
    arguments = {k: _read(v) for k, v in options.items()}
    if not isinstance(arguments.get("mode", ""), str):
        raise TypeError(f"mode is a text, not {arguments['mode']!r}")
    plugin = getattr(load(), SUPPORTED[name].class_name)(**arguments)
    return {"si": _unshared, "gem": _solvable}.get(name, lambda p: p)(plugin)


def _read(value: Any) -> Any:
    return parse_scalar(value) if isinstance(value, str) else value


def _wrong(name: str, key: str, value: Any, default: Any) -> str:
    """What an option's value should have been; empty where it is that."""
    if key in ("mode", "excluded_parameters") or (value is None and default is None):
        return ""
    if key in _FLAGS:
        return "" if isinstance(value, bool) else "true or false"
    if key in _COUNTS:
        return "" if type(value) is int and value >= 1 else "a whole number of at least 1"
    several = isinstance(value, list) and key == _PER_TASK.get(name)
    numbers = value if several else [value]
    good = all(isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < math.inf for n in numbers)
    return "" if good and numbers else "a number of at least 0"


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum() or c == "_")


def _list(names: list[str]) -> str:
    return f"There are: {', '.join(names) or 'none'}"


def _unshared(plugin: Any) -> Any:
    """Synaptic intelligence that remembers weights instead of looking at them.

    On the CPU Avalanche 0.6 keeps views of the parameters, so that "before" and "after" a step are the same numbers,
    every importance is 0 and nothing is protected.
    """

    def then_copy(hook: Any) -> Any:
        def run(strategy: Any, **kwargs: Any) -> None:
            hook(strategy, **kwargs)
            for held in (plugin.ewc_data[0], plugin.syn_data["old_theta"]):
                for value in held.values():
                    value.data = value.data.clone()

        return run

    plugin.before_training_exp = then_copy(plugin.before_training_exp)
    plugin.before_training_iteration = then_copy(plugin.before_training_iteration)
    return plugin


def _solvable(plugin: Any) -> Any:
    """GEM with a solver that is always there (it asks for `quadprog`, and fails at the second task without it)."""
    plugin.solve_quadprog = lambda gradient: project(gradient, plugin.G, plugin.memory_strength)
    return plugin


def project(gradient: torch.Tensor, references: torch.Tensor, margin: float) -> torch.Tensor:
    """GEM's projection ``g + G^T v``, where v minimises ``|g + G^T v|^2 / 2 + 1e-3 |v|^2 / 2`` with ``v >= margin``.

    With ``v = margin + u`` and the Cholesky factor L of ``G G^T + 1e-3 I`` it is a non-negative least-squares problem.

    Args:
        gradient: (P,).
        references: (T, P), one gradient per earlier task.
        margin: Avalanche's ``memory_strength``.
    """
    from scipy.optimize import nnls

    rows = references.cpu().double().numpy()
    g = gradient.cpu().double().numpy()
    matrix = rows @ rows.T + 1e-3 * np.eye(len(rows))
    factor = np.linalg.cholesky(matrix)
    slope = matrix.sum(axis=1) * margin + rows @ g
    v = nnls(factor.T, -np.linalg.solve(factor, slope))[0] + margin
    return torch.from_numpy(v @ rows + g).to(gradient.dtype)
