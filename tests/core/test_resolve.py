"""Configuration: merged, checked against every schema, all problems at once."""

from __future__ import annotations

import pytest

from clkit import resolve
from clkit.errors import ConfigError

GOOD = {"model": {"name": "mlp", "lora": {"r": 0}}, "tasks": {"source": "digits"}, "strategy": "naive"}


def test_defaults_fill_what_is_not_given_and_the_resolved_form_reads_back_the_same():
    config = resolve.validate({**GOOD, "strategy": {"name": "replay", "replay": {"ratio": 0.5}}})
    assert config.strategy.config.replay.size == 200 and config.strategy.config.replay.ratio == 0.5
    assert resolve.validate(resolve.to_dict(config)) == config


def test_every_problem_is_reported_at_once_with_file_key_and_near_name(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(
        "tasks: {source: digits, num_task: 5}\nmodel: {name: mlp, lora: {r: -1}}\nstrategy: niave\n"
        "train: {learning_rate: fast, epochs: 0, optimzer: sgd, schedule: cosin, batch_size: 2.5}\nseeed: 1\neval: 3\n"
    )
    with pytest.raises(ConfigError) as caught:
        resolve.load(file)
    text = str(caught.value)
    assert len(caught.value.problems) == 10, text
    for piece in (
        f"{file}:seeed: unknown key. Did you mean 'seed'?",
        f"{file}:train.learning_rate: wrong type (got 'fast', expected float)",
        f"{file}:train.epochs: out of range (got 0, expected >= 1)",
        f"{file}:train.optimzer: unknown key. Did you mean 'optimizer'?",
        f"{file}:train.schedule: out of range (got 'cosin', expected one of constant, linear, cosine, milestones. Did you mean 'cosine'?)",
        f"{file}:train.batch_size: wrong type (got 2.5, expected int)",
        f"{file}:model.lora.r: out of range (got -1, expected >= 0)",
        f"{file}:strategy.name: Unknown strategy 'niave'. Did you mean 'naive'?",
        f"{file}:tasks.num_task: unknown key. Did you mean 'num_tasks'?",
        f"{file}:eval: got 3, expected a mapping",
    ):
        assert piece in text, f"{piece}\nnot in\n{text}"


def test_a_mistyped_key_does_not_hide_missing_files_and_what_does_not_go_together(tmp_path):
    content = {
        "model": {"name": "./nowhere"},
        "tasks": {"source": "jsonl", "tasks": ["missing.jsonl"], "eval_fraction": 2.0, "root": str(tmp_path)},
        "strategy": "reglora",
        "engine": {"name": "private", "noise_multiplier": 1.0},
        "train": {"epochz": 3, "betas": [0.9]},
        "eval": {"also": ["exact-mach"]},
    }
    with pytest.raises(ConfigError) as caught:
        resolve.validate(content)
    assert {p.where for p in caught.value.problems} == {
        "config:train.epochz",
        "config:tasks.eval_fraction",
        "config:tasks.tasks",
        "config:model.name",
        "config:engine.name",
        "config:train.betas",
        "config:eval.also",
    }


@pytest.mark.parametrize(
    "tasks",
    [
        {"source": "jsonl", "taks": ["a.jsonl"]},
        {"source": "jsonl", "tasks": 3},
        {"source": "digits", "scenario": "domian", "domain": "permute", "num_tasks": 2},
    ],
)
def test_what_only_follows_from_a_wrong_value_is_no_problem_of_its_own(tasks):
    with pytest.raises(ConfigError) as caught:
        resolve.validate({**GOOD, "tasks": tasks})
    assert len(caught.value.problems) == 1, caught.value


@pytest.mark.parametrize("value", [".nan", ".inf", "-1", "0"])
def test_a_learning_rate_that_is_no_positive_number_is_out_of_range(value, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"tasks: digits\nmodel: {{name: mlp, lora: {{r: 0}}}}\ntrain: {{learning_rate: {value}}}\n")
    with pytest.raises(ConfigError, match="train.learning_rate: out of range"):
        resolve.load(file)


def test_overrides_win_over_the_file_and_their_mistakes_name_the_command_line(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("tasks: digits\nmodel: {name: mlp, lora: {r: 0}}\ntrain: {epochs: 3}\n")
    assert resolve.load(file, ["train.epochs=7"]).train.epochs == 7
    with pytest.raises(ConfigError, match="command line:train.epochs: out of range"):
        resolve.load(file, ["train.epochs=0"])
    with pytest.raises(ConfigError, match="'train.epochs' is not an override"):
        resolve.load(file, ["train.epochs"])


def test_a_run_goes_into_the_home_that_its_directory_names_and_not_into_a_folder_called_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve.validate(resolve.merge(GOOD, ["output_dir=~/runs/x"])).output_dir == str(tmp_path / "runs" / "x")
    for directory in ("", "~nobody-of-this-name/x"):
        with pytest.raises(ConfigError, match="config:output_dir: "):
            resolve.validate({**GOOD, "output_dir": directory})


def test_naming_a_plug_in_does_not_take_away_the_options_that_are_given_with_it_in_whatever_order():
    for overrides in (["strategy.replay.size=7", "strategy=replay"], ["strategy=replay", "strategy.replay.size=7"]):
        assert resolve.validate(resolve.merge(GOOD, overrides)).strategy.config.replay.size == 7


@pytest.mark.parametrize("text", ["007", "2024_01_05", "1:30", "1e3", "1.50", "0x10", "on", "no", "${seed}"])
def test_a_text_on_the_command_line_is_taken_as_it_was_typed(text):
    config = resolve.validate(resolve.merge({**GOOD, "seed": 3}, [f"name={text}", f"output_dir=runs/{text}"]))
    assert [config.name, config.output_dir] == [text.replace("${seed}", "3"), "runs/" + text.replace("${seed}", "3")]
    facts = resolve.validate(
        resolve.merge({**GOOD, "tasks": "facts"}, ["tasks=jsonl", "tasks=facts", "tasks.metric=no"])
    )
    assert facts.tasks.config.metric == "no"


@pytest.mark.parametrize(("key", "value"), [("name", True), ("name", 1.5), ("output_dir", False)])
def test_a_text_that_yaml_took_for_something_else_wants_quotes(key, value):
    with pytest.raises(ConfigError, match=f"{key}: wrong type .got {value}, expected str; put it in quotes"):
        resolve.validate({**GOOD, key: value})


def test_numbers_and_truth_values_in_quotes_are_taken_and_others_are_not(recwarn):
    train = {"epochs": "3", "learning_rate": "1e-4", "reset_optimizer": "no", "betas": ["0.8", 0]}
    found = resolve.validate({**GOOD, "train": train}).train
    assert [found.epochs, found.learning_rate, found.reset_optimizer, found.betas] == [3, 1e-4, False, [0.8, 0.0]]
    assert resolve.validate({**GOOD, "train": {"reset_optimizer": 0}}).train.reset_optimizer is False
    with pytest.raises(ConfigError) as caught:
        resolve.validate({**GOOD, "train": {"epochs": "three", "reset_optimizer": 2, "group_by_length": "maybe"}})
    assert len(caught.value.problems) == 3
    assert not recwarn.list


def test_an_override_without_a_value_is_an_empty_text_where_a_text_is_expected():
    config = resolve.validate(resolve.merge({**GOOD, "tasks": "facts"}, ["name=", "tasks.metric="]))
    assert config.name == "run" and config.tasks.config.metric == ""
    with pytest.raises(ConfigError, match=r"train.epochs: wrong type \(got None, expected int\)"):
        resolve.validate(resolve.merge(GOOD, ["train.epochs="]))


def test_a_seed_of_the_class_order_that_numpy_does_not_take_is_out_of_range():
    with pytest.raises(ConfigError, match="tasks.order_seed: out of range"):
        resolve.validate({**GOOD, "tasks": {"source": "digits", "order_seed": 2**32}})


def test_naming_a_section_replaces_it_so_that_options_of_another_plugin_do_not_linger():
    content = resolve.merge({**GOOD, "strategy": {"name": "lwf", "temperature": 3.0}}, ["strategy=naive"])
    assert content["strategy"] == {"name": "naive"}
    content = resolve.merge(GOOD, ["strategy=replay", "strategy.replay.size=7"])
    assert resolve.validate(content).strategy.config.replay.size == 7


def test_a_config_can_not_name_code_to_import():
    with pytest.raises(ConfigError, match="Unknown strategy 'os.system'"):
        resolve.validate({**GOOD, "strategy": "os.system"})
    with pytest.raises(ConfigError, match=r"_target_: unknown key"):
        resolve.validate({**GOOD, "model": {"name": "mlp", "_target_": "os.system"}})


def test_yaml_mistakes_name_the_line(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train:\n  epochs: 1\n  epochs: 2\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:3: not valid YAML"):
        resolve.load(file)
    file.write_text("train: [1\n")
    with pytest.raises(ConfigError, match=r"not valid YAML"):
        resolve.load(file)
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match="must be a mapping"):
        resolve.load(file)


def test_environment_variables_can_be_used_and_missing_ones_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_RUNS", "/somewhere")
    assert resolve.merge({"output_dir": "${oc.env:MY_RUNS}/x"}, [])["output_dir"] == "/somewhere/x"
    with pytest.raises(ConfigError, match="NOT_THERE"):
        resolve.merge({"output_dir": "${oc.env:NOT_THERE}"}, [])


def test_a_shipped_configuration_is_found_by_its_name_and_a_wrong_name_gets_a_near_one():
    assert resolve.find("quickstart").name == "quickstart.yaml"
    with pytest.raises(ConfigError, match="Did you mean 'quickstart'"):
        resolve.find("quickstrat")


def test_every_shipped_configuration_is_valid_and_starts_with_the_command_that_runs_it():
    for name, path in resolve.shipped().items():
        assert path.read_text().startswith(f"# clkit run configs/{name}.yaml\n# "), name
        resolve.load(path)
