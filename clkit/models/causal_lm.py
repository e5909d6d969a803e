"""Causal language models: loss on answers only, greedy generation, export as a plain PEFT or Hugging Face directory."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.errors import DataError
from clkit.models.base import Model
from clkit.models.encoded_text import EncodedText
from clkit.models.lora import base_model, plain_state
from clkit.models.noise import routed
from clkit.models.positions import learned_positions
from clkit.models.prompts import PromptFormat
from clkit.modes import evaluating
from clkit.tasks.base import EditExamples, Examples, Kind, TextExamples
from clkit.tasks.batch import Batch

# Architecture -> whether its forward takes logits_to_keep; looking at a signature costs as much as a small layer.
_SPARSE_HEADS: dict[type, bool] = {}
_IMPORTS = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"


class CausalLM(Model):
    """A transformers language model, with or without a peft adapter.

    Args:
        name: as the user gave it.
        module: the model.
        tokenizer: a fast one; it pads with its EOS if it has no token for that.
        provenance: see ``Model``.
        prompt: auto, chat or plain (``PromptFormat``).
        max_length: tokens per example; at most as many as the model has learned positions for.
        autocast_dtype: what the engine computes in; None = the weights' own type.
        base: the hub id of the model, or its directory.

    Attributes:
        tokenizer: as given.
        form: how prompts are shown.
        autocast_dtype: as given; read by the engine.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"text", "edit"})

    def __init__(
        self,
        name: str,
        module: nn.Module,
        tokenizer: Any,
        provenance: Mapping[str, Any] | None = None,
        *,
        prompt: str = "auto",
        max_length: int = 512,
        autocast_dtype: torch.dtype | None = None,
        base: str = "",
    ) -> None:
        super().__init__(name, module, provenance)
        self.tokenizer = tokenizer
        self.form = PromptFormat(tokenizer, prompt)
        if tokenizer.pad_token_id is None:
            # Padding is known by the attention mask, never by this id, so any token will do.
            tokenizer.pad_token = tokenizer.eos_token
        self._positions = learned_positions(module)
        self.max_length = min(max_length, self._positions or max_length)
        self.autocast_dtype = autocast_dtype
        self.base = base

    def encode(self, examples: Examples) -> EncodedText:
        """Tokenise text or edit examples.

        Raises:
            DataError: the examples are classes, or an answer does not fit.
        """
        if not isinstance(examples, TextExamples | EditExamples):
            raise DataError(f"Model '{self.name}' learns text and edits; it can't read {type(examples).__name__}.")
        return EncodedText(examples.records, self.form, self.max_length)

    def logits(self, batch: Batch) -> Tensor:
        """(B, P, vocabulary), at the P positions where at least one row predicts a target."""
        positions = _positions(batch)
        if takes_positions(base_model(self.module)):
            scores: Tensor = self.module(**batch.inputs, use_cache=False, logits_to_keep=positions).logits
        else:
            scores = self.module(**batch.inputs, use_cache=False).logits[:, positions]
        return scores

    def targets(self, batch: Batch) -> Tensor:
        """(B, P) the tokens that ``logits`` predict; -100 where a row predicts nothing."""
        return batch.labels[:, _positions(batch) + 1]

    def loss(self, batch: Batch, logits: Tensor | None = None) -> Tensor:
        """Sum of the cross entropies of all targets over their number, in float32."""
        scores = self.logits(batch) if logits is None else logits
        total = F.cross_entropy(
            scores.flatten(0, 1).float(), self.targets(batch).flatten(), ignore_index=-100, reduction="sum"
        )
        return total / max(batch.num_targets, 1)

    @torch.no_grad()
    def generate(self, encoded: EncodedText, indices: Sequence[int] | Tensor, max_new_tokens: int) -> list[str]:
        """Answer the prompts at ``indices`` greedily, as one batch.

        Where the model's learned positions end before ``max_new_tokens``, an answer ends with them, and prompts are
        answered one by one, so that none depends on the others of its batch.

        Returns:
            The answers, without special tokens and without white space around them.
        """
        import transformers

        settings: Any = transformers.GenerationConfig
        prompts = [encoded.prompt_ids(int(i)) or [self.form.eos] for i in indices]
        if not prompts:
            return []
        width = max(len(p) for p in prompts)
        if self._positions is not None and width + max_new_tokens > self._positions:
            if len(prompts) > 1:
                return [self.generate(encoded, [int(i)], max_new_tokens)[0] for i in indices]
            max_new_tokens = self._positions - width
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        lm: Any = base_model(self.module)
        own = lm.generation_config
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        # generate() fills what we leave open from the model's own configuration (sampling, penalties): take it away.
        lm.generation_config = settings()
        greedy = settings(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=sorted({self.form.eos, *(e for e in ends if e is not None)}),
        )
        try:
            with evaluating(self.module):
                out = lm.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
        finally:
            lm.generation_config = own
        # Tokenizers that say so would take spaces away that the model wrote: "x , y" is not "x, y".
        plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        texts = self.tokenizer.batch_decode(out[:, width:], **plain)
        return [text.strip() for text in texts]

    def exported(self) -> list[nn.Parameter]:
        """Those of the adapter, or all."""
        adapted = hasattr(self.module, "peft_config")
        return [p for p in self.module.parameters() if p.requires_grad or not adapted]

    def export(self, directory: Path) -> str:
        """Write a PEFT adapter, or the full model, with the tokenizer; return the snippet that loads it."""
        if not hasattr(self.module, "peft_config"):
            return self.export_full(directory)
        directory.mkdir(parents=True, exist_ok=True)
        module: Any = self.module
        with routed():
            # Not "auto" for the embeddings: that asks the hub, and adapters do not change them.
            active = str(module.active_adapter)
            module.save_pretrained(directory, selected_adapters=[active], save_embedding_layers=False)
            if active != "default":  # peft puts it into a folder of that name, where loading does not look
                for file in (directory / active).iterdir():
                    file.replace(directory / file.name)
                (directory / active).rmdir()
            self.tokenizer.save_pretrained(directory)
        local = self.provenance.get("directory", self.base)
        note = f"  # elsewhere: {self.base!r}" if local != self.base else ""
        origin, kept = (self.provenance.get(key) for key in ("origin", "dtype"))
        # Left out, it would be the type of the file, in which the answers may be others than those that were scored.
        dtype = f", dtype={kept!r}" if kept else ""
        return (
            f"from peft import PeftModel\n{_IMPORTS}"
            + (f"# The adapter was trained on these base weights: {origin}\n" if origin else "")
            + f"base = AutoModelForCausalLM.from_pretrained({local!r}{dtype}){note}\n"
            f"model = PeftModel.from_pretrained(base, {str(directory)!r})\n{_load_tokenizer(directory)}"
        )

    def export_full(self, directory: Path) -> str:
        """Write the full model with the tokenizer, as a plain Hugging Face directory; return the snippet.

        Adapters are left out: merge what they add into the weights before.
        """
        directory.mkdir(parents=True, exist_ok=True)
        base: Any = base_model(self.module)
        with routed():
            base.save_pretrained(directory, state_dict=plain_state(base))
            self.tokenizer.save_pretrained(directory)
        return (
            f"{_IMPORTS}model = AutoModelForCausalLM.from_pretrained({str(directory)!r})\n{_load_tokenizer(directory)}"
        )


def _load_tokenizer(directory: Path) -> str:
    return f"tokenizer = AutoTokenizer.from_pretrained({str(directory)!r})\n"


def _positions(batch: Batch) -> Tensor:
    """(P,) the positions whose next token is a target in some row."""
    return (batch.labels[:, 1:] != -100).any(dim=0).nonzero().squeeze(1)


def takes_positions(module: nn.Module) -> bool:
    """Whether the architecture can leave out the output layer at the other positions."""
    kind: Any = type(module)
    if kind not in _SPARSE_HEADS:
        _SPARSE_HEADS[kind] = "logits_to_keep" in inspect.signature(kind.forward).parameters
    return _SPARSE_HEADS[kind]
