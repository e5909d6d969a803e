"""Frozen encoders: features once per example, image encoders from Hugging Face, tokens, and the bottleneck on them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from clkit import api, resolve
from clkit.cache import RowCache
from clkit.config import ModelConfig
from clkit.errors import ModelError
from clkit.models import load_classifier, load_model
from clkit.models.frozen import EncodedFeatures
from clkit.tasks.base import LabelledExamples

BOTTLENECK = {"name": "dkvb", "heads": 4, "pairs": 16, "key_dim": 8, "key_passes": 1, "decoder": "votes"}


@pytest.fixture(scope="session")
def vit_directory(tmp_path_factory):
    """A two-layer random ViT for images of 16 x 16."""
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    ViTModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}))
    return folder


def images(count=10, size=16):
    x = torch.randint(256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return LabelledExamples(x, torch.arange(count) % 2, [f"{i}" for i in range(count)])


def vision_content(where, model, **strategy):
    return {
        "output_dir": str(where),
        "model": {"name": str(model), "freeze_backbone": True},
        "tasks": {"source": "digits", "flat": False, "train_limit": 12, "eval_limit": 6},
        "strategy": {"name": "naive", **strategy},
        "train": {"batch_size": 8, "optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.1, "epochs": 3},
    }


def text_content(where, model, **strategy):
    file = where / "text.jsonl"
    places = ("Paris", "Rome", "Berlin", "Oslo")
    rows = [{"prompt": f"{p} " * (1 + i % 5) + str(i), "answer": p, "label": p} for p in places for i in range(12)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {
        "output_dir": str(where / "run"),
        "model": {"name": str(model)},
        "tasks": {"source": "jsonl", "kind": "classification", "tasks": [str(file)], "classes_per_task": 2},
        "strategy": {**BOTTLENECK, **strategy},
        "train": {"batch_size": 8, "optimizer": "sgd", "momentum": 0.0, "learning_rate": 1.0},
        "checkpoint": {"every_steps": 2},
    }


def test_features_of_a_frozen_backbone_are_computed_once_and_train_the_same_head(tmp_path, monkeypatch):
    from clkit.models.backbones.cifar_resnet import CifarResNet
    from clkit.models.classifier import Classifier

    seen = []
    monkeypatch.setenv("CLKIT_COMPUTED", str(tmp_path / "computed"))  # other tests may have computed the same
    plain = CifarResNet.forward
    monkeypatch.setattr(CifarResNet, "forward", lambda self, x: (seen.append(len(x)), plain(self, x))[1])
    first = api.run(resolve.validate(vision_content(tmp_path / "a", "cifar-resnet-8")))
    assert sum(seen) == 10 * 12 + 10 * 6, "every image once, over three epochs and all evaluations"
    seen.clear()
    second = api.run(resolve.validate({**vision_content(tmp_path / "b", "cifar-resnet-8"), "name": "again"}))
    assert not seen
    np.testing.assert_array_equal(first.matrix, second.matrix)
    monkeypatch.setattr(Classifier, "precompute", lambda self, encoded, cache: encoded)
    without = api.run(resolve.validate(vision_content(tmp_path / "c", "cifar-resnet-8")))
    assert sum(seen) > 180
    np.testing.assert_allclose(without.matrix, first.matrix, atol=1e-6)


def test_features_are_found_by_what_the_encoder_reads_and_by_its_weights(tmp_path):
    def features(seed, examples, root):
        config = ModelConfig("cifar-resnet-8", freeze_backbone=True)
        generator = torch.Generator().manual_seed(seed)
        model = load_model(config, num_classes=2, input_shape=(3, 16, 16), generator=generator)
        encoded = model.precompute(model.encode(examples), RowCache(root))
        assert isinstance(encoded, EncodedFeatures)
        batch = model.encode(examples).batch(torch.arange(len(examples)))
        direct = model.module.eval().features(**batch.inputs)
        assert torch.allclose(encoded.features, direct, atol=1e-5)
        return len(list(root.rglob("*.safetensors")))

    assert features(0, images(), tmp_path) == 1
    assert features(0, images().subset([3, 1]), tmp_path) == 1
    renamed = LabelledExamples(images().inputs, 1 - images().labels, [f"new-{i}" for i in range(10)])
    assert features(0, renamed, tmp_path) == 1
    assert features(1, images(), tmp_path) == 2


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_image_encoder_from_hugging_face_computes_what_transformers_does(vit_directory, pooling, tmp_path):
    from transformers import ViTModel

    config = ModelConfig(str(vit_directory), pooling=pooling)
    model = load_model(config, num_classes=2, input_shape=(3, 16, 16), generator=torch.Generator())
    x = images().inputs
    states = ViTModel.from_pretrained(vit_directory).eval()(pixel_values=(x / 255 - 0.4) / 0.2).last_hidden_state
    expected = states.mean(1) if pooling == "mean" else states[:, 0]
    with torch.no_grad():
        assert torch.allclose(model.module.eval().features(x), expected, atol=1e-5)
        assert model.module.features(images(4, 12).inputs).shape == (4, 32), "other sizes are resized"
        model.export(tmp_path / "export")
        loaded = load_classifier(tmp_path / "export").module
        assert torch.allclose(loaded(x), model.module(x), atol=1e-6)


def test_the_same_weights_that_read_images_of_another_size_have_features_of_their_own(tmp_path):
    from transformers import ConvNextConfig, ConvNextModel

    torch.manual_seed(0)
    module = ConvNextModel(ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, image_size=32))
    found = {}
    for size, cache in ((32, "shared"), (16, "shared"), (16, "own"), (32, "shared")):
        module.config.image_size = size
        folder = tmp_path / f"{size}-{len(found)}"  # where a model lies and which version wrote it does not matter
        module.save_pretrained(folder)
        config = ModelConfig(name=str(folder), freeze_backbone=True)
        model = load_model(config, num_classes=2, input_shape=(3, 32, 32), generator=torch.Generator().manual_seed(0))
        features = model.precompute(model.encode(images(4, 32)), RowCache(tmp_path / cache)).features
        found.setdefault((size, cache), []).append(features)
    assert torch.equal(found[16, "shared"][0], found[16, "own"][0])
    assert torch.equal(*found[32, "shared"]) and len(list((tmp_path / "shared").glob("*/*.safetensors"))) == 2


def test_a_language_encoder_is_no_image_encoder(encoder_directory):
    with pytest.raises(ModelError, match="BertModel is no image encoder, and these tasks have images"):
        load_model(
            ModelConfig(str(encoder_directory)), num_classes=2, input_shape=(3, 8, 8), generator=torch.Generator()
        )


@pytest.mark.parametrize("tokens", [False, True])
def test_the_bottleneck_on_an_image_encoder(vit_directory, tmp_path, tokens):
    content = vision_content(tmp_path, vit_directory, **BOTTLENECK, tokens=tokens)
    result = api.run(resolve.validate(content))
    assert result.metrics["average_accuracy"] > 0.15
    x = images(4, 8).inputs[:, :1].float() / 255
    with api.open_run(result.run_dir) as trainer, torch.no_grad():
        ours = trainer.model.module.eval()(x)
    assert torch.equal(load_classifier(result.run_dir / "export").module(x), ours)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("decoder", ["votes", "voting"])
def test_the_bottleneck_on_class_incremental_text(encoder_directory, tmp_path, tokens, decoder):
    content = text_content(tmp_path, encoder_directory, tokens=tokens, decoder=decoder)
    result = api.run(resolve.validate(content))
    assert result.metrics["average_accuracy"] > 0.4
    model = load_classifier(result.run_dir / "export")
    texts = ["Paris 3", "Oslo Oslo Oslo 7", "Rome 1"]
    inputs = model.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with api.open_run(result.run_dir) as trainer, torch.no_grad():
        assert torch.allclose(model.module(**inputs), trainer.model.module.eval()(**inputs), atol=1e-6)


def test_every_token_is_looked_up_and_padding_is_not(encoder_directory, tmp_path):
    config = resolve.validate(text_content(tmp_path, encoder_directory, tokens=True, decoder="voting"))
    result = api.run(config)
    with api.open_run(result.run_dir) as trainer, torch.no_grad():
        encoded = trainer.run.encodings.eval(trainer.tasks[0])
        net = trainer.model.module.eval()
        batch = encoded.batch(torch.arange(len(encoded)))
        pairs = batch.inputs["pairs"]
        assert ((pairs >= 0).all(2).sum(1) == batch.inputs["attention_mask"].sum(1)).all()
        together = net(**batch.inputs)
        for i in range(len(encoded)):
            alone = encoded.batch(torch.tensor([i])).inputs
            assert torch.allclose(net(**alone)[0], together[i], atol=1e-5)
        trainer.strategy.head.usage[:, 1::2] = 0
        again = net(**batch.inputs)
        fresh = net(**{k: v for k, v in batch.inputs.items() if k != "pairs"})
        assert torch.allclose(again, fresh, atol=1e-5) and not torch.allclose(again, together, atol=1e-5)


def test_given_features_are_a_model_of_their_own():
    model = load_model(
        ModelConfig("identity"), num_classes=3, input_shape=(2, 4), generator=torch.Generator().manual_seed(0)
    )
    x = torch.randn(5, 2, 4)
    assert torch.equal(model.module.features(x), x.flatten(1))
    with pytest.raises(ModelError, match="reads images or vectors; these tasks have text"):
        load_model(ModelConfig("identity"), num_classes=3, generator=torch.Generator())
