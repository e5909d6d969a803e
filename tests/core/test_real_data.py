"""On the real text tasks with SmolLM2's own tokeniser: little padding, and a run that learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clkit import api, resolve
from clkit.config import LoraConfig, ModelConfig
from clkit.loader import epoch_order
from clkit.models import load_model
from clkit.tasks import build_tasks

TASKS = ["agnews", "amazon", "dbpedia", "qqp", "mnli"]


@pytest.fixture(scope="module")
def smollm2():
    config = ModelConfig(
        dtype="float32", prompt="plain", max_length=512, lora=LoraConfig(r=4, target_modules=["q_proj"])
    )
    return load_model(config, generator=torch.Generator().manual_seed(0))


@pytest.mark.real_llm
@pytest.mark.parametrize("size", [4, 8, 16])
def test_less_than_a_tenth_of_the_tokens_of_the_text_tasks_is_padding(smollm2, data_root, size):
    tasks = build_tasks("jsonl", {"root": str(data_root / "textcl"), "tasks": TASKS})
    for task in tasks:
        lengths = smollm2.encode(task.train).lengths
        batches = epoch_order(len(lengths), size, torch.Generator().manual_seed(0), lengths)
        padded = sum(int(lengths[b.numpy()].max()) * len(b) for b in batches)
        assert 1 - lengths.sum() / padded < 0.10, task.name


@pytest.mark.real_llm
def test_smollm2_learns_a_fact_and_the_exported_adapter_says_it_without_clkit(tmp_path):
    config = resolve.validate(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {"prompt": "plain", "dtype": "float32", "lora": {"r": 8, "target_modules": ["q_proj", "v_proj"]}},
            "tasks": {"source": "facts", "people": 3, "relations": ["city"], "phrasings": 1},
            "train": {"steps": 14, "batch_size": 3, "learning_rate": 0.003},
            "eval": {"max_new_tokens": 6},
        }
    )
    result = api.run(config)
    np.testing.assert_array_equal(result.matrix, [[1.0]])
    assert result.initial[0] == 0.0

    names: dict = {}
    exec(result.snippet, names)
    record = build_tasks("facts", config.tasks.config, config.seed)[0].eval.records[0]
    inputs = names["tokenizer"](record.prompt, return_tensors="pt")
    out = names["model"].eval().generate(**inputs, max_new_tokens=6, do_sample=False)
    assert names["tokenizer"].decode(out[0, inputs["input_ids"].shape[1] :]).strip().startswith(record.answer)
