"""Tiny language models for WISE: one per architecture, over bytes, and the golden data's own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_level import byte_tokenizer

from clkit.models.causal_lm import CausalLM
from clkit.strategies.wise.config import WISEConfig
from clkit.strategies.wise.core import Wise
from clkit.tasks.base import EditRecord

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
OWN = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "num_key_value_heads": 4},
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "rotary_dim": 4, "n_inner": 48},
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
}
ARCHITECTURES = ("llama", "mistral", "qwen2", "gemma", "gemma3_text", "phi", "phi3", "gpt2", "gptj", "gpt_neox")


def tiny(model_type: str = "llama", **config) -> CausalLM:
    """Three blocks, width 32, weights large enough that what a token sees matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(model_type, **{"vocab_size": 260} | SIZES | OWN.get(model_type, {}) | config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(made)
        for parameter in module.parameters():
            one = parameter.dim() == 1 and "gemma" not in model_type  # scales about 1, which Gemma adds itself
            torch.nn.init.normal_(parameter, mean=float(one), std=0.2)
    return CausalLM(model_type, module.eval(), byte_tokenizer(), prompt="plain", max_length=200)


def quick(**options) -> WISEConfig:
    """Few steps, few rows, shards of two."""
    small = {"layer": "1", "steps": 8, "contexts": 2, "negatives": 2, "shard_size": 2, "merge_every": 4}
    small |= {"likeness": 0.0}  # tests/strategies/test_wise_likeness.py has it
    return WISEConfig(**(small | options))


def record(i: int, **fields) -> EditRecord:
    """An edit of its own."""
    content = {"prompt": f"Town of {i}?", "target_new": f"T{i}x", "locality_prompt": f"Sum of {i}?", "id": f"e{i}"}
    return EditRecord(**content | fields)


def edited(count: int = 3, model: CausalLM | None = None, seed: int = 0, **options) -> Wise:
    """A model with ``count`` edits."""
    wise = Wise(model or tiny(), quick(**options), seed)
    for i in range(count):
        wise.learn(record(i))
    return wise


def logits(model: CausalLM, text: str) -> torch.Tensor:
    """(T, vocabulary) for one prompt."""
    ids = torch.tensor([model.tokenizer(text).input_ids])
    with torch.inference_mode():
        return model.module(ids).logits[0]


# --- the published implementation's numbers ---------------------------------------------------------------------------
def golden() -> tuple[dict, dict]:
    """Arrays and JSON of the golden data; skips where it is absent."""
    data = Path(os.environ.get("CLKIT_DATA", Path(__file__).parents[3] / "shared" / "data"))
    folder = data.parent / "golden" / "wise"
    if not folder.is_dir():
        pytest.skip(f"the published numbers are not at {folder}; set CLKIT_DATA")
    content = json.loads((folder / "golden_tiny_llama.json").read_text())
    with np.load(folder / "golden_tiny_llama.npz") as arrays:
        return {k: torch.from_numpy(arrays[k]) for k in arrays.files}, content


def golden_model(arrays: dict, content: dict) -> CausalLM:
    """The golden data's model with a tokenizer of words ``w0`` to ``w125``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(126)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    config = {k: v for k, v in content["retrieve"]["config"].items() if k != "transformers_version"}
    module = LlamaForCausalLM(LlamaConfig(**config)).eval()
    module.load_state_dict({k[3:]: v for k, v in arrays.items() if k.startswith("sd/")})
    return CausalLM("golden", module, tokenizer, prompt="plain")
