"""The language model: loss against transformers' own, generation, adapters, export."""

from __future__ import annotations

import copy
import json
import shutil
import types
import warnings

import pytest
import torch
from torch import nn

from clkit.config import LoraConfig, ModelConfig
from clkit.errors import CapabilityError, DataError, ModelError
from clkit.models import load_model, wrap
from clkit.models.causal_lm import CausalLM
from clkit.models.lora import attach_lora, base_model
from clkit.models.precision import pick_dtype
from clkit.models.prompts import PromptFormat
from clkit.modes import evaluating
from clkit.tasks.base import EditExamples, EditRecord, LabelledExamples, TextExamples, TextRecord

PAIRS = [
    ("The capital of France is", "Paris"),
    ("a", "b c d e"),
    ("Question: who lives in Berlin? Answer:", "many people live there"),
    ("The capital of Italy is", "Rome and it is old"),
]
EXAMPLES = TextExamples(tuple(TextRecord(p, a, id=str(i)) for i, (p, a) in enumerate(PAIRS)))


def load(directory, r=0, seed=7, **options) -> CausalLM:
    options = {"dtype": "float32", "prompt": "plain", **options}
    lora = LoraConfig(r=r, alpha=8, target_modules=["q_proj", "v_proj"])
    config = ModelConfig(name=str(directory), lora=lora, **options)
    model = load_model(config, generator=torch.Generator().manual_seed(seed))
    assert isinstance(model, CausalLM)
    return model


def perturb(model: CausalLM) -> None:
    """Make the adapter do something (B starts at zero)."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.module.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3)


@pytest.mark.parametrize("r", [0, 4])
def test_the_loss_equals_transformers_own_over_full_logits(lm_directory, r):
    model = load(lm_directory, r)
    perturb(model)
    batch = model.encode(EXAMPLES).batch(torch.arange(4))
    reference = model.module(**batch.inputs, labels=batch.labels).loss
    loss = model.loss(batch)
    assert loss.item() == pytest.approx(reference.item(), abs=1e-6)
    ours = torch.autograd.grad(loss, [p for p in model.module.parameters() if p.requires_grad])
    theirs = torch.autograd.grad(reference, [p for p in model.module.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("r", [0, 4])
def test_logits_are_computed_only_where_a_target_is_predicted(lm_directory, r):
    model = load(lm_directory, r)
    batch = model.encode(EXAMPLES).batch(torch.arange(4))
    seen = []
    head = base_model(model.module).get_output_embeddings()
    head.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    logits, targets = model.logits(batch), model.targets(batch)
    positions = int((batch.labels[:, 1:] != -100).any(0).sum())
    assert seen == [positions] and positions < batch.labels.shape[1] - 1
    assert logits.shape[:2] == targets.shape == (4, positions)
    assert int((targets != -100).sum()) == batch.num_targets
    assert model.loss(batch, logits).item() == pytest.approx(model.loss(batch).item(), abs=1e-7)


def test_an_architecture_that_always_gives_all_logits_has_the_same_loss(lm_directory):
    class Plain(nn.Module):
        def __init__(self, lm):
            super().__init__()
            self.lm = lm

        def forward(self, input_ids, attention_mask, use_cache):
            return types.SimpleNamespace(logits=self.lm(input_ids, attention_mask).logits)

    model = load(lm_directory)
    batch = model.encode(EXAMPLES).batch(torch.arange(4))
    expected = model.loss(batch).item()
    model.module = Plain(model.module)
    assert model.loss(batch).item() == pytest.approx(expected, abs=1e-6)


def test_padding_does_not_change_a_rows_logits(lm_directory):
    model = load(lm_directory)
    encoded = model.encode(EXAMPLES)
    sums = [model.loss(b) * b.num_targets for b in (encoded.batch(torch.tensor([i])) for i in range(4))]
    batch = encoded.batch(torch.arange(4))
    assert (model.loss(batch) * batch.num_targets).item() == pytest.approx(sum(sums).item(), rel=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients(lm_directory):
    grads = []
    for on in (False, True):
        model = load(lm_directory, r=4, gradient_checkpointing=on)
        perturb(model)
        assert base_model(model.module).model.gradient_checkpointing is on
        batch = model.encode(EXAMPLES).batch(torch.arange(4))
        model.loss(batch).backward()
        grads.append([p.grad for p in model.module.parameters() if p.requires_grad])
    assert len(grads[0]) == 8
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("r", [0, 4])
def test_a_batch_is_answered_as_one_by_one_and_the_modes_are_restored(lm_directory, r):
    model = load(lm_directory, r, gradient_checkpointing=True)
    perturb(model)
    base_model(model.module).model.layers[0].eval()
    before = [m.training for m in model.module.modules()]
    encoded = model.encode(EXAMPLES)
    together = model.generate(encoded, range(4), 8)
    assert [m.training for m in model.module.modules()] == before
    assert together == [model.generate(encoded, torch.tensor([i]), 8)[0] for i in range(4)]
    assert len(set(together)) > 1
    assert model.generate(encoded, [], 8) == []


def test_generation_is_greedy_whatever_the_models_own_settings_are(lm_directory):
    model = load(lm_directory)
    encoded = model.encode(EXAMPLES)
    expected = model.generate(encoded, [0], 6)
    own = base_model(model.module).generation_config
    own.do_sample, own.temperature, own.repetition_penalty = True, 5.0, 9.0
    assert model.generate(encoded, [0], 6) == expected
    assert base_model(model.module).generation_config is own


@pytest.mark.parametrize("end", ["the tokenizer's", "the model's"])
def test_generation_stops_at_the_end_token(lm_directory, end):
    model = load(lm_directory)
    encoded = model.encode(EXAMPLES)
    text = model.generate(encoded, [0], 12)[0]
    words = model.tokenizer(text, add_special_tokens=False).input_ids
    stop = next(t for t in words if t != words[0])
    if end == "the tokenizer's":
        model.form.eos = stop
    else:
        base_model(model.module).generation_config.eos_token_id = [1, stop]
    ended = model.generate(encoded, [0], 12)[0]
    assert len(ended) < len(text) and text.startswith(ended)


@pytest.mark.parametrize("kind", ["gpt2", "gptj"])
def test_examples_and_answers_end_with_the_learned_positions(tokenizer, tmp_path, kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24} | ({"rotary_dim": 4} if kind == "gptj" else {})
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load(tmp_path)
    long = TextRecord("a b c d e f g " * 9 + "1", "Paris", id="long")
    encoded = model.encode(TextExamples((*EXAMPLES.records, long)))
    assert encoded.lengths.max() == 24
    model.loss(encoded.batch(torch.arange(5))).backward()
    room = 24 - len(encoded.prompt_ids(4))
    together = model.generate(encoded, range(5), 16)
    assert len(tokenizer(together[4]).input_ids) <= room + 1 < 17
    assert together == [model.generate(encoded, [i], 16)[0] for i in range(5)]


def test_a_wrapped_model_needs_no_token_to_pad_with(lm_directory):
    model = load(lm_directory)
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.pad_token = None
    wrapped = wrap(model.module, tokenizer)
    wrapped.form = PromptFormat(tokenizer, "plain")
    batches = [m.encode(EXAMPLES).batch(torch.arange(4)) for m in (model, wrapped)]
    assert torch.equal(wrapped.loss(batches[1]), model.loss(batches[0]))
    assert wrapped.generate(batches[1].source, range(4), 6) == model.generate(batches[0].source, range(4), 6)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_adapters_of_tokens_before_the_prompt_are_refused(kind, lm_directory):
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(lm_directory)
    module = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(CapabilityError, match="puts tokens of its own before the prompt.*LoRA"):
        wrap(module, AutoTokenizer.from_pretrained(lm_directory))


def test_adapters_come_from_the_generator_and_leave_the_global_one_alone(lm_directory):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = load(lm_directory, r=4, seed=1)
    assert torch.equal(torch.rand(3), expected)
    again, other = load(lm_directory, r=4, seed=1), load(lm_directory, r=4, seed=2)

    def adapters(model):
        return torch.cat([p.flatten() for p in model.module.parameters() if p.requires_grad])

    assert torch.equal(adapters(first), adapters(again))
    assert not torch.equal(adapters(first), adapters(other))


def test_a_bfloat16_base_has_float32_adapters_and_asks_for_autocast(lm_directory):
    model = load(lm_directory, r=4, dtype="bfloat16")
    kinds = {(p.dtype, p.requires_grad) for p in model.module.parameters()}
    assert kinds == {(torch.bfloat16, False), (torch.float32, True)}
    assert model.autocast_dtype == torch.bfloat16
    batch = model.encode(EXAMPLES).batch(torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(batch)
    assert loss.dtype == torch.float32
    loss.backward()
    assert loss.item() == pytest.approx(load(lm_directory, r=4).loss(batch).item(), rel=0.05)


def test_weights_that_are_all_trained_stay_float32(lm_directory):
    model = load(lm_directory, dtype="bfloat16")
    assert {(p.dtype, p.requires_grad) for p in model.module.parameters()} == {(torch.float32, True)}
    assert model.autocast_dtype == torch.bfloat16
    assert load(lm_directory).autocast_dtype is None


def test_auto_precision_follows_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr("clkit.models.precision.cpu_prefers_bfloat16", lambda: True)
    assert pick_dtype("auto", cpu) == torch.bfloat16
    monkeypatch.setattr("clkit.models.precision.cpu_prefers_bfloat16", lambda: False)
    assert pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("float16", cpu) == torch.float16


def test_a_lora_that_does_not_fit_is_refused_with_near_names(lm_directory):
    module = load(lm_directory).module
    config = LoraConfig(r=999, target_modules=["q_porj", "k_proj"])
    with pytest.raises(ModelError) as caught:
        attach_lora(module, config, torch.Generator())
    text = str(caught.value)
    assert "Did you mean 'q_proj'?" in text and "down_proj" in text
    assert "got 999, expected at most 16" in text and "k_proj" in text


def test_all_linear_leaves_out_the_output_layer(lm_directory):
    config = ModelConfig(name=str(lm_directory), dtype="float32", lora=LoraConfig(r=2))
    model = load_model(config, generator=torch.Generator().manual_seed(0))
    adapted = {n.split(".lora_A")[0].rpartition(".")[2] for n, _ in model.module.named_parameters() if "lora_A" in n}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def execute(snippet):
    """What the snippet of an export defines; a user who runs it sees no warning that is ours."""
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # peft 0.21 asks transformers 5.23 for a property under its old name, whatever the adapter.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        exec(snippet, names)
    return names


def test_an_exported_adapter_loads_with_plain_peft_and_gives_the_same_logits(lm_directory, tmp_path):
    model = load(lm_directory, r=4)
    perturb(model)
    names = execute(model.export(tmp_path / "out"))
    batch = model.encode(EXAMPLES).batch(torch.arange(4))
    with evaluating(model.module), torch.no_grad():
        expected = model.module(**batch.inputs).logits
        got = names["model"](**batch.inputs).logits
    assert torch.equal(got, expected)
    assert names["tokenizer"]("a b").input_ids == model.tokenizer("a b").input_ids
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(lm_directory)
    assert not any(p.suffix == ".bin" for p in (tmp_path / "out").iterdir())


def test_the_adapter_that_serves_is_exported_whatever_it_is_called(lm_directory, tmp_path):
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(lm_directory)
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    module = get_peft_model(base, PeftConfig(**options))
    module.add_adapter("mine", PeftConfig(**options))
    module.set_adapter("mine")
    model = wrap(module, AutoTokenizer.from_pretrained(lm_directory))
    loaded = execute(model.export(tmp_path / "out"))["model"].eval()
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_dir()]
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, module.eval()(input_ids=ids).logits)


def test_an_exported_adapter_is_put_on_a_base_of_the_type_that_was_scored(lm_directory, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(lm_directory, half)
    base_model(load(lm_directory).module).to(torch.bfloat16).save_pretrained(half)
    model = load(half, r=4)
    perturb(model)
    names = execute(model.export(tmp_path / "out"))
    batch = model.encode(EXAMPLES).batch(torch.arange(4))
    with evaluating(model.module), torch.no_grad():
        assert torch.equal(names["model"](**batch.inputs).logits, model.module(**batch.inputs).logits)


def test_an_exported_full_model_loads_with_plain_transformers(lm_directory, tmp_path):
    model = load(lm_directory)
    with torch.no_grad():
        next(model.module.parameters()).mul_(1.5)
    names = execute(model.export(tmp_path / "out"))
    batch = model.encode(EXAMPLES).batch(torch.arange(4))
    with torch.no_grad():
        assert torch.equal(names["model"](**batch.inputs).logits, model.module(**batch.inputs).logits)


def test_a_full_export_of_an_adapted_model_has_no_adapter_and_keeps_tied_weights_tied(lm_directory, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(lm_directory, tie_word_embeddings=True)
    net = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = net(ids).logits
    own = {name for name, _ in net.named_parameters()}
    model = load(lm_directory)
    model.module = attach_lora(net, LoraConfig(r=2), torch.Generator().manual_seed(0))
    names: dict = {}
    exec(model.export_full(tmp_path / "out"), names)
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == own
    loaded = names["model"].eval()
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)


def test_edits_are_encoded_and_classes_are_refused(lm_directory):
    model = load(lm_directory)
    assert len(model.encode(EditExamples((EditRecord("a", "b", id="e"),)))) == 1
    with pytest.raises(DataError, match="LabelledExamples"):
        model.encode(LabelledExamples(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), ["x"]))


def test_provenance_names_the_weights(lm_directory):
    import hashlib

    facts = load(lm_directory).provenance
    digest = hashlib.sha256((lm_directory / "model.safetensors").read_bytes()).hexdigest()
    assert facts["weights"] == {"model.safetensors": digest}
    assert facts["origin"] == f"directory:{lm_directory}" and facts["dtype"] == "float32"
    json.dumps(facts)


def test_an_encoder_is_refused_as_a_language_model(encoder_directory):
    with pytest.raises(ModelError, match="trained for something else"):
        load(encoder_directory)
    with pytest.raises(ModelError, match="no language model"):
        load("all-minilm-l6-v2")
    with pytest.raises(ModelError, match="no language model"):
        load("mlp")
    with pytest.raises(ModelError, match="freeze_backbone"):
        load(encoder_directory, freeze_backbone=True)


def test_a_damaged_directory_is_one_clear_error(lm_directory, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(lm_directory, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="can't be loaded"):
        load(broken)
    (broken / "config.json").write_text("{not json")
    with pytest.raises(ModelError, match="can't be loaded"):
        load(broken)
    shutil.copy(lm_directory / "model.safetensors", weights)
    shutil.copy(lm_directory / "config.json", broken)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load(broken)


def test_loading_prints_nothing(lm_directory, capfd):
    load(lm_directory, r=4)
    out, err = capfd.readouterr()
    assert out == "" and err == ""
