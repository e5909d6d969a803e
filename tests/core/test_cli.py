"""The command line through main(argv): what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clkit.cli import main


@pytest.fixture
def config(text_content, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(text_content))
    return file


def test_run_prints_matrix_metrics_and_how_to_load_and_writes_the_report(config, tmp_path, capsys):
    assert main(["run", str(config)]) == 0
    out, err = capsys.readouterr()
    assert "after blue" in out and "bwt (mean over i<T" in out and "PeftModel.from_pretrained" in out
    assert "before training: red" in err and "\r" not in err, "no bars where standard error is no terminal"
    page = (tmp_path / "run" / "report.html").read_text()
    assert (
        "after green" in page and "http://" not in page and "https://" not in page.replace("https://huggingface.co", "")
    )


def test_compare_makes_a_run_directory_for_each_entry_and_one_table(text_content, tmp_path, capsys):
    text_content["compare"] = [["strategy=naive"], ["strategy=replay", "strategy.replay.size=5"]]
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(text_content))
    assert main(["run", str(file), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"naive", "replay-5", "report.html"}
    header = next(line.split() for line in out.splitlines() if line.endswith("naive  replay-5"))
    assert header == ["naive", "replay-5"]
    assert sum(line.startswith("forgetting ") and line.endswith("lower is better") for line in out.splitlines()) == 1


def test_two_compare_entries_that_share_a_directory_are_an_error_before_anything_starts(text_content, tmp_path, capsys):
    text_content["compare"] = [["strategy=naive"], ["strategy=naive"]]
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(text_content))
    assert main(["run", str(file)]) == 2
    assert "would share a run directory" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def compare_file(content, tmp_path, entries):
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump({**content, "compare": entries}))
    return str(file)


def test_an_interpolation_stands_for_what_an_entry_of_compare_sets(text_content, tmp_path):
    content = {**text_content, "seed": 1, "train": {**text_content["train"], "epochs": "${seed}"}}
    file = compare_file(content, tmp_path, [["seed=2"], ["seed=3"], ["strategy=lwf"]])
    assert main(["run", file, "--quiet"]) == 0
    found = {
        name: yaml.safe_load((tmp_path / "run" / name / "config.yaml").read_text())["train"]["epochs"]
        for name in ("2", "3", "lwf")
    }
    assert found == {"2": 2, "3": 3, "lwf": 1}


@pytest.mark.parametrize("entry", [[], ["strategy.replay.size="], ["name=."], ["name=.."]])
def test_a_compare_entry_without_a_name_of_its_own_is_an_error(entry, text_content, tmp_path, capsys):
    assert main(["run", compare_file(text_content, tmp_path, [["strategy=replay"], entry])]) == 2
    assert "compare[1]: got" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_override_that_compare_would_undo_is_an_error_that_says_how_to_run_one(text_content, tmp_path, capsys):
    file = compare_file(text_content, tmp_path, [["strategy=naive"], ["strategy=replay", "strategy.replay.size=5"]])
    for override in ("strategy=lwf", "strategy.replay.size=9"):
        assert main(["validate", file, override]) == 2
        assert "strategy is set by every entry of compare; add compare=[]" in capsys.readouterr().err
    assert main(["validate", file, "strategy=lwf", "compare=[]"]) == 0
    assert "strategy lwf" in capsys.readouterr().out
    assert main(["validate", file, "train.epochs=3"]) == 0


def test_every_entry_of_compare_is_checked_before_the_first_run_starts(text_content, tmp_path, capsys):
    file = compare_file(text_content, tmp_path, [["strategy=naive"], ["tasks.metric=exact-mach"]])
    for command in ("run", "validate"):
        assert main([command, file]) == 2
        err = capsys.readouterr().err
        assert "1 of 2 runs can't start" in err and "Did you mean 'exact-match'" in err
    assert not (tmp_path / "run").exists()


def test_the_problems_of_all_entries_of_compare_come_at_once(text_content, tmp_path, capsys):
    entries = [["strategy=niave"], ["strategy=replay"], ["strategy=lwf", "train.epochs=0"]]
    assert main(["validate", compare_file(text_content, tmp_path, entries)]) == 2
    err = capsys.readouterr().err
    assert "2 of 3 runs" in err and "compare[niave]:strategy.name" in err and "compare[lwf-0]:train.epochs" in err


WRONG = {
    "tasks.metric=exact-mach": "Unknown metric 'exact-mach'. Did you mean 'exact-match'",
    "tasks.metric=accuracy": "metric 'accuracy' scores classification tasks",
    "tasks.options=none tasks.metric=option-loglik": "it has no `options`",
    "engine.device=cuda:99": "engine.device: 'cuda:99' asked for",
}


@pytest.mark.parametrize("command", ["validate", "run"])
@pytest.mark.parametrize("overrides", WRONG)
def test_validate_and_run_find_the_same_before_weights_are_loaded(
    command, overrides, config, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("clkit.build.load_model", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    assert main([command, str(config), *overrides.split()]) == 2
    assert WRONG[overrides] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_problems_of_metric_and_device_come_together_and_once_each(config, capsys):
    assert main(["validate", str(config), "tasks.metric=accuraci", "engine.device=cuda:99"]) == 2
    err = capsys.readouterr().err
    assert "2 problems" in err and err.count("Unknown metric") == 1 and err.count("cuda:99") == 1


@pytest.mark.parametrize(
    ("strategy", "steps", "total"),
    [("naive", [6, 6, 6], 18), ("joint", [0, 0, 18], 18), ("cumulative", [6, 12, 18], 36)],
)
def test_validate_counts_the_steps_that_the_strategy_takes(strategy, steps, total, config, capsys):
    assert main(["validate", str(config), "train.epochs=3", f"strategy={strategy}"]) == 0
    out = capsys.readouterr().out
    assert [int(line.split()[5]) for line in out.splitlines() if " train " in line and " eval " in line] == steps
    assert f"  {total} optimiser steps" in out


@pytest.mark.parametrize("command", ["validate", "run"])
def test_a_network_of_absurd_width_is_one_clear_error(command, vision_content, tmp_path, capsys):
    file = tmp_path / "wide.yaml"
    file.write_text(yaml.safe_dump({**vision_content, "model": {"name": "mlp", "hidden": [10**9, 10**9]}}))
    assert main([command, str(file)]) == 2
    assert "model.hidden: [1000000000, 1000000000] makes" in capsys.readouterr().err


def test_eval_and_export_and_resume_work_from_another_directory(text_content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text_content["tasks"]["tasks"] = [Path(f).name for f in text_content["tasks"]["tasks"]]
    text_content["output_dir"] = "run"
    (tmp_path / "model").symlink_to(text_content["model"]["name"])
    text_content["model"]["name"] = "model"
    Path("config.yaml").write_text(yaml.safe_dump(text_content))
    assert main(["run", "config.yaml", "--quiet"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["eval", "../run"]) == 0
    assert main(["export", "../run", "mine"]) == 0
    capsys.readouterr()
    again = ["run", "../config.yaml", "tasks.root=..", "model.name=../model", "output_dir=../run"]
    assert main(again) == 0, capsys.readouterr().err
    assert "already finished" in capsys.readouterr().err


def test_eval_with_a_metric_but_no_files_is_an_error(tmp_path, capsys):
    assert main(["eval", str(tmp_path), "--metric", "rouge-l"]) == 2
    assert "Give --tasks" in capsys.readouterr().err


def test_validate_says_what_the_run_would_do_and_leaves_no_trace(config, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main(["validate", str(config), "train.epochs=3"]) == 0
    out = capsys.readouterr().out
    assert "red" in out and "8 train" in out and "6 steps" in out and "trained (" in out and "MiB" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_is_a_few_lines_and_exit_code_two_and_debug_shows_the_traceback(config, capsys):
    assert main(["run", str(config), "train.epoch=3", "seeed=1"]) == 2
    err = capsys.readouterr().err
    assert "command line:train.epoch: unknown key. Did you mean 'epochs'?" in err and "seeed" in err
    assert "Traceback" not in err
    from clkit.errors import ConfigError

    with pytest.raises(ConfigError):
        main(["run", str(config), "train.epoch=3", "--debug"])


def test_eval_scores_the_run_again_and_other_files(config, tmp_path, capsys):
    main(["run", str(config), "--quiet"])
    final = json.loads((tmp_path / "run" / "matrix.json").read_text())["matrix"][-1]
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [float(line.split()[1]) for line in lines] == pytest.approx(final, abs=1e-4)
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"prompt": f"red {i}", "answer": "a", "options": ["a", "b"]}) + "\n" for i in range(7))
    )
    assert main(["eval", str(tmp_path / "run"), "--tasks", str(other)]) == 0
    assert "option-loglik over 7 examples" in capsys.readouterr().out


def test_eval_scores_the_test_file_of_a_folder_and_a_file_of_one_record(config, tmp_path, capsys):
    main(["run", str(config), "--quiet"])
    (tmp_path / "law").mkdir()
    for name, count in (("law/train", 9), ("law/test", 2), ("one", 1)):
        rows = [{"id": f"{i}", "prompt": f"red {i}", "answer": "a", "options": ["a", "b"]} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    entries = [str(tmp_path / "law"), str(tmp_path / "one.jsonl")]
    assert main(["eval", str(tmp_path / "run"), "--tasks", *entries]) == 0
    assert [line.split()[0] + line.partition("over")[2] for line in capsys.readouterr().out.splitlines()] == [
        "law 2 examples",
        "one 1 examples",
    ]
    assert main(["eval", str(tmp_path / "run"), "--tasks", str(tmp_path / "two.jsonl")]) == 2
    assert "--tasks: " in (err := capsys.readouterr().err) and "does not exist. Did you mean 'one.jsonl'?" in err


def test_eval_and_export_tell_that_a_run_is_not_finished(config, tmp_path, capsys, monkeypatch):
    from clkit.strategy import Strategy

    def stop(self):
        if self.run.position.total_steps == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Strategy, "after_step", stop)
        assert main(["run", str(config), "--quiet"]) == 130
    told = f"{tmp_path / 'run'}: not finished; this is its model at task 2 of 3, step 2"
    for command in (["eval", str(tmp_path / "run")], ["export", str(tmp_path / "run"), str(tmp_path / "mine")]):
        capsys.readouterr()
        assert main(command) == 0
        assert told in capsys.readouterr().err
    main(["run", str(config), "--quiet"])
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert "not finished" not in capsys.readouterr().err


def test_export_writes_a_plain_adapter_and_refuses_to_overwrite(config, tmp_path, capsys):
    main(["run", str(config), "--quiet"])
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "mine")]) == 0
    assert str(tmp_path / "mine") in capsys.readouterr().out
    assert (tmp_path / "mine" / "adapter_model.safetensors").is_file()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "mine")]) == 2


def test_report_compares_finished_runs_and_names_one_that_is_not(config, tmp_path, capsys):
    main(["run", str(config), "--quiet"])
    main(["run", str(config), "--quiet", "seed=1", f"output_dir={tmp_path / 'other'}", "name=other"])
    assert main(["report", str(tmp_path / "run"), str(tmp_path / "other"), "--output", str(tmp_path / "r.html")]) == 0
    assert "Comparison" in (tmp_path / "r.html").read_text()
    assert main(["report", str(tmp_path)]) == 2
    assert "no finished run here" in capsys.readouterr().err


def test_cp_gives_a_config_that_validates_and_refuses_to_overwrite(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["cp", "quickstart_digits", "mine.yaml"]) == 0
    assert main(["validate", "mine.yaml"]) == 0
    assert main(["cp", "quickstart_digits", "mine.yaml"]) == 2
    assert main(["cp", "quickstat"]) == 2
    assert "Did you mean 'quickstart'" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["strategies", "tasks", "metrics", "models", "engines", "configs"])
def test_ls_has_one_line_for_each_entry_and_every_line_says_something(what, capsys):
    assert main(["ls", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    for line in lines:
        name, _, text = line.partition(" ")
        assert name and len(text.strip()) > 15 and "(broken" not in text, line


@pytest.mark.parametrize("command", ["run", "validate", "eval", "ls", "cp", "export", "report"])
def test_every_help_ends_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith(f"  clkit {command} ")


def test_the_readme_example_runs(tiny_llama, tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    assert code.count('"smollm2-135m"') == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace('"smollm2-135m"', repr(str(tiny_llama))), "README.md", "exec"), {})
    assert "PeftModel" in capsys.readouterr().out
    assert (tmp_path / "runs" / "capitals" / "export" / "adapter_config.json").is_file()

    # The section about your own data goes on with the files that the example wrote.
    own = readme.split("## With your own data and model")[1].split("\n## ")[0]
    config, sweep = (part.split("```")[0] for part in own.split("```yaml\n")[1:])
    assert config.count("path/to/a/model") == 1
    Path("my.yaml").write_text(config.replace("path/to/a/model", str(tiny_llama)))
    for line in own.split("```sh\n")[1].split("```")[0].splitlines():
        command, *arguments = shlex.split(line, comments=True)
        assert command == "clkit" and main(arguments) == 0, capsys.readouterr().err
    card = Path("my_adapter/README.md").read_text()
    monkeypatch.chdir("my_adapter")  # elsewhere, and without clkit's help
    names: dict[str, object] = {}
    exec(compile(card.split("```python\n")[1].split("```")[0], "my_adapter/README.md", "exec"), names)
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(Path("my.yaml").read_text() + sweep)
    assert main(["sweep", "my.yaml", "--dry-run"]) == 0
    assert "9 runs" in capsys.readouterr().out


def test_the_installed_program_ends_as_one_of_several_processes_should(monkeypatch):
    """`torchrun --no-python clkit run ...` starts it, and a plain exit of Python may crash on a thread of gloo."""
    from clkit import cli
    from clkit.engine import launch

    codes = []
    monkeypatch.setattr(cli, "main", lambda: 3)
    monkeypatch.setattr(launch, "end", codes.append)
    cli.script()
    assert codes == [3]
    assert '\nclkit = "clkit.cli:script"\n' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_python_dash_m_runs_the_command_line():
    done = subprocess.run([sys.executable, "-m", "clkit", "ls", "strategies"], capture_output=True, text=True)
    assert done.returncode == 0 and "naive" in done.stdout
