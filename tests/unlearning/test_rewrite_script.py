"""experiments/rewrite_tasks.py: from a configuration to data for a protected base, with the claim printed."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from clkit.strategies.dp2unlearning.rewritten import rewriting_of

SCRIPT = Path(__file__).parents[2] / "experiments" / "rewrite_tasks.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("rewrite_tasks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_causal_model_rewrites_every_training_record_and_says_what_it_is_worth(
    script, people_content, tmp_path, capsys
):
    config, out = tmp_path / "config.yaml", tmp_path / "rewritten"
    config.write_text(yaml.safe_dump(people_content))
    arguments = [str(config), str(out), "--epsilon", "2", "--max-new-tokens", "3"]
    assert script.main(arguments) == 0
    said = capsys.readouterr().out
    assert "dp_prompt: epsilon 2 per token" in said and "epsilon 12 to 12 per text" in said and "clkit run" in said
    files = sorted(out.rglob("*.jsonl"))
    assert len(files) == 4 and rewriting_of(map(str, files)) is not None
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert rows and not any("orchard" in row["answer"] for row in rows)

    assert script.main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    arguments[1] = str(tmp_path / "other")
    assert script.main([*arguments, "--method", "dp_mlm"]) == 2
    assert "needs --model" in capsys.readouterr().err
    assert script.main([*arguments, "--method", "dp_mlm", "--model", str(tmp_path)]) == 2
    assert "no masked language model" in capsys.readouterr().err
