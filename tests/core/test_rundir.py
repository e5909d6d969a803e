"""The run directory: --fresh deletes a run and nothing else, and damage is one clear error."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import yaml

from clkit import api, resolve
from clkit.errors import CheckpointError
from clkit.files import disk_errors, write_text
from clkit.result import RunResult
from clkit.rundir import RunDirectory

FACTS = {"data": {"red": {"train": "1", "eval": "2"}}, "versions": {"clkit": "0.1.0"}}


def config(**changes):
    return resolve.to_dict(resolve.validate({"tasks": "digits", "model": "mlp", "train": {"clip": 2.0}, **changes}))


@pytest.fixture
def begun(tmp_path) -> RunDirectory:
    """A run that was begun, has a checkpoint, and stopped."""
    directory = RunDirectory(tmp_path / "run")
    with directory.locked():
        directory.begin(config(), FACTS)
        directory.checkpoints.save({"i": 1})
        directory.status("interrupted")
    return directory


def result(directory: RunDirectory) -> RunResult:
    return RunResult(
        "r", ["a", "b"], ["h"], ["accuracy"] * 3, np.zeros((2, 3)), np.zeros(3), {"bwt": 0.5}, [True] * 3, None, "x"
    )


# --- --fresh ----------------------------------------------------------------------------------------------------------
def test_fresh_deletes_a_run_and_leaves_what_a_user_put_next_to_it(begun, tmp_path):
    (begun.path / "notes.txt").write_text("mine")
    (begun.path / "data").mkdir()
    (begun.path / "data" / "d.jsonl").write_text("mine")
    (begun.path / "export").mkdir()
    (begun.path / ".tmp-export").mkdir()
    begun.clear()
    assert {p.name for p in begun.path.iterdir()} - {".lock"} == {"notes.txt", "data"}
    assert (begun.path / "data" / "d.jsonl").read_text() == "mine"
    begun.begin(config(), FACTS)


def test_fresh_deletes_nothing_where_there_was_no_run(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "config.yaml").write_text("of: another program")
    (tmp_path / "export" / "model.bin").write_text("mine")
    directory = RunDirectory(tmp_path)
    directory.clear()
    assert (tmp_path / "export" / "model.bin").exists() and (tmp_path / "config.yaml").exists()
    with pytest.raises(CheckpointError, match="choose another output_dir"):
        directory.begin(config(), FACTS)


def test_fresh_takes_symlinks_away_and_not_what_they_lead_to(begun, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model.bin").write_text("mine")
    (begun.path / "export").symlink_to(elsewhere)
    (begun.path / "report.html").symlink_to(tmp_path / "nowhere")
    begun.clear()
    assert (elsewhere / "model.bin").exists()
    assert not (begun.path / "export").is_symlink() and not (begun.path / "report.html").is_symlink()


def test_fresh_reports_what_it_can_not_delete(begun, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("clkit.rundir.shutil.rmtree", refuse)
    with pytest.raises(CheckpointError, match="no permission"):
        begun.clear()


# --- damage -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("content", ["train: [1\n", "- 1\n", "", "3", "a: ${\n"])
def test_a_damaged_config_is_an_error_that_says_how_to_go_on(begun, content):
    (begun.path / "config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.yaml.*--fresh"):
        begun.begin(config(), FACTS)
    begun.clear()
    begun.begin(config(), FACTS)


@pytest.mark.parametrize("content", ["[1]", "3", "{", "{}", '{"data": 3}', '{"data": null}'])
def test_a_damaged_run_json_is_an_error_that_says_how_to_go_on(begun, content):
    (begun.path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match="--fresh"):
        begun.begin(config(), FACTS)


def test_a_damaged_record_of_the_model_is_an_error(begun):
    begun.write("run.json", {**FACTS, "model": 3})
    with pytest.raises(CheckpointError, match="--fresh"):
        begun.bind_model({"weights": "w"})


def test_checkpoints_without_their_configuration_are_not_gone_on_with(begun):
    (begun.path / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"config\.yaml: missing.*--fresh"):
        begun.begin(config(), FACTS)


@pytest.mark.parametrize("content", ["[]", "3", "{"])
def test_a_damaged_status_is_an_error(begun, content):
    result(begun).save(begun)
    (begun.path / "status.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"status\.json.*--fresh"):
        _ = begun.finished


@pytest.mark.parametrize("name", ["matrix.json", "metrics.json"])
def test_a_run_that_lost_its_result_is_not_finished(begun, name):
    result(begun).save(begun)
    begun.status("finished")
    assert begun.finished
    (begun.path / name).unlink()
    assert not begun.finished


def test_a_finished_run_that_lost_its_result_is_finished_again(vision_content):
    first = api.run(resolve.validate(vision_content))
    (first.run_dir / "metrics.json").unlink()
    assert api.run(resolve.validate(vision_content)).metrics == first.metrics


def test_a_result_is_read_back_as_it_was(begun):
    result(begun).save(begun)
    back = RunResult.load(begun.path)
    assert back.tasks == ["a", "b"] and back.metrics == {"bwt": 0.5} and back.snippet == "x"
    assert back.matrix.shape == (2, 3) and back.higher_is_better == [True] * 3


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("matrix.json", lambda saved: [saved]),
        ("matrix.json", lambda saved: {k: v for k, v in saved.items() if k != "initial"}),
        ("matrix.json", lambda saved: {**saved, "initial": 3}),
        ("matrix.json", lambda saved: {**saved, "matrix": [[1, 2, 3]]}),
        ("matrix.json", lambda saved: {**saved, "matrix": [[1], [2, 3]]}),
        ("matrix.json", lambda saved: {**saved, "tasks": None}),
        ("metrics.json", lambda saved: [saved]),
        ("metrics.json", lambda saved: {**saved, "bwt": "low"}),
    ],
)
def test_a_damaged_result_names_the_file_and_what_to_do(begun, name, damage):
    result(begun).save(begun)
    file = begun.path / name
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(CheckpointError, match=rf"{name}: damaged .*--fresh"):
        RunResult.load(begun.path)


# --- another version of clkit -----------------------------------------------------------------------------------------
def _older(directory: RunDirectory, *, version: str = "0.0.9") -> None:
    """Make the run look as if it came from a clkit that did not know train.weight_decay."""
    file = directory.path / "config.yaml"
    content = yaml.safe_load(file.read_text())
    del content["train"]["weight_decay"]
    file.write_text(yaml.safe_dump(content))
    directory.write("run.json", {**FACTS, "versions": {"clkit": version}})


def test_a_run_of_a_clkit_that_did_not_know_an_option_goes_on_with_its_default(begun):
    _older(begun)
    begun.begin(config(), FACTS)
    with pytest.raises(CheckpointError, match=r"train\.weight_decay: .* -> 0\.5"):
        begun.begin(config(train={"clip": 2.0, "weight_decay": 0.5}), FACTS)


def test_a_refusal_names_both_versions_of_clkit_when_they_differ(begun):
    with pytest.raises(CheckpointError) as same:
        begun.begin(config(seed=5), FACTS)
    assert "made by clkit" not in str(same.value)
    _older(begun)
    with pytest.raises(
        CheckpointError, match=r"seed: 0 -> 5\nThe run was made by clkit 0\.0\.9; this is clkit 0\.1\.0"
    ):
        begun.begin(config(seed=5), FACTS)


@pytest.mark.parametrize(
    "kept", ["checkpoints/00000001", "checkpoints/bad-00000001", "matrix.json", "noisy_steps.txt", None]
)
def test_a_run_that_failed_before_anything_was_kept_makes_way_for_another(tmp_path, kept):
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    directory.begin(config(), FACTS)
    directory.status("failed")
    (directory.path / "notes.txt").write_text("mine")
    if kept is not None:
        (directory.path / kept).mkdir(parents=True)
        with pytest.raises(CheckpointError, match="holds a run with another configuration"):
            directory.begin(config(seed=5), FACTS)
        return
    directory.begin(config(seed=5), FACTS)
    assert resolve.load(directory.path / "config.yaml").seed == 5
    assert (directory.path / "notes.txt").exists() and not directory.state


def test_a_run_that_goes_on_makes_way_for_none(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    directory.begin(config(), FACTS)
    for state in ("created", "running"):
        directory.status(state)
        with pytest.raises(CheckpointError, match="holds a run with another configuration"):
            directory.begin(config(seed=5), FACTS)


def test_an_option_that_is_gone_is_a_difference_and_not_a_traceback(begun):
    file = begun.path / "config.yaml"
    file.write_text(file.read_text() + "gone: 1\n")
    with pytest.raises(CheckpointError, match="gone: 1 -> null"):
        begun.begin(config(), FACTS)


# --- events -----------------------------------------------------------------------------------------------------------
def test_events_that_were_lost_are_not_replaced_by_nulls(begun):
    file = begun.path / "events.jsonl"
    file.write_bytes(b'{"event": 1}\n{"eve')
    begun.open_events(1000)
    begun.event("next")
    assert file.read_bytes() == b'{"event": 1}\n{"event": "next"}\n'
    assert begun.events_offset() == len(file.read_bytes())
    begun.open_events(13)
    assert file.read_bytes() == b'{"event": 1}\n'


def test_a_full_disk_under_the_events_is_one_clear_error(begun):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError, match=r"events.jsonl: can't write"), begun.locked():
            begun.open_events(0)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            begun.event("long", text="x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_run_that_is_only_read_keeps_its_events(begun):
    (begun.path / "events.jsonl").write_text("x\n")
    begun.event("next")
    assert begun.events_offset() == 0
    assert (begun.path / "events.jsonl").read_text() == "x\n"


# --- files ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", [".", "folder", "missing/file", "file/inside"])
def test_a_file_that_can_not_be_written_is_one_error_and_leaves_nothing(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("")
    with pytest.raises(CheckpointError, match="can't write.*directory"):
        write_text(Path(target), "text")
    assert {p.name for p in tmp_path.iterdir()} == {"folder", "file"}


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EDQUOT, "Free some space"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.ENOTDIR, "not a directory"),
        (errno.EIO, "Check the disk"),
    ],
)
def test_the_hint_fits_what_went_wrong(number, hint):
    with pytest.raises(CheckpointError, match=f"can't write.*{hint}") as caught, disk_errors(Path("there")):
        raise OSError(number, "the system's words")
    assert "resumes" not in str(caught.value)


def test_a_directory_whose_name_is_too_long_for_the_disk_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="File name too long"):
        _ = RunDirectory(tmp_path / ("x" * 300)).finished
