"""The DeepSpeed engine: ZeRO stages 0 to 3 over any number of processes, with the numbers of one local process.

DeepSpeed partitions, communicates and offloads. Types, loss scaling, clipping and schedules are the local engine's,
applied to the pieces that a process holds: weights that are trained stay float32, and the forward pass is autocast.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clkit.checkpoint import tensor_dict
from clkit.config import RunConfig, TrainConfig
from clkit.dealing import cut
from clkit.engine import launch
from clkit.engine.group import Group, local_group
from clkit.engine.local import LARGEST_HALF, LocalEngine
from clkit.engine.settings import DeepSpeedConfig, conflicts, own_problems, read_settings, settings
from clkit.engine.zero import Partitions, Pieces, Replicas, Slices
from clkit.errors import CapabilityError, ClkitError, ConfigError, Problem
from clkit.models.base import Model
from clkit.models.lora import true_shape
from clkit.models.noise import routed
from clkit.tasks.batch import Batch

# Stands among the users of a gathered parameter, so that no forward pass inside the context gives it back.
_HELD = -1


class DeepSpeedEngine(LocalEngine):
    """One process or many. Every process runs the same program on the same data order; see docs/scaling.md."""

    config_class: ClassVar[type] = DeepSpeedConfig
    several = True
    why_not_private: ClassVar[str] = "sums gradients over the batch before those of single units could be clipped"
    config: DeepSpeedConfig

    def __init__(self, config: DeepSpeedConfig) -> None:
        super().__init__(config)
        self.device = launch.own(self.device)
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it takes a GPU that the user did not want
        self.group = launch.join(self.device)
        # DeepSpeed asks torch for functions under their old names; not ours to change.
        warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
        self._deepspeed: Any = None
        self._pieces: Pieces | None = None
        self._model: Model | None = None
        self._gathered: dict[int, bool] = {}

    # --- what fits --------------------------------------------------------------------------------------------------
    @classmethod
    def check(cls, config: DeepSpeedConfig) -> list[Problem]:
        """Options that exclude each other, and a DeepSpeed file that can't be read."""
        return own_problems(config)

    @classmethod
    def refuse(cls, config: RunConfig, capabilities: Any) -> list[ClkitError]:
        """A stage that the strategy does not support, or settings that contradict the run."""
        errors: list[ClkitError] = []
        stages, stage = sorted(capabilities.zero_stages), config.engine.config.zero_stage
        if stage not in stages:
            can = f"it supports {', '.join(map(str, stages))}" if stages else "it supports none; take engine.name=local"
            errors.append(
                CapabilityError(
                    f"engine.zero_stage: strategy '{config.strategy.name}' does not run under ZeRO-{stage} ({can})"
                )
            )
        found = conflicts(config, read_settings(config.engine.config.config_file)[0])
        if found:
            errors.append(ConfigError.collect("The DeepSpeed file says something else than the run:", found))
        return errors

    @property
    def _partitioned(self) -> bool:
        return self.config.zero_stage == 3

    @property
    def scoring_group(self) -> Group:
        """All processes; alone under ZeRO-3, where each forward pass needs every process and all score the same."""
        return local_group() if self._partitioned else self.group

    # --- set-up -----------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Within, transformers loads weights directly into their partitions under ZeRO-3."""
        if not self._partitioned:
            yield
            return
        with routed():
            _start_communication()
            from transformers.integrations.deepspeed import HfDeepSpeedConfig

            announce: Any = HfDeepSpeedConfig
            kept = announce(self._settings())  # transformers looks for it as long as somebody holds it
        try:
            yield
        finally:
            del kept

    def _settings(self) -> dict[str, Any]:
        trained = sum(true_shape(p).numel() for p in self._parameters)
        return settings(self.config, read_settings(self.config.config_file)[0], trained)

    def prepare(self, model: Model) -> None:
        """See the contract; under ZeRO-3 the weights are partitioned here, so that they can be scored before training.

        Raises:
            CapabilityError: the model has batch statistics, which would differ between processes.
        """
        self._model = model
        batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.module.modules())
        if batch_norm and self.group.world > 1:
            raise CapabilityError(
                f"model '{model.name}' has batch normalisation, whose statistics would be those of each process's own "
                "examples; run it on one process, or take a model without"
            )
        with routed():
            _start_communication()
        if self._partitioned:
            self._set_types(model)
            self._open()
        else:
            super().prepare(model)

    def _open(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        import deepspeed

        whole = self._all()
        for tensor in (*whole.parameters(), *whole.buffers()):
            if not self._partitioned and not tensor.is_contiguous():
                tensor.data = tensor.data.contiguous()  # DeepSpeed sends them as bytes; channels-last ones it can't
        trained = {} if optimizer is None else {"optimizer": optimizer, "model_parameters": self._parameters}
        with routed():
            self._deepspeed, zero, *_ = deepspeed.initialize(
                model=whole, config=self._settings(), dist_init_required=False, **trained
            )
        if optimizer is not None:
            kinds: list[type[Pieces]] = [Replicas, Slices, Slices, Partitions]
            self._pieces = kinds[self.config.zero_stage](zero, optimizer)

    def _all(self) -> nn.Module:
        """The module and what a strategy trains beside it, whose gradients would stay on their process otherwise."""
        if self._model is None:
            raise RuntimeError("DeepSpeedEngine.prepare comes first")
        module = self._model.module
        inside = {id(p) for p in module.parameters()}
        beside = [p for p in self._parameters if id(p) not in inside]
        return nn.ModuleList([module, nn.ParameterList(beside)]) if beside else module

    def _close(self) -> None:
        if self._deepspeed is not None:
            with routed():
                self._deepspeed.destroy()
            # Its destructor does so again when it is collected, and would take the next engine's marks off the
            # parameters, and with them norms, clipping, added gradients and moments.
            self._deepspeed.optimizer = None
            self._separate()
        self._deepspeed = self._pieces = None

    def start(
        self,
        parameters: Sequence[nn.Parameter],
        train: TrainConfig,
        total_steps: int,
        *,
        keep_moments: bool = False,
        keep_schedule: bool = False,
    ) -> None:
        """New optimiser, and with it a new DeepSpeed engine; see the contract."""
        old = self._moments() if keep_moments else {}
        self._close()
        self._optimizer = None
        super().start(parameters, train, total_steps, keep_schedule=keep_schedule)
        if self._optimizer is not None:
            self._open(self._optimizer)
        elif self._partitioned:
            self._open()
        self._put_moments({p: old[id(p)] for p in self._parameters if id(p) in old})

    def _moments(self) -> dict[int, dict[str, Any]]:
        return {id(p): self._moments_of(p) for p in self._parameters}

    def _moments_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {} if self._pieces is None else self._pieces.moments(parameter)

    def _put_moments(self, moments: dict[nn.Parameter, dict[str, Any]]) -> None:
        if self._pieces is not None:
            for parameter, values in moments.items():
                self._pieces.load(parameter, values)

    def finish(self) -> None:
        """No more training; see the contract. Under ZeRO-3 only the engine can put the weights together."""
        if not self._partitioned:
            self._close()

    def _separate(self) -> None:
        """Give each weight memory of its own again: parts of one long tensor can't be written to a file."""
        if self.config.zero_stage in (1, 2):
            for parameter in self._parameters:
                parameter.data = parameter.data.clone()

    # --- one step ---------------------------------------------------------------------------------------------------
    def rows(self, batch: Batch, size: int) -> list[Tensor]:
        """See the contract. DeepSpeed's ZeRO-3 can't take a step whose pieces differ in their forward passes."""
        return cut(len(batch), batch.replayed, size, self.group.world, apart=not self._partitioned)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """See the contract; the gradient becomes the sum over the processes, which DeepSpeed calls a mean.

        Under float16 not before :meth:`unscale`: half-precision gradients have to be as large as on one process.
        """
        if self._pieces is None:
            return
        loss = loss * self.group.world if self._scaler is None else self._scaler.scale(loss)
        if self.config.zero_stage > 0:
            # DeepSpeed's own forward() does this; strategies call the module, or parts of it, themselves.
            self._deepspeed.optimizer.clear_backward_seen_flag()
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        if last and self.config.offload_optimizer != "none":
            self._pieces.complete()

    def unscale(self) -> None:
        """Divide the gradients by the float16 loss scale."""
        if self._scaler is not None and self._pieces is not None:
            world = self.group.world
            largest = max((float(own.abs().max()) for _, own in self._gradients() if own.numel()), default=0.0)
            beyond = self.any(largest * world > LARGEST_HALF)
            self._multiply(math.inf if beyond else world / self._scaler.get_scale())

    def add_gradient(self, parameter: nn.Parameter, gradient: Tensor, factor: float = 1.0) -> None:
        """See the contract; every process adds the piece that it holds."""
        if self._pieces is None:
            return
        own = self._pieces.gradient(parameter)
        if own is None and self.config.zero_stage == 0:
            super().add_gradient(parameter, gradient, factor)
        elif own is not None:
            own.add_(self._pieces.piece(parameter, gradient).view_as(own), alpha=factor)
            self._pieces.store(parameter, own)

    def _multiply(self, factor: float) -> None:
        for parameter, own in self._gradients():
            own.mul_(factor)
            self._own.store(parameter, own)

    def _gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for parameter in self._parameters:
            own = self._own.gradient(parameter)
            if own is not None:
                yield parameter, own

    @property
    def _own(self) -> Pieces:
        if self._pieces is None:
            raise RuntimeError("DeepSpeedEngine.start comes first")
        return self._pieces

    def _norm(self) -> float:
        squares = [own.float().norm().double().square() for _, own in self._gradients()]
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=self.device)
        if self.config.zero_stage > 0:
            dist.all_reduce(total)
        return float(total.sqrt())

    def step(self) -> float | None:
        """One update."""
        if self._pieces is None:
            return None
        norm = self._norm()
        finite = math.isfinite(norm)
        if finite and 0 < self._train.clip < norm + 1e-6:
            self._multiply(self._train.clip / (norm + 1e-6))
        if finite:
            self._deepspeed.step()
        else:
            self._pieces.drop(self._deepspeed)
        self._pieces.clear()
        if self._scaler is not None:
            _update(self._scaler, finite)
        self._done += 1
        self._set_rate()
        return norm if finite or self._scaler is None else None

    # --- parameters -------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter], write: bool = False) -> Iterator[None]:
        """See the contract. What the first process wrote counts. May be nested, but not to write what is being read.

        Raises:
            RuntimeError: a parameter that is to be written is gathered for reading already.
        """
        fresh = [p for p in dict.fromkeys(parameters) if id(p) not in self._gathered]
        if write and not all(self._gathered.get(id(p), True) for p in parameters):
            raise RuntimeError("parameters that are gathered for reading can't be written")
        self._gathered |= dict.fromkeys(map(id, fresh), write)
        try:
            with self._whole(fresh, write):
                yield
        finally:
            for parameter in fresh:
                del self._gathered[id(parameter)]
        if write and self._pieces is not None:
            trained = {id(p) for p in self._parameters}
            for parameter in fresh:
                if id(parameter) in trained:
                    self._pieces.refresh(parameter)

    @contextlib.contextmanager
    def _whole(self, parameters: Sequence[Any], write: bool) -> Iterator[None]:
        split = [p for p in parameters if hasattr(p, "ds_id")]
        if not split:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(split, modifier_rank=0 if write else None):
            for parameter in split:
                parameter.ds_active_sub_modules.add(_HELD)
            try:
                yield
            finally:
                for parameter in split:
                    # Also layers whose backward pass DeepSpeed can't see end, because their input needs no gradient.
                    parameter.ds_active_sub_modules.clear()

    def tensors(self, module: nn.Module, names: set[str]) -> dict[str, Tensor]:
        """See the contract; copies on the CPU under ZeRO-3."""
        if not self._partitioned:
            return super().tensors(module, names)
        with self.gathered([p for n, p in module.named_parameters(remove_duplicate=False) if n in names]):
            return {k: v.to("cpu", copy=True) for k, v in tensor_dict(module, names).items()}

    # --- processes --------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """As the local engine's, whatever the stage and the number of processes."""
        optimizer = {i: m for i, p in enumerate(self._parameters) if (m := self._moments_of(p))}
        scaler = self._scaler.state_dict() if self._scaler is not None else {}
        return {"optimizer": optimizer, "done": self._done, "total": self._total, "scaler": scaler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the optimiser, the schedule and the scaler back."""
        self._done, self._total = state["done"], state["total"]
        self._put_moments({self._parameters[i]: values for i, values in state["optimizer"].items()})
        if self._scaler is not None and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        self._set_rate()


def _start_communication() -> None:
    """DeepSpeed's own layer over torch's process group, without the kernel for one machine that it would compile."""
    import deepspeed

    os.environ.setdefault("LOCAL_RANK", "0")  # both libraries read it, also where nobody launched this process
    if not deepspeed.comm.is_initialized():
        # The attribute is a plain dict, and DeepSpeed skips what is not in it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)


def _update(scaler: torch.amp.GradScaler, finite: bool) -> None:
    """What ``GradScaler.update`` does, for gradients that it has not seen: halve, or double after enough good steps."""
    state = scaler.state_dict()
    tracker = state["_growth_tracker"] + 1 if finite else 0
    if not finite:
        state["scale"] *= state["backoff_factor"]
    elif tracker == state["growth_interval"]:
        state["scale"] *= state["growth_factor"]
        tracker = 0
    scaler.load_state_dict({**state, "_growth_tracker": tracker})
