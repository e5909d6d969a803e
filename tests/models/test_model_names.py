"""What a model's name means, what is wrong with a configuration, and that neither needs torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from clkit.config import LoraConfig, ModelConfig
from clkit.models import check, describe, resolve


def test_each_form_of_name_is_recognised(tmp_path, lm_directory):
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    forms = {
        "smollm2-135m": "alias",
        "efficientnet-lite0": "alias",
        "cifar-resnet-32": "built-in",
        str(lm_directory): "directory",
        str(gguf): "gguf",
        "owner/model-1.5B": "hub",
    }
    assert {name: resolve(name).form for name in forms} == forms


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smolm2-135m", "Did you mean 'smollm2-135m'?"),
        ("SmolLM2-135M", "Did you mean 'smollm2-135m'?"),
        ("cifar-resnet-33", "Did you mean 'cifar-resnet-32'?"),
        ("gpt2", "a hub id has the form owner/name"),
        ("./no/such/place", "there is no directory"),
        ("~/no-such-place", "there is no directory"),
        ("weights/no-such.gguf", "there is no file"),
    ],
)
def test_an_unknown_name_says_what_is_near_and_what_exists(name, says):
    (problem,) = check(ModelConfig(name=name))
    assert problem.where == "model.name"
    assert says in problem.what


def test_a_directory_that_is_no_model_says_why(tmp_path):
    assert "no config.json" in check(ModelConfig(name=str(tmp_path)))[0].what
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "no .safetensors" in check(ModelConfig(name=str(tmp_path)))[0].what
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "PEFT adapter" in check(ModelConfig(name=str(tmp_path)))[0].what


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"")
    assert "not a .gguf" in check(ModelConfig(name=str(file)))[0].what


def test_all_problems_of_a_configuration_are_found_at_once():
    lora = LoraConfig(r=4, target_modules=["all-linear", "q_proj"])
    config = ModelConfig(name="mlp", lora=lora, gradient_checkpointing=True, freeze_backbone=True, hidden=[0])
    assert [p.where for p in check(config, "m")] == [
        "m.lora.r",
        "m.gradient_checkpointing",
        "m.freeze_backbone",
        "m.lora.target_modules",
        "m.hidden",
    ]
    assert "the list is empty" in check(ModelConfig(lora=LoraConfig(r=1, target_modules=[])))[0].what


def test_the_default_configuration_has_no_problem():
    assert check(ModelConfig()) == []


def test_every_model_is_described_in_one_line():
    lines = dict(describe())
    assert {"smollm2-135m", "all-minilm-l6-v2", "efficientnet-lite0", "mlp", "cifar-resnet-8"} <= set(lines)
    assert all(line and "\n" not in line and "broken" not in line for line in lines.values())


def test_names_are_checked_and_listed_without_torch():
    code = (
        "import sys, json, clkit.models as m; from clkit.config import ModelConfig;"
        "m.describe(); m.check(ModelConfig());"
        "print(json.dumps([x for x in ('torch', 'transformers', 'peft', 'huggingface_hub') if x in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
