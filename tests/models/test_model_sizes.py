"""Estimates without weights agree with the loaded model."""

from __future__ import annotations

import pytest
import torch

from clkit.config import LoraConfig, ModelConfig
from clkit.errors import ModelError
from clkit.models import estimate, load_model


def counted(module) -> tuple[int, int]:
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def loaded(config, classes=None, shape=None):
    return load_model(config, num_classes=classes, input_shape=shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("r", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_language_model_is_estimated_exactly(lm_directory, r, dtype):
    config = ModelConfig(name=str(lm_directory), dtype=dtype, lora=LoraConfig(r=r))
    sizes = estimate(config)
    module = loaded(config).module
    assert (sizes["parameters"], sizes["trainable"]) == counted(module)
    assert sizes["weight_bytes"] == sum(p.nbytes for p in module.parameters())


@pytest.mark.parametrize("options", [{}, {"lora": LoraConfig(r=2)}, {"freeze_backbone": True}])
def test_an_encoder_is_estimated_exactly(encoder_directory, options):
    config = ModelConfig(name=str(encoder_directory), **options)
    sizes = estimate(config, 7)
    module = loaded(config, 7).module
    assert (sizes["parameters"], sizes["trainable"]) == counted(module)
    assert sizes["weight_bytes"] == sum(p.nbytes for p in module.parameters())


@pytest.mark.parametrize("freeze", [False, True])
def test_a_built_in_network_is_estimated_exactly(freeze):
    config = ModelConfig(name="cifar-resnet-32", freeze_backbone=freeze)
    sizes = estimate(config, 10, (3, 32, 32))
    assert sizes == {
        "parameters": 463_504 + 650,
        "trainable": 650 if freeze else 463_504 + 650,
        "weight_bytes": (463_504 + 650) * 4,
    }


def test_an_alias_is_estimated_before_it_is_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("CLKIT_CACHE", str(tmp_path))
    sizes = estimate(ModelConfig(lora=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), dtype="bfloat16"))
    adapters = 30 * 8 * ((576 + 576) + (576 + 192))
    assert sizes == {
        "parameters": 134_515_008 + adapters,
        "trainable": adapters,
        "weight_bytes": 134_515_008 * 2 + adapters * 4,
    }
    assert list(tmp_path.iterdir()) == []


def test_what_can_not_be_known_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert estimate(ModelConfig(name="nobody/has-this-model")) is None
    assert estimate(ModelConfig(name=str(file))) is None
    assert estimate(ModelConfig(name="mlp"), 3) is None


def test_a_configuration_that_does_not_fit_is_refused_before_any_weight_is_there():
    with pytest.raises(ModelError, match="Did you mean 'q_proj'"):
        estimate(ModelConfig(lora=LoraConfig(r=8, target_modules=["q_prj"])))
    with pytest.raises(ModelError, match="expected at most 192"):
        estimate(ModelConfig(lora=LoraConfig(r=500, target_modules=["k_proj"])))
    with pytest.raises(ModelError, match="Did you mean 'smollm2-135m'"):
        estimate(ModelConfig(name="smolm2-135m"))
    with pytest.raises(ModelError, match="no language model"):
        estimate(ModelConfig(name="all-minilm-l6-v2"))
