"""Tasks of lm-evaluation-harness as holdout columns: its own numbers, its errors in clkit's words, no code from files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clkit import api, build, resolve
from clkit.cli import main
from clkit.errors import CapabilityError, ConfigError, DataError, ModelError
from clkit.result import RunResult
from clkit.tasks import facts

lm_eval = pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'clkit[lm-eval]'")

CHOICE = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl, train: shots.jsonl}}
output_type: multiple_choice
test_split: test
training_split: train
num_fewshot: 2
doc_to_text: "{{question}} ="
doc_to_target: "{{answer}}"
doc_to_choice: choices
metric_list:
  - metric: acc_norm
  - metric: acc
"""
WRITTEN = """
task: echo
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}} ="
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two task files with their data."""
    folder = tmp_path / "general"
    folder.mkdir()
    for name, count in (("sums", 13), ("shots", 5)):
        rows = [
            {"question": f"{i} + {len(name)}", "choices": [str(i), str(i + len(name)), "many"], "answer": i % 3}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "sums.yaml").write_text(CHOICE)
    (folder / "echo.yaml").write_text(WRITTEN)
    (folder / "_base.yaml").write_text("test_split: test\n")
    return folder


def content(text_content, folder, **changes):
    return {**text_content, "eval": {**text_content["eval"], "lm_eval": [str(folder)], **changes}}


def harness_says(tiny_llama, folder, adapter=None):
    """The harness on its own, on the model as loaded from disk."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(tiny_llama), batch_size=3, max_length=512)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(lm, tasks=["sums", "echo"], task_manager=manager, bootstrap_iters=0, log_samples=True)
    return {name: {k.partition(",")[0]: v for k, v in r.items()} for name, r in found["results"].items()}


def test_columns_hold_the_harness_own_numbers_before_and_after(text_content, folder, tiny_llama, monkeypatch):
    result = api.run(resolve.validate(content(text_content, folder)))
    assert result.holdout == ["echo", "sums"]
    assert result.task_metrics[-2:] == ["lm-eval-exact-match", "lm-eval-acc-norm"]
    assert not np.isnan(result.matrix[:, -2:]).any() and not np.isnan(result.initial[-2:]).any()
    monkeypatch.chdir(folder)  # the harness takes data files from where it is started
    before = harness_says(tiny_llama, folder)
    after = harness_says(tiny_llama, folder, result.run_dir / "export")
    for row, said in ((result.initial, before), (result.matrix[-1], after)):
        assert row[-1] == pytest.approx(said["sums"]["acc_norm"])
        assert row[-2] == pytest.approx(said["echo"]["exact_match"])
    assert RunResult.load(result.run_dir).holdout == result.holdout
    samples = json.loads((result.run_dir / "samples.json").read_text())
    assert samples["sums"][0]["rows"][0] | {"prediction": ""} == {
        "id": "sums/0",
        "prompt": "0 + 4 =",
        "picture": None,
        "gold": "0",
        "prediction": "",
        "value": samples["sums"][0]["rows"][0]["value"],
    }


def test_a_limit_and_small_batches_take_the_same_records_and_examples(text_content, folder):
    def scores(**changes):
        config = resolve.validate(content(text_content, folder, **changes))
        task = build.make_tasks(config).holdout[-1]
        prompts = [r.args[0] for group in task.eval.requests for r in group]
        return prompts, api.run(config, fresh=True).initial[-2:]

    prompts, whole = scores()
    small, again = scores(batch_size=2)
    assert small == prompts and again == pytest.approx(whole)
    few, _ = scores(lm_eval_limit=4)
    assert few == prompts[: 4 * 3] and few[0].count("=") == 3  # two examples and the question


def test_tasks_made_in_python_get_the_columns_too(text_content, folder):
    config = resolve.validate(content(text_content, folder))
    made = build.make_tasks(resolve.validate(text_content))
    result = api.run(config, tasks=made)
    assert result.holdout == ["echo", "sums"]
    with api.open_run(result.run_dir, tasks=made) as trainer:
        assert [t.name for t in trainer.scored[-2:]] == ["echo", "sums"]


def test_learning_does_not_notice(text_content, folder, tmp_path):
    plain = api.run(resolve.validate({**text_content, "output_dir": str(tmp_path / "plain")}))
    more = api.run(resolve.validate({**content(text_content, folder), "output_dir": str(tmp_path / "more")}))
    np.testing.assert_array_equal(more.matrix[:, :3], plain.matrix)
    assert more.metrics == plain.metrics
    facts = (more.run_dir / "run.json").read_text()
    assert "sums.jsonl" in facts and "sums.yaml" in facts


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("process_docs: !function tricks.docs", "!function.*Python code that a task file names is not run"),
        ("class: tricks.Task", "class would run code"),
        ("metric_list: [{metric: bleu}]", "without a metric that is taken from the harness"),
        ("output_type: loglikelihood_rolling", "without a metric that is taken"),
        ("dataset_path:", r"needs a name \(task\) and data"),
        ("include: sums.yaml", "includes itself"),
        ("doc_to_text: [", "can't be read"),
    ],
)
def test_task_files_that_need_more_than_data_are_refused(text_content, folder, change, why):
    (folder / "sums.yaml").write_text(CHOICE + change + "\n")
    with pytest.raises(ConfigError, match=f"(?s)eval.lm_eval.*sums.yaml: .*{why}"):
        resolve.validate(content(text_content, folder))


def test_templates_are_rendered_in_a_sandbox(text_content, folder):
    (folder / "sums.yaml").write_text(CHOICE + "doc_to_text: \"{{ ''.__class__.__mro__ }}\"\n")
    with pytest.raises(DataError, match=r"sums\.yaml: SecurityError"):
        build.make_tasks(resolve.validate(content(text_content, folder)))


def test_a_file_may_include_another_and_missing_data_are_said(text_content, folder):
    (folder / "sums.yaml").write_text(CHOICE.replace("test_split: test\n", "include: _base.yaml\n"))
    config = resolve.validate(content(text_content, folder))
    assert len(build.make_tasks(config).holdout[-1].eval) == 13
    (folder / "sums.jsonl").unlink()
    with pytest.raises(DataError, match=r"echo\.yaml: .*sums\.jsonl"):
        build.make_tasks(config)


def test_wrong_paths_and_a_missing_package_are_said_before_anything_is_loaded(
    text_content, vision_content, folder, tmp_path, monkeypatch
):
    (tmp_path / "empty").mkdir()
    for entry, why in (("generl", "does not exist.*Did you mean 'general'"), ("empty", "holds no task file")):
        with pytest.raises(ConfigError, match=rf"eval\.lm_eval: .*{why}"):
            resolve.validate(content(text_content, tmp_path / entry))
    with pytest.raises(ConfigError, match="two files make a task named 'sums'"):
        resolve.validate(content(text_content, folder) | {"eval": {"lm_eval": [str(folder), f"{folder}/sums.yaml"]}})
    with pytest.raises(CapabilityError, match="scores tasks of eval.lm_eval, and this is none"):
        api.run(resolve.validate({**text_content, "eval": {"also": ["lm-eval-acc"]}}))
    with pytest.raises(ConfigError, match="can't learn tasks of kind text"):
        api.run(resolve.validate(vision_content | {"eval": {"lm_eval": [str(folder)]}}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"eval\.lm_eval: needs the package lm-eval: pip install 'clkit\[lm-eval\]'"):
        resolve.validate(content(text_content, folder))


def test_the_command_line_takes_a_path_from_where_it_is_started(text_content, folder, tmp_path, monkeypatch, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(text_content))
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(file), "eval.lm_eval=[general/sums.yaml]", "eval.lm_eval_limit=3"]) == 0
    assert "sums" in capsys.readouterr().out
    monkeypatch.chdir(folder)
    assert main(["eval", text_content["output_dir"]]) == 0
    line = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("sums"))
    assert line.endswith("lm-eval-acc-norm over 3 examples")


@pytest.mark.real_llm
@pytest.mark.slow
def test_smollm2_before_and_after_stands_in_columns_of_its_own(tmp_path):
    """Real common facts in a task file: known before training; what two steps of made-up facts do to them is measured."""
    known = facts._with_options(facts._common_facts(), 4, 0)
    rows = [{"q": r.prompt, "options": list(r.options), "gold": r.options.index(r.answer)} for r in known]
    (tmp_path / "known.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "known.yaml").write_text(
        "task: known\ndataset_path: json\ndataset_kwargs: {data_files: {test: known.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_target: gold\ndoc_to_choice: options\n"
        "metric_list: [{metric: acc}]\n"
    )
    try:
        result = api.fit(
            "smollm2-135m",
            {"source": "facts", "relations": ["city", "job"], "people": 4},
            output_dir=tmp_path / "run",
            train={"steps": 2, "batch_size": 3},
            eval={"max_new_tokens": 4, "lm_eval": [str(tmp_path / "known.yaml")]},
            **{"model.prompt": "plain", "model.dtype": "float32", "model.lora.r": 4},
        )
    except ModelError as error:
        pytest.skip(f"smollm2-135m can't be loaded here: {error}")
    before, after = result.initial[-1], result.matrix[:, -1]
    assert before > 0.6, "four answers to choose from: chance is a quarter"
    assert result.holdout == ["known"] and ((after >= 0) & (after <= 1)).all()
