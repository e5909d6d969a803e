"""Classifiers: batches, normalisation, frozen backbones, text encoders, export."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from clkit.config import LoraConfig, ModelConfig
from clkit.errors import DataError, ModelError
from clkit.models import load_classifier, load_model
from clkit.models.classifier import Classifier
from clkit.tasks.base import LabelledExamples, TextExamples, TextRecord

TEXTS = ("who lives in Berlin", "a", "The capital of France is Paris", "many people live there " * 20)


def load(name, classes=4, shape=None, seed=7, **options) -> Classifier:
    config = ModelConfig(name=str(name), **options)
    model = load_model(config, num_classes=classes, input_shape=shape, generator=torch.Generator().manual_seed(seed))
    assert isinstance(model, Classifier)
    return model


def examples(inputs, labels=None) -> LabelledExamples:
    n = len(inputs)
    return LabelledExamples(inputs, torch.arange(n) % 4 if labels is None else labels, [f"x{i}" for i in range(n)])


def test_a_batch_is_rows_of_the_tensor(generator):
    x = torch.randn(10, 6, generator=generator)
    model = load("mlp", shape=(6,), hidden=[8])
    encoded = model.encode(examples(x))
    index = torch.tensor([7, 0, 7])
    batch = encoded.batch(index)
    assert torch.equal(batch.inputs["x"], x[index]) and batch.labels.tolist() == [3, 0, 3]
    assert batch.ids == ["x7", "x0", "x7"] and batch.num_targets == 3 and encoded.lengths is None
    expected = F.cross_entropy(model.logits(batch), batch.labels)
    assert torch.equal(model.loss(batch), expected) and torch.equal(model.loss(batch, model.logits(batch)), expected)


def test_a_last_batch_of_one_small_image_goes_through_resnet_18(generator):
    model = load("resnet-18", shape=(3, 32, 32))
    model.module.train()
    encoded = model.encode(examples(torch.randn(3, 3, 32, 32, generator=generator)))
    model.loss(encoded.batch(torch.tensor([0, 1]))).backward()
    norm = model.module.backbone.stage4[1].bn2
    before = norm.running_mean.clone()
    assert norm.num_batches_tracked == 1
    model.loss(encoded.batch(torch.tensor([2]))).backward()
    assert norm.num_batches_tracked == 1 and torch.equal(norm.running_mean, before)  # one value has no statistics
    assert model.module.backbone.stem[1].num_batches_tracked == 2


def test_lazy_inputs_are_read_by_index():
    class Lazy:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return index.float()[:, None].repeat(1, 3)

    model = load("mlp", shape=(3,), hidden=[8])
    batch = model.encode(examples(Lazy())).batch(torch.tensor([4, 1]))
    assert batch.inputs["x"].tolist() == [[4.0] * 3, [1.0] * 3]


def test_byte_images_are_normalised_and_float_images_are_not(generator):
    model = load("cifar-resnet-8", shape=(3, 8, 8))
    model.module.eval()
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=generator)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in model.module.backbone.normalise)
    by_hand = (x.float() / 255 - mean) / std
    with torch.no_grad():
        assert torch.allclose(model.module(x), model.module(by_hand), atol=1e-5)


def test_efficientnet_scales_bytes_as_its_weights_expect(monkeypatch):
    from clkit.models.backbones.efficientnet_lite import EfficientNetLite0
    from clkit.models.classifier import ClassifierNet

    net = ClassifierNet(EfficientNetLite0(torch.Generator()), 2, torch.Generator())
    x = torch.tensor([0, 127, 255], dtype=torch.uint8)
    assert torch.allclose(x * net.scale + net.shift, (x.float() - 127) / 128, atol=1e-6)


def test_numbers_become_float32():
    model = load("mlp", shape=(2,), hidden=[4])
    batch = model.encode(examples(torch.ones(4, 2, dtype=torch.float64))).batch(torch.arange(4))
    assert batch.inputs["x"].dtype == torch.float32


def test_a_frozen_backbone_is_not_trained_and_its_batch_norm_stays(generator):
    model = load("cifar-resnet-8", shape=(1, 8, 8), freeze_backbone=True)
    model.module.train()
    state = {k: v.clone() for k, v in model.module.state_dict().items()}
    batch = model.encode(examples(torch.randn(8, 1, 8, 8, generator=generator))).batch(torch.arange(8))
    assert model.module.features(**batch.inputs).grad_fn is None
    model.loss(batch).backward()
    trained = [n for n, p in model.module.named_parameters() if p.grad is not None]
    assert trained == ["head.weight", "head.bias"]
    assert all(torch.equal(v, state[k]) for k, v in model.module.state_dict().items())
    assert model.module.head.training and not model.module.backbone.training


def test_a_trained_backbone_learns_and_its_batch_norm_moves(generator):
    model = load("cifar-resnet-8", shape=(1, 8, 8))
    before = model.module.backbone.stem[1].running_mean.clone()
    batch = model.encode(examples(torch.randn(8, 1, 8, 8, generator=generator))).batch(torch.arange(8))
    model.loss(batch).backward()
    assert all(p.grad is not None for p in model.module.parameters())
    assert not torch.equal(model.module.backbone.stem[1].running_mean, before)


def test_the_same_seed_builds_the_same_classifier():
    first, again, other = (load("cifar-resnet-8", shape=(3, 8, 8), seed=s).module.state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert first["head.bias"].abs().max() == 0


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_texts_are_padded_without_effect_and_cut_at_the_encoders_limit(encoder_directory, pooling):
    model = load(encoder_directory, pooling=pooling)
    model.module.eval()
    encoded = model.encode(examples(TEXTS))
    assert encoded.lengths.max() == 40  # the encoder's positions, below max_length
    together = model.logits(encoded.batch(torch.arange(4)))
    for i in range(4):
        alone = encoded.batch(torch.tensor([i]))
        assert alone.inputs["input_ids"].shape == (1, encoded.lengths[i])
        assert torch.allclose(model.logits(alone)[0], together[i], atol=1e-5)
    assert len(model.encode(examples(())).ids) == 0


def test_an_encoder_that_counts_positions_from_behind_the_padding_is_cut_to_those_it_has(encoder_directory, tmp_path):
    from transformers import RobertaConfig, RobertaModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    RobertaModel(RobertaConfig(vocab_size=400, max_position_embeddings=40, pad_token_id=1, **small)).save_pretrained(
        tmp_path
    )
    for file in encoder_directory.glob("token*"):
        shutil.copy(file, tmp_path)
    model = load(tmp_path)
    encoded = model.encode(examples(TEXTS))
    assert encoded.lengths.max() == 38  # 40 less those up to the padding's own
    model.loss(encoded.batch(torch.arange(4))).backward()


def test_a_model_that_wants_an_answer_too_is_refused_as_an_encoder(encoder_directory, tmp_path):
    from transformers import T5Config, T5Model

    T5Model(T5Config(vocab_size=400, d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4)).save_pretrained(tmp_path)
    for file in encoder_directory.glob("token*"):
        shutil.copy(file, tmp_path)
    model = load(tmp_path)
    with pytest.raises(ModelError, match="T5Model is no text encoder: it also wants the tokens of an answer"):
        model.logits(model.encode(examples(TEXTS)).batch(torch.arange(4)))


def test_the_unused_pooler_of_an_encoder_is_not_trained(encoder_directory):
    model = load(encoder_directory)
    frozen = {n for n, p in model.module.named_parameters() if not p.requires_grad}
    assert frozen == {f"backbone.encoder.pooler.dense.{k}" for k in ("weight", "bias")}
    model.loss(model.encode(examples(TEXTS)).batch(torch.arange(4))).backward()
    assert all(p.grad is not None for p in model.module.parameters() if p.requires_grad)


def test_lora_on_an_encoder_trains_adapters_and_head(encoder_directory):
    model = load(encoder_directory, lora=LoraConfig(r=2, target_modules=["query", "value"]))
    trained = {n for n, p in model.module.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" not in n} == {"head.weight", "head.bias"}
    assert sum("lora_A" in n for n in trained) == 4
    model.loss(model.encode(examples(TEXTS)).batch(torch.arange(4))).backward()


def test_a_language_model_can_be_an_encoder(lm_directory):
    model = load(lm_directory, freeze_backbone=True)
    batch = model.encode(examples(TEXTS)).batch(torch.arange(4))
    assert model.logits(batch).shape == (4, 4)


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("mlp", (6,), {"hidden": [8, 5]}),
        ("cifar-resnet-8", (1, 8, 8), {"freeze_backbone": True}),
        ("encoder", None, {"pooling": "cls", "lora": LoraConfig(r=2, target_modules=["query"])}),
    ],
)
def test_an_exported_classifier_comes_back_the_same(name, shape, options, encoder_directory, tmp_path, generator):
    model = load(encoder_directory if name == "encoder" else name, shape=shape, **options)
    with torch.no_grad():
        for p in model.module.parameters():
            p.add_(0.05)
    snippet = model.export(tmp_path / "out")
    inputs = TEXTS if shape is None else torch.randn(4, *shape, generator=generator)
    batch = model.encode(examples(inputs)).batch(torch.arange(4))
    model.module.eval()
    again = load_classifier(tmp_path / "out")
    assert not again.module.training
    assert torch.equal(again.logits(again.encode(examples(inputs)).batch(torch.arange(4))), model.logits(batch))
    assert again.module.frozen == model.module.frozen and again.num_classes == 4
    names: dict = {"texts": list(TEXTS), "x": inputs}
    exec(snippet, names)
    assert torch.allclose(names["logits"], model.logits(batch), atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_snippet_reads_texts_as_they_were_scored_whatever_the_tokenizer_does_by_itself(
    pooling, lm_directory, tmp_path
):
    directory = shutil.copytree(lm_directory, tmp_path / "model")
    file = directory / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(file.read_text()).items() if k != "pad_token"}
    file.write_text(json.dumps(settings | {"padding_side": "left"}))
    model = load(directory, pooling=pooling, max_length=8)
    model.module.eval()
    names: dict = {"texts": list(TEXTS)}
    exec(model.export(tmp_path / "out"), names)
    assert torch.allclose(
        names["logits"], model.logits(model.encode(examples(TEXTS)).batch(torch.arange(4))), atol=1e-5
    )


def test_a_directory_that_is_no_classifier_is_refused(tmp_path, lm_directory):
    with pytest.raises(ModelError, match="not written by"):
        load_classifier(lm_directory)
    with pytest.raises(ModelError, match="can't be loaded"):
        load_classifier(tmp_path)
    load("mlp", shape=(6,)).export(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="can't be loaded"):
        load_classifier(tmp_path)


def test_examples_that_do_not_fit_are_refused(encoder_directory):
    mlp = load("mlp", shape=(6,))
    with pytest.raises(DataError, match=r"shape \(6,\); got \(5,\)"):
        mlp.encode(examples(torch.zeros(2, 5)))
    with pytest.raises(DataError, match="classes 0 to 3"):
        mlp.encode(examples(torch.zeros(2, 6), torch.tensor([0, 4])))
    with pytest.raises(DataError, match="reads images or vectors; the task has texts"):
        mlp.encode(examples(("a", "b")))
    with pytest.raises(DataError, match="TextExamples"):
        mlp.encode(TextExamples((TextRecord("a", "b", id="x"),)))
    with pytest.raises(DataError, match="reads texts; the task has tensors"):
        load(encoder_directory).encode(examples(torch.zeros(2, 6)))
    with pytest.raises(ModelError, match="these tasks have text"):
        load("mlp")
    with pytest.raises(ModelError, match="at least one class"):
        load("mlp", classes=0, shape=(6,))


def test_small_networks_compute_in_float32_unless_told_otherwise():
    assert load("mlp", shape=(6,)).autocast_dtype is None
    assert load("mlp", shape=(6,), dtype="bfloat16").autocast_dtype == torch.bfloat16
