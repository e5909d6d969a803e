"""A sweep is checked whole before anything starts."""

from __future__ import annotations

import pytest

from clkit.errors import ConfigError
from clkit.sweep.plan import check, folder_name, load


def error(write, content, *overrides, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write(content), overrides, **options)
    return str(caught.value)


def test_each_setting_and_seed_is_a_run_with_a_directory_of_its_own(write, sweep_content, tmp_path):
    sweep = load(write(sweep_content))
    assert [str(r) for r in sweep.runs] == [
        "naive seed 0", "replay,size=8 seed 0", "naive seed 1", "replay,size=8 seed 1",
    ]  # fmt: skip
    assert sweep.runs[1].directory == tmp_path / "sweep" / "replay,size=8" / "seed-0"
    assert sweep.runs[1].config.strategy.config.replay.size == 8 and sweep.runs[2].config.seed == 1


def test_interpolations_follow_what_is_swept(write, sweep_content):
    sweep_content["tasks"]["order_seed"] = "${seed}"
    assert [r.config.tasks.config.order_seed for r in load(write(sweep_content)).runs] == [0, 0, 1, 1]


def test_all_problems_come_at_once_with_their_places(write, sweep_content):
    sweep_content["sweep"]["axes"] |= {"train.lerning_rate": [0.1, 0.2], "train.epochs": [1, 0], "eval.batch_size": []}
    sweep_content["sweep"] |= {"best": "acuracy", "zip": [{"train.clip": [1.0], "train.decay": [0.1, 0.2]}]}
    text = error(write, sweep_content)
    assert "sweep.axes.eval.batch_size: an empty axis" in text
    assert "sweep.best: unknown metric 'acuracy'. Did you mean" in text and "unequal length" in text
    for key in ("zip", "best"):
        del sweep_content["sweep"][key]
    del sweep_content["sweep"]["axes"]["eval.batch_size"]
    text = error(write, sweep_content)
    assert "sweep.axes.train.lerning_rate: unknown key. Did you mean 'learning_rate'" in text
    assert "sweep.axes.train.epochs: out of range (got 0, expected >= 1) (in " in text


def test_a_problem_inside_a_strategy_of_an_axis_is_at_the_axis(write, sweep_content):
    sweep_content["sweep"]["axes"]["strategy"] = ["naive", {"name": "replay", "replay": {"sise": 3}}, "repaly"]
    text = error(write, sweep_content)
    assert "sweep.axes.strategy: strategy.replay.sise: unknown key. Did you mean 'size'" in text
    assert "Did you mean 'replay'" in text


def test_settings_that_would_share_a_directory_or_are_the_same_run_are_errors(write, sweep_content):
    axes = sweep_content["sweep"]["axes"]
    axes["train.learning_rate"] = [0.001, 1e-3]
    text = error(write, sweep_content)
    assert "would share the directory 'naive,learning_rate=0.001'" in text and "'replay,size=8,learning_rate" in text
    axes["train.learning_rate"] = {"values": {"a/b": 0.1, "a b": 0.2}}
    assert "would share the directory 'naive,a_b'" in error(write, sweep_content)
    axes["train.learning_rate"] = {"values": {"low": 0.1, "slow": 0.1}}
    assert "'naive,low seed 0' and 'naive,slow seed 0' are the same run" in error(write, sweep_content)


def test_very_many_runs_must_be_meant(write, sweep_content):
    big = {f"train.{k}": {"from": 1, "to": 100, "step": 1} for k in ("epochs", "batch_size", "steps")}
    sweep_content["sweep"] = {"axes": big, "seeds": 1}
    assert "more than 500 runs (up to 1,000,000); add --yes" in error(write, sweep_content)
    sweep_content["sweep"] = {"axes": {"train.epochs": {"from": 1, "to": 501, "step": 1}}}
    assert "more than 500" in error(write, sweep_content)
    assert len(load(write(sweep_content), yes=True).runs) == 501


def test_overrides_change_axes_and_the_rest_but_not_what_is_swept(write, sweep_content):
    file = write(sweep_content)
    sweep = load(
        file, ["sweep.axes.strategy=[joint]", "sweep.axes.train.epochs=[1,2,3]", "sweep.seeds=1", "train.clip=0"]
    )
    assert [r.setting.name for r in sweep.runs] == ["epochs=1", "epochs=2", "epochs=3"]
    assert {r.config.strategy.name for r in sweep.runs} == {"joint"} and sweep.runs[0].config.train.clip == 0
    assert len(load(file, ["sweep.axes.strategy=null"]).runs) == 2
    assert "takes the place of `seed`" in error(write, sweep_content, "seed=3")
    for override in ("strategy=joint", "strategy.replay.size=3"):
        assert "sets what the override" in error(write, sweep_content, override)
    sweep_content["sweep"]["axes"] = {"train": {"values": {"short": {"epochs": 1}, "long": {"epochs": 3}}}}
    assert "sets what the override" in error(write, sweep_content, "train.epochs=7")
    assert {run.config.train.clip for run in load(write(sweep_content), ["train.clip=3"]).runs} == {3}


def test_another_launcher_keeps_the_options_of_the_file(write, sweep_content):
    sweep_content["sweep"]["launcher"] = {"jobs": 3, "minutes": 90}
    launcher = load(write(sweep_content), ["sweep.launcher=slurm", "sweep.launcher.gpus=1"]).options.launcher
    assert (launcher.name, launcher.jobs, launcher.minutes, launcher.gpus) == ("slurm", 3, 90, 1)


def test_small_applies_its_overrides_first(write, sweep_content):
    sweep_content["sweep"]["small"] = ["sweep.seeds=1", "train.epochs=4"]
    small = load(write(sweep_content), ["train.epochs=5"], small=True)
    assert len(small.runs) == 2 and small.runs[0].config.train.epochs == 5
    del sweep_content["sweep"]["small"]
    assert "sweep.small: --small needs" in error(write, sweep_content, small=True)


def test_a_condition_about_an_option_that_no_setting_has_is_an_error(write, sweep_content):
    sweep_content["sweep"]["axes"]["train.epochs"] = {"values": [1, 2], "when": {"strategy.repaly": 3}}
    assert "'strategy.repaly' is no option of any setting" in error(write, sweep_content)


def test_an_ordinary_configuration_is_no_sweep_and_a_sweep_no_ordinary_run(write, sweep_content, capsys):
    from clkit.cli import main

    assert main(["run", write(sweep_content)]) == 2
    assert "start it with `clkit sweep`" in capsys.readouterr().err
    del sweep_content["sweep"]
    assert "start it with `clkit run`" in error(write, sweep_content)


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ({"name": "in-process", "jobs": 2}, "sweep.launcher.jobs: runs in this process"),
        ({"name": "in-process", "memory_gib": 2}, "sweep.launcher.memory_gib: a run in this process"),
        ({"name": "slrum"}, "Did you mean 'slurm'"),
        ({"jobs": 0}, "sweep.launcher.jobs: out of range"),
    ],
)
def test_launchers_are_checked(launcher, message, write, sweep_content):
    sweep_content["sweep"]["launcher"] = launcher
    assert message in error(write, sweep_content)


def test_data_and_directories_of_every_run_are_checked_before_the_first(write, sweep_content):
    sweep_content["sweep"]["axes"] |= {"tasks.metric": {"values": ["accuracy", "exact-match"]}}
    with pytest.raises(ConfigError):
        check(load(write(sweep_content)).runs, "sweep.yaml")


def test_hashes_depend_on_configuration_and_data_and_not_on_the_place(write, sweep_content, tmp_path):
    def hashes(**changes):
        return list(check(load(write(sweep_content | changes)).runs, "").values())

    here = hashes()
    assert len(set(here)) == 4
    assert hashes(output_dir=str(tmp_path / "elsewhere"), name="other") == here
    assert not set(hashes(tasks=sweep_content["tasks"] | {"train_limit": 7})) & set(here)


def test_long_names_of_directories_are_cut_and_stay_different():
    a, b = (folder_name("x" * 200 + end) for end in "ab")
    assert len(a) == 120 and a != b and folder_name("../a b") == "_a_b"
