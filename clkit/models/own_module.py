"""Models that a user built in Python, brought under the contract."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor, nn

from clkit.errors import CapabilityError, DataError
from clkit.models.base import Model
from clkit.models.encoded_examples import EncodedTensors
from clkit.tasks.base import Examples, Kind, LabelledExamples
from clkit.tasks.batch import Batch, Encoded


def wrap(module: nn.Module, tokenizer: Any = None, name: str = "") -> Model:
    """Bring a module of your own under the contract.

    Args:
        module: with a tokenizer a transformers causal language model (peft-wrapped or not); without one any module that
            takes a batch of tensors and gives logits (B, num_classes).
        tokenizer: a fast transformers tokenizer.
        name: for messages and tables; the module's class by default.

    Raises:
        CapabilityError: the module's adapter is of prompt or prefix tuning.

    Example:
        >>> from torch import nn
        >>> wrap(nn.Linear(4, 2)).kinds
        frozenset({'classification'})
    """
    name = name or type(module).__name__
    if tokenizer is None:
        return ModuleClassifier(name, module)
    from clkit.models.causal_lm import CausalLM

    if getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False):
        # Its virtual tokens would shift the targets, and generation runs on the model below the adapter.
        raise CapabilityError(
            f"Model '{name}': a {type(module.active_peft_config).__name__} adapter puts tokens of its own before the "
            "prompt, which clkit neither trains nor scores; take one that changes layers, such as LoRA."
        )
    base = getattr(getattr(module, "config", None), "_name_or_path", "")
    return CausalLM(name, module, tokenizer, base=base)


class ModuleClassifier(Model):
    """Any module from tensors to logits (B, num_classes)."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"classification"})

    def __init__(self, name: str, module: nn.Module, provenance: Mapping[str, Any] | None = None) -> None:
        super().__init__(name, module, provenance or {"origin": "module"})
        self._classes = 0  # the largest label that was encoded, plus one

    def encode(self, examples: Examples) -> Encoded:
        """Take tensors as they are; ``logits`` brings them into the form that the module computes with.

        Raises:
            DataError: the examples are not tensors with labels.
        """
        if not isinstance(examples, LabelledExamples) or isinstance(examples.inputs, tuple):
            raise DataError(f"Model '{self.name}' reads tensors with labels; got {type(examples).__name__}.")
        if len(examples):
            self._classes = max(self._classes, int(examples.labels.max()) + 1)
        return EncodedTensors(examples.inputs, examples.labels, examples.ids)

    def logits(self, batch: Batch) -> Tensor:
        """(B, num_classes).

        uint8 images become numbers in [0, 1], and all numbers of the weights' type; other integers only where the
        module embeds nothing, else they are token ids.

        Raises:
            DataError: the module gives something else, or has fewer outputs than the tasks have classes.
        """
        x = batch.inputs["x"]
        if x.dtype == torch.uint8:
            x = x.float() / 255
        if x.is_floating_point() or not any(isinstance(m, nn.Embedding) for m in self.module.modules()):
            x = x.to(next((p.dtype for p in self.module.parameters() if p.is_floating_point()), x.dtype))
        out = self.module(x)
        if not isinstance(out, Tensor) or out.dim() != 2 or out.shape[1] < self._classes:
            got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise DataError(
                f"Model '{self.name}' must give logits (B, num_classes), and these tasks have {self._classes} classes; "
                f"a batch of {len(x)} gave {got}."
            )
        return out

    def loss(self, batch: Batch, logits: Tensor | None = None) -> Tensor:
        """Mean cross entropy, in float32."""
        scores = self.logits(batch) if logits is None else logits
        return F.cross_entropy(scores.float(), batch.labels)

    def export(self, directory: Path) -> str:
        """Write the state as safetensors; the class that gives it meaning is the user's own."""
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / "model.safetensors"
        save_model(copy.deepcopy(self.module).cpu(), str(file))
        kind = type(self.module).__name__
        return f"from safetensors.torch import load_model\nload_model(module, {str(file)!r})  # module: a new {kind}\n"
