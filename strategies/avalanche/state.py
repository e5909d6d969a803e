"""A plug-in's state as JSON and tensors: numbers, parameters, examples by number, copies of the model. Never pickle."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from clkit.errors import CheckpointError

_KIND = "kind"


def _objects() -> dict[str, type]:
    """Classes of Avalanche whose attributes are saved in their place."""
    from avalanche.training.regularization import LearningWithoutForgetting
    from avalanche.training.storage_policy import (
        ClassBalancedBuffer,
        ExperienceBalancedBuffer,
        ReservoirSamplingBuffer,
    )

    known = (LearningWithoutForgetting, ClassBalancedBuffer, ExperienceBalancedBuffer, ReservoirSamplingBuffer)
    return {cls.__name__: cls for cls in known}


def numbers(dataset: Any) -> Tensor:
    """(N,) which examples a data set holds."""
    return torch.tensor([int(dataset[i][0]) for i in range(len(dataset))], dtype=torch.long)


def encode(value: Any) -> Any:
    """Nested dicts, lists, numbers and tensors from which :func:`decode` makes an equal value.

    Raises:
        CheckpointError: something else is in it.
    """
    from avalanche.benchmarks.utils.data import AvalancheDataset
    from avalanche.training.utils import ParamData

    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, tuple | set):
        items = sorted(value) if isinstance(value, set) else value
        return {_KIND: type(value).__name__, "items": [encode(v) for v in items]}
    if isinstance(value, dict):
        # A defaultdict answers what it was not asked for; the plug-ins rely on it for empty entries only.
        kind = "defaultdict" if isinstance(value, defaultdict) else "dict"
        return {_KIND: kind, "items": [[k, encode(v)] for k, v in value.items()]}
    if isinstance(value, ParamData):
        return {_KIND: "parameter", "name": value.name, "data": value.data, "on_cpu": value.data.device.type == "cpu"}
    if isinstance(value, AvalancheDataset):
        return {_KIND: "examples", "numbers": numbers(value)}
    if hasattr(value, "tensors"):
        return {_KIND: "snapshot", "tensors": value.tensors}
    name = type(value).__name__
    if _objects().get(name) is type(value):
        return {_KIND: name, "attributes": {k: encode(v) for k, v in vars(value).items()}}
    raise CheckpointError(f"the plug-in's state holds a {name}, which can't be saved; use another version of Avalanche")


def examples_of(encoded: Any) -> list[int]:
    """The numbers of all examples in what :func:`encode` gave; some may occur more than once."""
    if isinstance(encoded, dict):
        if encoded.get(_KIND) == "examples":
            return [int(n) for n in encoded["numbers"]]
        encoded = list(encoded.values())
    return [n for v in encoded for n in examples_of(v)] if isinstance(encoded, list) else []


def decode(value: Any, agent: Any, snapshot: type) -> Any:
    """Inverse of :func:`encode`.

    Args:
        value: what it gave.
        agent: knows the examples and the device.
        snapshot: the class of copies of the model.
    """
    from avalanche.training.utils import ParamData

    def back(item: Any) -> Any:
        return decode(item, agent, snapshot)

    if isinstance(value, list):
        return [back(v) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value[_KIND]
    if kind == "tuple":
        return tuple(back(v) for v in value["items"])
    if kind == "set":
        return {back(v) for v in value["items"]}
    if kind in ("dict", "defaultdict"):
        items = [(k, back(v)) for k, v in value["items"]]
        return dict(items) if kind == "dict" else defaultdict(dict, items)
    if kind == "parameter":
        data = value["data"].clone() if value["on_cpu"] else value["data"].to(agent.device)
        return ParamData(value["name"], init_tensor=data, device=data.device)
    if kind == "examples":
        return agent.all_examples().subset(value["numbers"].tolist())
    if kind == "snapshot":
        return snapshot(agent, {name: t.to(agent.device) for name, t in value["tensors"].items()})
    cls: Any = _objects()[kind]
    found = cls.__new__(cls)
    vars(found).update({name: back(v) for name, v in value["attributes"].items()})
    return found
