"""Tiny models with tokenizers of their own, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

CHAT = (
    "{{ '<s>' }}{% for m in messages %}<user>{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
SENTENCES = [
    "The capital of France is Paris.",
    "The capital of Italy is Rome and it is old.",
    "Question: who lives in Berlin? Answer: many people live there.",
    "a b c d e f g 1 2 3 4 5 the",
] * 8


def _tokenizer(specials: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE with merges over spaces, a BOS in front, and pad == EOS (SmolLM2's trap)."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    raw = _tokenizer(["<s>", "<end>", "<user>", "<bot>"])
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="<end>", pad_token="<end>", chat_template=CHAT
    )


@pytest.fixture(scope="session")
def lm_directory(tokenizer, tmp_path_factory) -> Path:
    """A two-layer random Llama with that tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("lm")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.3,  # wide enough for generations that differ from prompt to prompt
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_directory(tmp_path_factory) -> Path:
    """A two-layer random BERT."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    raw = _tokenizer(["[PAD]", "[CLS]", "[SEP]"])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
    )
    BertModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)
