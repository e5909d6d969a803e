"""Checkpoints are exact, atomic and verified."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from safetensors import SafetensorError

from clkit.checkpoint import CheckpointStore, pack, read_checkpoint, tensor_dict, unpack
from clkit.errors import CheckpointError


def _state(value: float = 1.0) -> dict:
    return {
        "a": torch.full((3,), value),
        "n": {"x": [1, 2.5, None, "text"], "moments": {0: torch.ones(2), 7: torch.zeros(1)}},
        "flag": True,
    }


def test_packing_and_unpacking_gives_back_the_same_nested_state():
    tree, tensors = pack(_state())
    back = unpack(tree, tensors)
    assert torch.equal(back["a"], torch.full((3,), 1.0))
    assert back["n"]["x"] == [1, 2.5, None, "text"]
    assert list(back["n"]["moments"]) == [0, 7]


def test_an_object_that_is_neither_json_nor_tensor_is_refused_by_name():
    with pytest.raises(TypeError, match="'/model/thing' is a object"):
        pack({"model": {"thing": object()}})


def test_a_saved_state_is_read_back_bit_for_bit_whatever_its_dtype(tmp_path):
    store = CheckpointStore(tmp_path)
    state = {
        str(d): torch.arange(5).to(d)
        for d in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    }
    state["empty"] = torch.empty(0)
    store.save(state)
    back = store.load()
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)


def test_tensors_that_share_memory_are_each_saved_whole(tmp_path):
    base = torch.arange(10.0)
    CheckpointStore(tmp_path).save({"whole": base, "view": base[2:5], "again": base})
    back = CheckpointStore(tmp_path).load()
    assert torch.equal(back["whole"], base) and torch.equal(back["again"], base)
    assert torch.equal(back["view"], base[2:5])


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for i in range(5):
        store.save({"i": i})
    assert [read_checkpoint(p)["i"] for p in store.list()] == [3, 4]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_with_a_warning(tmp_path, file, damage):
    store = CheckpointStore(tmp_path)
    store.save({**_state(), "i": 1})
    path = store.save({**_state(2.0), "i": 2}) / file
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.warns(RuntimeWarning, match="Falling back"):
        assert store.load()["i"] == 1


def test_when_all_checkpoints_are_damaged_nothing_is_silently_restarted(tmp_path):
    store = CheckpointStore(tmp_path)
    (store.save({"i": 1}) / "state.json").write_text("")
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        store.load()


def test_a_full_disk_is_one_clear_error_and_older_checkpoints_stay(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save({"i": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, limits[1])
    )  # the kernel refuses larger files, as a full disk does
    try:
        with pytest.raises(CheckpointError, match="can't write"):
            store.save({"big": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.load()["i"] == 1
    assert not list(tmp_path.glob(".tmp*"))


def test_tied_frozen_weights_are_not_taken_for_buffers():
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False), torch.nn.BatchNorm1d(4)
    )
    module[1].weight = module[0].weight
    assert set(tensor_dict(module, {"2.weight"})) == {
        "2.weight",
        "2.running_mean",
        "2.running_var",
        "2.num_batches_tracked",
    }


@pytest.mark.parametrize("manifest", ["[]", "3", "{}", '{"format": 1, "sha256": []}', '{"format": 1, "sha256": {}}'])
def test_a_manifest_of_another_shape_is_a_damaged_checkpoint(tmp_path, manifest):
    store = CheckpointStore(tmp_path)
    store.save({"i": 1})
    (store.save({"i": 2}) / "manifest.json").write_text(manifest)
    with pytest.warns(RuntimeWarning, match="Falling back"):
        assert store.load() == {"i": 1}


def test_a_checkpoint_of_a_newer_clkit_is_neither_read_nor_taken_for_damaged(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save({"i": 1})
    file = store.save({"i": 2}) / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2, "clkit": "7.0"}))
    with pytest.raises(CheckpointError, match=r"format 2 by clkit 7\.0.*the clkit that wrote it"):
        store.load()
    assert [p.name for p in store.list()] == ["00000001", "00000002"]


def test_damaged_checkpoints_are_set_aside_and_do_not_push_whole_ones_out(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save({"i": 1})
    (store.save({"i": 2}) / "state.json").write_text("")
    with pytest.warns(RuntimeWarning):
        assert store.load() == {"i": 1}
    assert {p.name for p in tmp_path.iterdir()} == {"00000001", "damaged-00000002"}
    third = store.save({"i": 3})
    assert third.name == "00000003"
    (third / "state.json").write_text("")
    with pytest.warns(RuntimeWarning):
        assert store.load() == {"i": 1}
    assert store.save({"i": 4}).name == "00000004"


def test_when_all_are_damaged_they_stay_where_they_are(tmp_path):
    store = CheckpointStore(tmp_path)
    for i in range(2):
        (store.save({"i": i}) / "state.json").write_text("")
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        store.load()
    assert len(store.list()) == 2


def test_checkpoints_after_a_step_can_be_set_aside(tmp_path):
    store = CheckpointStore(tmp_path, keep=5)
    for steps in (2, 4, 6):
        store.save({"position": {"total_steps": steps}})
    (store.save({"position": {"total_steps": 8}}) / "state.json").write_text("{")
    store.drop_after(4)
    assert {p.name for p in tmp_path.iterdir()} == {"00000001", "00000002", "bad-00000003", "00000004"}
    with pytest.warns(RuntimeWarning):
        assert store.load()["position"]["total_steps"] == 4
    assert store.save({"i": 5}).name == "00000005"


def test_a_name_that_is_no_serial_is_not_a_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    (tmp_path / "1-backup").mkdir()
    assert store.save({"i": 1}).name == "00000001" and store.load() == {"i": 1}


def test_a_checkpoint_that_can_not_be_written_says_why_and_that_the_command_resumes(tmp_path, monkeypatch):
    def full(*arguments):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("clkit.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*Free some space.*the same command resumes"):
        CheckpointStore(tmp_path).save({"a": torch.zeros(1)})
