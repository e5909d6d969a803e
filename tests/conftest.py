"""Fixtures that all tests share: a tiny random Llama with its own tokenizer, tiny task sequences, run configurations."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from byte_level import byte_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def computed(tmp_path_factory) -> Path:
    """Features and lookups that tests compute stay out of the user's cache; processes that tests start see it too."""
    os.environ["CLKIT_COMPUTED"] = str(tmp_path_factory.mktemp("computed"))
    return Path(os.environ["CLKIT_COMPUTED"])


class Refusing(logging.Handler):
    """Transformers writes most of its deprecations to its log; like those that are warnings, they are errors here."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message and "is_gradient_checkpointing" not in message:  # that one is peft's
            raise FutureWarning(message)


@pytest.fixture(scope="session", autouse=True)
def deprecations_that_are_logged():
    handler, logger = Refusing(logging.WARNING), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A directory with a two-layer random Llama (d = 32) and a byte-level tokenizer without a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("tiny_llama"), byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The real data; tests that need it are skipped where it is absent."""
    root = Path(os.environ.get("CLKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"the real data is not at {root}; set CLKIT_DATA")
    return root


@pytest.fixture
def text_content(tiny_llama, tmp_path) -> dict:
    """A configuration (plain data): three tiny text tasks on the tiny Llama with LoRA."""
    import json

    files = []
    for t, word in enumerate(("red", "blue", "green")):
        file = tmp_path / f"{word}.jsonl"
        rows = [{"prompt": f"{word} {i}", "answer": "ab"[(i + t) % 2], "options": ["a", "b"]} for i in range(12)]
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        files.append(str(file))
    return {
        "output_dir": str(tmp_path / "run"),
        "model": {
            "name": str(tiny_llama),
            "dtype": "float32",
            "prompt": "plain",
            "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        },
        "tasks": {"source": "jsonl", "tasks": files, "eval_fraction": 0.34},
        "strategy": "naive",
        "train": {"epochs": 2, "batch_size": 4, "learning_rate": 0.01},
        "eval": {"max_new_tokens": 4},
        "checkpoint": {"every_steps": 2},
        "tracking": {"log_every": 1},
    }


@pytest.fixture
def edit_content(tiny_llama, tmp_path) -> dict:
    """A configuration (plain data): two batches of three edits on the tiny Llama."""
    import json

    files = []
    for t in range(2):
        file = tmp_path / f"edits{t}.jsonl"
        rows = [
            {"prompt": f"Town {t} of {i}?", "target_new": "ab"[i % 2], "locality_prompt": f"Sum {i}", "id": f"{t}-{i}"}
            for i in range(3)
        ]
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        files.append(str(file))
    return {
        "output_dir": str(tmp_path / "run"),
        "model": {"name": str(tiny_llama), "dtype": "float32", "prompt": "plain", "lora": {"r": 0}},
        "tasks": {"source": "jsonl", "kind": "edit", "tasks": files},
        "strategy": "wise",
        "eval": {"max_new_tokens": 2},
        "checkpoint": {"every_steps": 2},
        "tracking": {"log_every": 1},
    }


@pytest.fixture
def vision_content(tmp_path) -> dict:
    """A configuration (plain data): digits, two classes at a time, on a small convolutional network with batch norm."""
    return {
        "output_dir": str(tmp_path / "run"),
        "model": {"name": "cifar-resnet-8"},
        "tasks": {"source": "digits", "flat": False, "train_limit": 12, "eval_limit": 6},
        "strategy": "naive",
        "train": {"epochs": 1, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.05},
        "checkpoint": {"every_steps": 2},
        "tracking": {"log_every": 1},
    }
