"""What a training step of a language model holds beside its weights: a pass that is only pretended, and counted."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # there is no public name for it
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clkit.config import ModelConfig
from clkit.models.causal_lm import takes_positions
from clkit.models.loading import recompute_activations
from clkit.models.lora import attach_lora, base_model
from clkit.models.precision import pick_dtype
from clkit.models.resolve import resolve, settled
from clkit.models.sizes import configuration, empty


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that come into being within it, and of how many at once.

    Attributes:
        now: bytes of those that are still there.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensor: Tensor) -> None:
        """Do not count this one, which was there before."""
        self._known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it gives."""
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def activation_bytes(config: ModelConfig, rows: int) -> int | None:
    """The most that forward and backward pass of one batch hold at once, weights and their gradients left out.

    Nothing is computed: torch runs the passes on tensors without content, so what is counted is what this architecture
    keeps, with the adapter, the types and the checkpointing of ``config``.

    Args:
        config: a language model, with ``max_length`` tokens in every row, each of them a target.
        rows: of the batch.

    Returns:
        None where the model's configuration is not on this machine.

    Raises:
        ModelError: as from ``estimate``.
    """
    found = _language_model(config)
    if found is None:
        return None
    with FakeTensorMode(allow_non_fake_inputs=True):
        module: Any = found.to_empty(device="cpu").train()
        ids = torch.zeros(rows, config.max_length, dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        if takes_positions(base_model(module)):
            inputs["logits_to_keep"] = torch.arange(config.max_length - 1)
        compute = pick_dtype(config.dtype)
        half = torch.autocast("cpu", dtype=compute) if compute != torch.float32 else contextlib.nullcontext()
        with _counted(module) as live:
            with half:
                scores = module(**inputs).logits[:, : config.max_length - 1]
                loss = F.cross_entropy(scores.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
            del scores
            torch.autograd.backward(loss)
        return live.peak


@contextlib.contextmanager
def _counted(module: nn.Module) -> Iterator[Live]:
    """What is the module's own does not count, and gradients of its weights leave as soon as they come."""
    live = Live()
    for tensor in (*module.parameters(), *module.buffers()):
        live.ignore(tensor)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # type: ignore[no-untyped-call]
    with live:
        yield live


def _language_model(config: ModelConfig) -> nn.Module | None:
    """As loading builds it, on the meta device."""
    config = settled(config, None)
    found = resolve(config.name)
    architecture = configuration(found)
    if architecture is None:
        return None
    module = empty(architecture, True, found.name)
    if config.gradient_checkpointing:
        recompute_activations(module)
    if config.lora.r:
        kept = pick_dtype(config.dtype)
        module = attach_lora(module.to(kept), config.lora, torch.Generator().manual_seed(0))
    return module
