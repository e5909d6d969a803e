"""What can't work with an adapter is one clear error from the command line, before anything is trained."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from clkit.cli import main


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
