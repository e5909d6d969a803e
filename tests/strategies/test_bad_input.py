"""What can't work with an adapter is one clear error from the command line, before anything is trained."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from stepping import trainer_for

from clkit import api
from clkit.cli import main
from clkit.errors import CapabilityError
from clkit.models import wrap


def refused(content, capsys, command):
    """The message of a command that must fail, having trained and saved nothing."""
    file = Path(content["output_dir"]).parent / "config.yaml"
    file.write_text(json.dumps(content))
    assert main([command, str(file)]) == 2
    assert not (Path(content["output_dir"]) / "checkpoints").exists()
    return capsys.readouterr().err


@pytest.fixture(params=["ilora", "reglora"])
def content(request, text_content):
    """A run of either strategy that would be fine."""
    return {**copy.deepcopy(text_content), "strategy": request.param}


@pytest.mark.parametrize("command", ["validate", "run"])
def test_target_modules_that_the_model_lacks_are_named_with_those_it_has(content, capsys, command):
    content["model"]["lora"]["target_modules"] = ["q_prj", "c_attn"]
    message = refused(content, capsys, command)
    assert "model.lora.target_modules: no linear layer is called 'q_prj'. Did you mean 'q_proj'?" in message
    assert "no linear layer is called 'c_attn'." in message and "There are: down_proj, gate_proj" in message


@pytest.mark.parametrize("command", ["validate", "run"])
def test_a_rank_larger_than_the_smallest_matrix_is_refused(content, capsys, command):
    content["model"]["lora"] |= {"r": 17, "target_modules": ["q_proj", "v_proj"]}
    message = refused(content, capsys, command)
    assert (
        "model.lora.r: got 17, expected at most 16 (the smaller side of 'model.layers.0.self_attn.v_proj')" in message
    )


@pytest.mark.parametrize("command", ["validate", "run"])
def test_an_adapter_in_the_place_of_a_model_is_refused(content, capsys, command, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    content["model"]["name"] = str(tmp_path / "adapter")
    assert "holds a PEFT adapter; give the model it belongs to" in refused(content, capsys, command)


def test_a_buffer_smaller_than_the_replayed_part_of_a_batch_is_refused(text_content, capsys):
    content = {**text_content, "strategy": {"name": "ilora", "replay": {"size": 7, "ratio": 2.0}}}
    message = refused(content, capsys, "run")
    assert "strategy.replay.size: got 7, expected at least 8 (train.batch_size * strategy.replay.ratio" in message


@pytest.fixture
def made(text_content):
    """Runs a strategy on a model whose adapter was made in Python with the options given."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def run(strategy, **options):
        folder = text_content["model"]["name"]
        config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 2, "target_modules": ["q_proj"], **options})
        module = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        model = wrap(module, AutoTokenizer.from_pretrained(folder), "mine")
        return api.fit(model, text_content["tasks"], strategy, text_content["output_dir"])

    return run


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"use_dora": True}, r"layers\.0\.self_attn\.q_proj' and 1 more: more than B A, by an option such as use_dora"),
        ({"lora_bias": True}, r"q_proj' and 1 more: a bias beside B"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"model\.embed_tokens': an embedding"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa': it changes the base model"),
    ],
)
@pytest.mark.parametrize("strategy", ["olora", "ties"])
def test_updates_that_are_no_products_on_linear_layers_are_refused_before_training(made, strategy, options, what):
    with pytest.raises(CapabilityError, match=what):
        made(strategy, **options)


def test_experts_that_peft_adapts_as_parameters_are_refused_before_training(text_content, tmp_path, tiny_llama):
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_hidden_layers": 1}
    vocabulary = len(AutoTokenizer.from_pretrained(tiny_llama))
    config = MixtralConfig(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, eos_token_id=1, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "mixtral")
    lora = {"r": 2, "target_modules": ["all-linear"]}
    content = {**text_content, "model": {**text_content["model"], "name": str(tmp_path / "mixtral"), "lora": lora}}
    trainer, tasks = trainer_for(content, "reglora")
    with pytest.raises(CapabilityError, match=r"'model\.layers\.0\.mlp\.gate' and 2 more: a parameter of Mixtral"):
        trainer.prepare(tasks)
    lora["target_modules"] = ["q_proj", "v_proj"]
    trainer, tasks = trainer_for(content, "reglora")
    trainer.prepare(tasks)


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}])
def test_merging_refuses_what_is_trained_beside_the_adapter(made, options):
    with pytest.raises(CapabilityError, match=r"is trained beside the adapter.*neither reset between tasks nor merged"):
        made("ties", **options)
