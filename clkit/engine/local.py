"""The local engine: one process, CPU or GPU, autocast, gradient clipping, learning-rate schedules."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clkit.config import EngineConfig, TrainConfig
from clkit.engine.base import Engine
from clkit.engine.group import local_group
from clkit.errors import CapabilityError
from clkit.models.base import Model

LARGEST_HALF = torch.finfo(torch.float16).max
"""A scaled gradient of the whole batch beyond this is an overflow, however micro-batches or processes cut the batch."""


def lr_factor(
    step: int, total: int, schedule: str, warmup: float, milestones: Sequence[float] = (), decay: float = 1.0
) -> float:
    """The learning rate of 0-based ``step`` of ``total``, as a fraction of the peak.

    Linear rise over ``ceil(warmup * total)`` steps (the first step is not 0), then constant, or linear or half-cosine
    decay that would reach 0 one step after the last, or times ``decay`` from each milestone (a part of ``total``) on.
    """
    rise = math.ceil(warmup * total)
    if step < rise:
        return (step + 1) / rise
    if schedule == "constant":
        return 1.0
    if schedule == "milestones":
        return decay ** sum(step >= round(m * total) for m in milestones)
    done = min(1.0, (step - rise) / max(1, total - rise))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


class LocalEngine(Engine):
    """One process."""

    why_not_private: ClassVar[str] = "clips no single units and adds no noise"

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.group = local_group()
        self.device = pick_device(config.device)
        self._optimizer: torch.optim.Optimizer | None = None
        self._autocast: torch.dtype | None = None
        self._scaler: torch.amp.GradScaler | None = None
        self._parameters: list[nn.Parameter] = []
        self._train = TrainConfig()
        self._total = self._done = 0

    @classmethod
    def elsewhere(cls, options: Iterable[str]) -> dict[str, str]:
        """Options of private training, and how to have it."""
        from clkit.engine.private import PrivateConfig

        own, theirs = ({f.name for f in dataclasses.fields(c)} for c in (cls.config_class, PrivateConfig))
        found = [option for option in options if option in theirs - own]
        told = dict.fromkeys(found, "is an option of engine=private too")
        if found:
            told[found[0]] = (
                f"is an option of private training, which is engine=private: this engine {cls.why_not_private}. "
                "On several processes: `clkit run CONFIG engine=private --num-processes N`"
            )
        return told

    def prepare(self, model: Model) -> None:
        """Move the module to the device; float16 gets a loss scaler, bfloat16 needs none."""
        model.module.to(self.device)
        self._set_types(model)

    def _set_types(self, model: Model) -> None:
        dtype = getattr(model, "autocast_dtype", None)
        if dtype is not None:
            self._autocast = None if dtype == torch.float32 else dtype
        if dtype is torch.float16:
            self._scaler = torch.amp.GradScaler(self.device.type)

    def start(
        self,
        parameters: Sequence[nn.Parameter],
        train: TrainConfig,
        total_steps: int,
        *,
        keep_moments: bool = False,
        keep_schedule: bool = False,
    ) -> None:
        """New optimiser; see the contract."""
        old = self._optimizer.state if self._optimizer is not None and keep_moments else {}
        self._parameters = list(parameters)
        self._train = train
        self._total = total_steps
        self._done = self._done if keep_schedule else 0
        self._optimizer = _make_optimizer(self._parameters, train)
        if self._optimizer is not None and old:
            self._optimizer.state.update({p: old[p] for p in self._parameters if p in old})
        self._set_rate()

    def autocast(self) -> AbstractContextManager[Any]:
        """The model's compute type."""
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._autocast)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Backward, with the loss scaled under float16. Without parameters it does nothing."""
        if self._optimizer is None:
            return
        torch.autograd.backward(loss if self._scaler is None else self._scaler.scale(loss))

    def unscale(self) -> None:
        """Divide the gradients by the float16 loss scale."""
        if self._scaler is not None and self._optimizer is not None:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            if float(torch.nn.utils.get_total_norm(gradients, math.inf)) > LARGEST_HALF:
                gradients[0].fill_(math.inf)  # the parts of a batch may each have been in range: see LARGEST_HALF
            self._scaler.unscale_(self._optimizer)

    def step(self) -> float | None:
        """One update."""
        if self._optimizer is None:
            return None
        norm: float | None
        if self._train.clip > 0:
            norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._train.clip))
        else:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
        if self._scaler is not None:
            self._scaler.step(self._optimizer)
            self._scaler.update()
            norm = norm if math.isfinite(norm) else None  # the scaler skipped this step
        elif math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._done += 1
        self._set_rate()
        return norm

    def _set_rate(self) -> None:
        train = self._train
        if self._optimizer is None or (
            train.schedule == "constant" and self._done > math.ceil(train.warmup * self._total)
        ):
            return
        rate = train.learning_rate * lr_factor(
            self._done, self._total, train.schedule, train.warmup, train.milestones, train.decay
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    @property
    def learning_rate(self) -> float:
        """Rate of the next step; 0 without anything to train."""
        return float(self._optimizer.param_groups[0]["lr"]) if self._optimizer is not None else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        optimizer = self._optimizer.state_dict()["state"] if self._optimizer is not None else {}
        scaler = self._scaler.state_dict() if self._scaler is not None else {}
        return {"optimizer": optimizer, "done": self._done, "total": self._total, "scaler": scaler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the optimiser, the schedule and the scaler back."""
        self._done, self._total = state["done"], state["total"]
        if self._optimizer is not None:
            fresh = self._optimizer.state_dict()
            self._optimizer.load_state_dict({"state": state["optimizer"], "param_groups": fresh["param_groups"]})
            for parameter, values in self._optimizer.state.items():
                # The layout in memory decides how sums are rounded; a checkpoint keeps values only.
                for name, value in values.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        if self._scaler is not None and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        self._set_rate()


def _make_optimizer(parameters: list[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer | None:
    rate, decay = train.learning_rate, train.weight_decay
    if not parameters:
        return None
    if train.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=train.momentum, weight_decay=decay)
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=rate, betas=(train.betas[0], train.betas[1]), weight_decay=decay)


def pick_device(name: str, where: str = "engine.device") -> torch.device:
    """The device a user asked for.

    Args:
        name: auto, cpu, cuda or cuda:N.
        where: how the option is called in messages.

    Raises:
        CapabilityError: there is no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CapabilityError(f"{where}: '{name}' is no device; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise CapabilityError(f"{where}: '{name}' is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CapabilityError(
            f"{where}: '{name}' asked for, but {torch.cuda.device_count()} GPUs are visible; use auto or cpu"
        )
    return device
