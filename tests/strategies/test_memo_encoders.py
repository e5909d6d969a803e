"""MEMO on encoders from transformers: cut between their layers, learned with a copy of the last one, exported."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from byte_level import byte_tokenizer

from clkit import build, resolve
from clkit.config import ModelConfig
from clkit.errors import ModelError
from clkit.models import load_classifier, load_model
from clkit.models.encoder import _PLAIN, TextEncoder
from clkit.models.expandable import Expandable
from clkit.tasks.base import LabelledExamples, Task, TaskSequence
from clkit.trainer import SequentialTrainer


def test_a_text_encoder_is_cut_between_its_layers(tmp_path):
    folder, texts = tiny_bert(tmp_path), ("a b", "abc def " * 4, "x", "who is it")
    model = load_model(
        ModelConfig(name=str(folder)), num_classes=2, generator=torch.Generator().manual_seed(0), input_shape=None
    )
    labels = torch.tensor([0, 1, 0, 1])
    batch = model.encode(LabelledExamples(texts, labels, list("abcd"))).batch(torch.arange(4))
    backbone = model.module.backbone.eval()
    with torch.no_grad():
        expected = backbone(**batch.inputs)
        assert list(backbone.parts()) == ["embeddings", "layer1", "layer2", "pool"] and backbone.default_cut == "layer2"
        for cut in ("embeddings", "layer1", "layer2"):
            torch.testing.assert_close(Expandable(backbone, cut).eval()(**batch.inputs), expected, atol=1e-5, rtol=1e-5)


def tiny_bert(tmp_path):
    from transformers import BertConfig, BertModel

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize("kind", sorted(_PLAIN))
def test_every_text_encoder_that_names_its_parts_computes_the_same_when_it_is_cut(kind):
    backbone = random_encoder(kind)
    inputs = {"input_ids": torch.randint(4, 40, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    inputs["attention_mask"][1, 5:] = 0
    with torch.no_grad():
        grown = Expandable(backbone, backbone.default_cut)
        grown.grow()
        expected = backbone(**inputs).repeat(1, 2)
        torch.testing.assert_close(grown.eval()(**inputs), expected, atol=1e-5, rtol=1e-5)


def random_encoder(kind, **options):
    """An encoder of transformers with random weights, those of norms and biases too."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "embedding_size": 16, "max_position_embeddings": 32, "pad_token_id": 0}
    module = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **sizes | options))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return TextEncoder(module.eval(), "mean").eval()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mpnet", {}),
        ("esm", {"emb_layer_norm_before": False}),
        ("megatron-bert", {}),
        ("roberta-prelayernorm", {}),
        ("xlm-roberta-xl", {}),
        ("deberta", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
        ("electra", {"embedding_size": 8}),
        ("bert", {"is_decoder": True}),
    ],
)
def test_a_text_encoder_that_is_no_chain_of_its_layers_is_refused(kind, options):
    """Their layers get positions from outside, or something comes after the last: a chain computed something else."""
    backbone = random_encoder(kind, **options)
    assert backbone.default_cut == ""
    with pytest.raises(ModelError, match="TextEncoder can't be cut"):
        Expandable(backbone, "layer2")


def test_texts_are_learned_and_exported(tmp_path):
    tasks = []
    for t in range(3):
        texts = tuple(f"{'abcdef'[2 * t + i % 2] * 3} {i}" for i in range(8))
        examples = LabelledExamples(texts, torch.arange(8) % 2 + 2 * t, [f"{t}/{i}" for i in range(8)])
        tasks.append(Task(f"t{t}", examples, examples, "classification", "accuracy", (2 * t, 2 * t + 1)))
    sequence = TaskSequence(tasks, scenario="class")
    trainer, result = learned(sequence, tiny_bert(tmp_path), tmp_path, train_base=False)
    assert not np.isnan(result.metrics["average_accuracy"])
    loaded = load_classifier(tmp_path / "run" / "export").module
    batch = trainer.run.encodings.train(1).batch(torch.arange(4))
    with torch.inference_mode():
        assert torch.equal(loaded(**batch.inputs), trainer.model.module.eval()(**batch.inputs))


def learned(sequence, model, tmp_path, train_base):
    """The trainer after a run with MEMO, and its result."""
    content = {
        "output_dir": str(tmp_path / "run"),
        "model": {"name": str(model)},
        "tasks": "facts",
        "strategy": {"name": "memo", "train_base": train_base, "replay": {"size": 6, "policy": "herding"}},
        "train": {"epochs": 3, "batch_size": 4, "learning_rate": 0.01},
    }
    config = resolve.validate(content)
    model = build.make_model(config.model, sequence, 0, lambda text: None)
    trainer = SequentialTrainer(model, build.make_strategy(config.strategy), config, directory=tmp_path / "run")
    return trainer, trainer.fit(sequence)


KINDS = {"vit": ("ViTConfig", "ViTModel"), "dinov2": ("Dinov2Config", "Dinov2Model")}


def tiny_vit(tmp_path, kind="vit"):
    import transformers

    config, model = (getattr(transformers, name) for name in KINDS[kind])
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    model(config(**sizes, intermediate_size=16)).save_pretrained(tmp_path / kind)
    content = {"image_mean": [0.4] * 3, "image_std": [0.2] * 3}
    (tmp_path / kind / "preprocessor_config.json").write_text(json.dumps(content))
    return tmp_path / kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_image_encoder_is_cut_between_its_layers(kind, pooling, tmp_path):
    config = ModelConfig(name=str(tiny_vit(tmp_path, kind)), pooling=pooling)
    generator = torch.Generator().manual_seed(0)
    backbone = load_model(config, num_classes=2, input_shape=(1, 12, 12), generator=generator).module.backbone.eval()
    x = torch.rand(3, 1, 12, 12, generator=generator)
    assert list(backbone.parts()) == ["embeddings", "layer1", "layer2", "pool"] and backbone.default_cut == "layer2"
    with torch.no_grad():
        expected = backbone(x)
        for cut in backbone.parts():
            grown = Expandable(backbone, cut).eval()
            grown.grow()
            torch.testing.assert_close(grown.eval()(x), expected.repeat(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("train_base", [True, False])
def test_images_are_learned_and_exported(train_base, tmp_path):
    tasks = []
    generator = torch.Generator().manual_seed(0)
    for t in range(3):
        y = torch.arange(8) % 2 + 2 * t
        x = (40 * y.view(-1, 1, 1, 1) + torch.randint(20, (8, 1, 16, 16), generator=generator)).to(torch.uint8)
        examples = LabelledExamples(x, y, [f"{t}/{i}" for i in range(8)])
        tasks.append(Task(f"t{t}", examples, examples, "classification", "accuracy", (2 * t, 2 * t + 1)))
    trainer, _ = learned(TaskSequence(tasks, scenario="class"), tiny_vit(tmp_path), tmp_path, train_base)
    blocks = trainer.strategy.backbone.blocks
    old, new = (block.layer2.layer.mlp.state_dict() for block in (blocks[0], blocks[-1]))
    assert len(blocks) == 3 and any(not torch.equal(old[k], new[k]) for k in old)
    loaded = load_classifier(tmp_path / "run" / "export").module
    batch = trainer.run.encodings.train(1).batch(torch.arange(4))
    with torch.inference_mode():
        assert torch.equal(loaded(**batch.inputs), trainer.model.module.eval()(**batch.inputs))


def test_an_image_encoder_that_is_no_chain_of_layers_is_refused(tmp_path):
    from transformers import ConvNextConfig, ConvNextModel

    torch.manual_seed(0)
    ConvNextModel(ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2)).save_pretrained(tmp_path / "net")
    config = ModelConfig(name=str(tmp_path / "net"))
    model = load_model(config, num_classes=2, input_shape=(3, 32, 32), generator=torch.Generator())
    with pytest.raises(ModelError, match="VisionEncoder can't be cut .* or an encoder built like BERT or ViT"):
        Expandable(model.module.backbone, "layer1")
