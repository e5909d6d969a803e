"""The pieces of gradients, weights and moments that one process holds under DeepSpeed's ZeRO.

DeepSpeed has functions for whole tensors, each of which costs a round of communication, or refuses sizes that do not
divide evenly. What is needed here is local: add to a piece of a gradient, measure it, write a piece of a moment.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Pieces(ABC):
    """Which part of every trained parameter lies on this process.

    Args:
        zero: what ``deepspeed.initialize`` returned as the optimiser.
        optimizer: torch's, inside it.
    """

    def __init__(self, zero: Any, optimizer: torch.optim.Optimizer) -> None:
        self.zero = zero
        self.optimizer = optimizer

    @abstractmethod
    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The piece of the averaged gradient, to be changed in place; None where nothing lies here."""

    def store(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Put a changed :meth:`gradient` back, where that was a copy."""

    @abstractmethod
    def piece(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """The part of ``whole``, which has the parameter's shape, that lies here; shaped as :meth:`gradient`."""

    @abstractmethod
    def refresh(self, parameter: nn.Parameter) -> None:
        """Bring the optimiser's own copy of the weights up to the parameter, which was written to."""

    @abstractmethod
    def moments(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The optimiser's state of one parameter, whole, on the CPU; every process must call this."""

    @abstractmethod
    def load(self, parameter: nn.Parameter, moments: dict[str, Any]) -> None:
        """Inverse of :meth:`moments`."""

    @abstractmethod
    def drop(self, engine: Any) -> None:
        """Forget the gradients without an update."""

    def complete(self) -> None:
        """Where gradients lie in main memory, bring those there too that the last backward pass added nothing to."""
        finalize = getattr(self.zero, "finalize_gradient_accumulation_boundary", None)
        if finalize is not None:  # DeepSpeed brings the others only
            finalize()

    def clear(self) -> None:
        """Set to zero what is left of gradients after a step, where DeepSpeed keeps it.

        It adds up, or applies once more, what is left of a parameter that gets no gradient in the next step.
        """


class Replicas(Pieces):
    """Stage 0: everything is everywhere."""

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The whole gradient."""
        return parameter.grad

    def piece(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """All of it."""
        return whole

    def refresh(self, parameter: nn.Parameter) -> None:
        """There is no copy."""

    def moments(self, parameter: nn.Parameter) -> dict[str, Any]:
        """As torch keeps it."""
        state = self.optimizer.state.get(parameter, {})
        return {k: v.detach().cpu().clone() if isinstance(v, Tensor) else v for k, v in state.items()}

    def load(self, parameter: nn.Parameter, moments: dict[str, Any]) -> None:
        """Inverse of :meth:`moments`."""
        self.optimizer.state[parameter] = {
            k: v.to(parameter.device, copy=True) if isinstance(v, Tensor) and v.dim() else v for k, v in moments.items()
        }

    def drop(self, engine: Any) -> None:
        """Clear them."""
        engine.zero_grad()


class Sharded(Pieces):
    """What stages 1 to 3 share: torch's optimiser updates flat tensors, and a parameter is a range of one."""

    @abstractmethod
    def _place(self, parameter: nn.Parameter) -> tuple[Tensor, int, int] | None:
        """The flat tensor, where the piece begins in it, and its length."""

    @abstractmethod
    def _assemble(self, parameter: nn.Parameter, piece: Tensor | None) -> Tensor:
        """The whole tensor from the pieces of all processes."""

    @abstractmethod
    def _here(self, parameter: nn.Parameter) -> Tensor:
        """The piece of the parameter's values."""

    def refresh(self, parameter: nn.Parameter) -> None:
        """Into the range of the flat tensor."""
        if place := self._place(parameter):
            flat, start, length = place
            flat.data.narrow(0, start, length).copy_(self._here(parameter))

    def moments(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Moments are assembled; a count of steps is the same everywhere."""
        states = [s for s in self.optimizer.state.values() if s]
        if not states:
            return {}
        place = self._place(parameter)
        own = self.optimizer.state[place[0]] if place else {}
        found: dict[str, Any] = {}
        for key, value in states[0].items():
            if isinstance(value, Tensor) and value.dim():
                piece = own[key].narrow(0, *place[1:]) if place else None
                found[key] = self._assemble(parameter, piece).cpu()
            else:
                found[key] = value.detach().cpu().clone() if isinstance(value, Tensor) else value
        return found

    def load(self, parameter: nn.Parameter, moments: dict[str, Any]) -> None:
        """Into the state of the flat tensor, which is made when its first parameter comes."""
        place = self._place(parameter)
        if place is None:
            return
        flat, start, length = place
        state = self.optimizer.state[flat]
        for key, value in moments.items():
            if not (isinstance(value, Tensor) and value.dim()):
                state[key] = value.clone() if isinstance(value, Tensor) else value
                continue
            if key not in state:
                state[key] = torch.zeros_like(flat.data)
            state[key].narrow(0, start, length).copy_(self.piece(parameter, value).flatten())


class Slices(Sharded):
    """Stages 1 and 2: parameters are whole, and each process updates a slice of all of them laid end to end."""

    def gradient(self, parameter: Any) -> Tensor | None:
        """The slice of the gradient that this process updates."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        found: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        return found

    def piece(self, parameter: Any, whole: Tensor) -> Tensor:
        """The range of the flattened parameter."""
        address = parameter._hp_mapping.lp_fragment_address
        return whole.flatten().narrow(0, address.start, address.numel)

    def _here(self, parameter: Any) -> Tensor:
        return self.piece(parameter, parameter.data)

    def clear(self) -> None:
        """Those in main memory; others are gone with the step."""
        flat = [f.grad for f in self.zero.single_partition_of_fp32_groups if f.grad is not None]
        for left in (*flat, *getattr(self.zero, "accumulated_grads_in_cpu", {}).values()):
            left.zero_()

    def _place(self, parameter: Any) -> tuple[Tensor, int, int] | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
        return flat, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel

    def _assemble(self, parameter: Any, piece: Tensor | None) -> Tensor:
        whole = torch.zeros(parameter.numel(), device=parameter.device)
        if piece is not None:
            whole.narrow(0, parameter._hp_mapping.lp_fragment_address.start, len(piece)).copy_(piece)
        dist.all_reduce(whole)
        return whole.view_as(parameter)

    def drop(self, engine: Any) -> None:
        """What DeepSpeed does when it finds an overflow itself, which it looks for in its own float16 mode only."""
        looked, self.zero.check_grad_overflow = self.zero.check_grad_overflow, True
        self.zero.has_overflow = lambda partition_gradients: True
        try:
            engine.step()
        finally:
            del self.zero.has_overflow
            self.zero.check_grad_overflow = looked


class Partitions(Sharded):
    """Stage 3: each process holds an equal part of every parameter; the last part is padded with zeros."""

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This process's part; a copy where it is kept elsewhere."""
        from deepspeed.utils import safe_get_local_grad

        found: Tensor = safe_get_local_grad(parameter)
        return found

    def store(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Back to where DeepSpeed keeps it."""
        from deepspeed.utils import safe_set_local_grad

        safe_set_local_grad(parameter, gradient)

    def piece(self, parameter: Any, whole: Tensor) -> Tensor:
        """This process's part, padded."""
        length, flat = parameter.ds_tensor.numel(), whole.flatten()
        part = flat[dist.get_rank() * length :][:length]
        return torch.nn.functional.pad(part, (0, length - len(part)))

    def _here(self, parameter: Any) -> Tensor:
        here: Tensor = parameter.ds_tensor
        return here

    def _place(self, parameter: Any) -> tuple[Tensor, int, int] | None:
        group, start, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return self.zero.fp32_partitioned_groups_flat[group], start, length

    def _assemble(self, parameter: Any, piece: Tensor | None) -> Tensor:
        if piece is None:
            raise RuntimeError("under ZeRO-3 every process holds a part of every parameter")
        mine = piece.to(parameter.device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine)
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)

    def drop(self, engine: Any) -> None:
        """Clear them."""
        self.zero.zero_grad(set_to_none=True)

    def clear(self) -> None:
        """The sums of a step's backward passes, and their copies in main memory."""
        self.zero.grad_partitions_flat_buffer.zero_()
        for flat in self.zero.fp32_partitioned_groups_flat:
            if flat.grad is not None:
                flat.grad.zero_()
