"""What happens around a directory of edits: other places, interrupts, full disks, copies, readers."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path

import peft
import pytest
import torch
from quickly import METHOD, request

import clkit
from clkit.editing import judging
from clkit.editing.journal import Journal
from clkit.editing.store import fingerprint
from clkit.errors import CheckpointError, ModelError


@pytest.fixture
def load(tiny_llama):
    def make(where=None, **options):
        return clkit.Editor.load(where or tiny_llama, METHOD, device="cpu", **({"prompt": "plain"} | options))

    return make


def test_relative_paths_mean_the_same_wherever_the_process_goes(load, tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny_llama)
    editor = load("model", directory="edits")
    editor.edit([request(0)])
    assert load(tmp_path / "edits", directory="edits").directory == editor.directory
    monkeypatch.chdir("elsewhere")
    editor.edit([request(1)])
    assert not list(Path().iterdir()), "nothing is written in another place"
    assert list(load("../edits").records) == ["e0", "e1"]
    assert json.loads(Path("../edits/edits.json").read_text())["model"]["name"] == str(tiny_llama)


def test_finished_memories_are_merged_when_asked_and_that_is_kept(load, tmp_path):
    editor = load(directory=tmp_path / "edits")
    editor.edit([request(i) for i in range(5)])
    assert list(editor.memories()) == ["shard-0", "shard-1", "shard-2"]
    assert editor.consolidate() and not editor.consolidate(), "the last one is not full"
    assert editor.memories() == {"shards-0-1": ["e0", "e1", "e2", "e3"], "shard-2": ["e4"]}
    assert editor.journal.entries[-1]["kind"] == "merge" and len(editor.journal.entries) == 6
    again = load(tmp_path / "edits", directory=tmp_path / "edits")
    assert again.memories() == editor.memories()
    assert torch.equal(*(logits(e.model.module, e.model.tokenizer) for e in (editor, again)))
    assert set(again.rollback("e1").relearned) == {"e0", "e2", "e3"}
    again.edit([request(5)])
    assert [e["number"] for e in again.journal.entries] == [*range(1, 9)]


def test_methods_without_several_memories_have_nothing_to_merge(tiny_llama):
    editor = clkit.Editor.load(tiny_llama, {"name": "grace", "steps": 2}, device="cpu", prompt="plain")
    editor.edit([request(0), request(1)])
    assert not editor.consolidate() and len(editor.journal.entries) == 2


def test_what_a_full_disk_kept_out_of_the_journal_is_in_a_copy_made_elsewhere(load, tmp_path, monkeypatch):
    editor = load(directory=tmp_path / "full")
    editor.edit([request(0)])

    def full(path, line):
        raise CheckpointError(f"{path}: can't write")

    with monkeypatch.context() as patch:
        patch.setattr("clkit.editing.journal.append_line", full)
        with pytest.raises(CheckpointError, match="can't write"):
            editor.edit([request(1)])
    editor.save(tmp_path / "copy")
    assert list(load(tmp_path / "copy").records) == ["e0", "e1"]
    assert [e["id"] for e in Journal.open(tmp_path / "copy" / "journal.jsonl").entries] == ["e0", "e1"]
    editor.edit([request(2)])
    assert [e["number"] for e in Journal.open(tmp_path / "full" / "journal.jsonl").entries] == [1, 2, 3]


@pytest.mark.parametrize("line", ["5", "null", "[]", "{}", '{"number": "2"}', "\x00\x00", "not json"])
def test_a_line_that_is_no_entry_is_a_damaged_journal(load, tmp_path, line):
    load(directory=tmp_path / "edits").edit([request(0)])
    with (tmp_path / "edits" / "journal.jsonl").open("a") as file:
        file.write(f"{line}\n")
    for options in ({"directory": tmp_path / "edits"}, {"where": tmp_path / "edits"}):
        with pytest.raises(CheckpointError, match=r"journal.jsonl:2: damaged journal .*; restore it from a copy"):
            load(**options)


def test_entries_are_counted_on_from_the_newest_where_an_older_copy_was_restored(load, tmp_path):
    editor, journal = load(directory=tmp_path / "edits"), tmp_path / "edits" / "journal.jsonl"
    editor.edit([request(i) for i in range(3)])
    journal.write_text(journal.read_text().splitlines(keepends=True)[0])
    load(directory=tmp_path / "edits").edit([request(3)])
    assert [(e["number"], e["id"]) for e in Journal.open(journal).entries] == [(1, "e0"), (3, "e2"), (4, "e3")]


def test_who_only_reads_leaves_the_line_that_another_process_is_writing(load, tmp_path):
    editor, journal = load(directory=tmp_path / "edits"), tmp_path / "edits" / "journal.jsonl"
    editor.edit([request(0)])
    with journal.open("a") as file:
        file.write('{"number": 2, "ti')
    before = journal.read_bytes()
    assert len(load(tmp_path / "edits").journal.entries) == 1 and journal.read_bytes() == before
    load(directory=tmp_path / "edits").edit([request(1)])
    assert [e["id"] for e in Journal.open(journal).entries] == ["e0", "e1"]


def test_ctrl_c_ends_after_the_edit_that_is_being_made(load, tmp_path, monkeypatch):
    editor, scored = load(directory=tmp_path / "edits"), judging._now
    handler = signal.getsignal(signal.SIGINT)

    def pressed(*args):  # when an edit has been learned, and nothing written down
        signal.raise_signal(signal.SIGINT)
        return scored(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="after edit 'e0'; the same call"):
        patch.setattr(judging, "_now", pressed)
        editor.edit([request(i) for i in range(2)])
    assert list(editor.records) == ["e0"] and editor.strategy.holdings() == editor.memories() == {"shard-0": ["e0"]}
    editor.edit([request(i) for i in range(2)])
    assert [e["id"] for e in Journal.open(tmp_path / "edits" / "journal.jsonl").entries] == ["e0", "e1"]
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("what", ["rollback", "merge"])
def test_ctrl_c_does_not_cut_what_changes_several_edits(what, load, tmp_path, monkeypatch):
    editor = load(directory=tmp_path / "edits")
    editor.edit([request(i) for i in range(4)])
    wise = editor.strategy.wise
    measured = wise.calibrate

    def pressed():  # when the memories are others, and nothing is written down
        signal.raise_signal(signal.SIGINT)
        measured()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="after (memories|'e1') w"):
        patch.setattr(wise, "calibrate", pressed)
        editor.rollback("e1") if what == "rollback" else editor.consolidate()
    assert editor.journal.entries[-1]["kind"] == what
    assert load(tmp_path / "edits").memories() == editor.memories() == editor.strategy.holdings()
    assert ("e1" in editor.records) == (what == "merge")


def test_only_who_edits_in_a_directory_sets_a_damaged_state_aside(load, tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    load(directory=tmp_path / "edits").edit([request(0), request(1)])
    newest = sorted((tmp_path / "edits" / "state").iterdir())[-1]
    (newest / "state.json").write_text("cut")
    before = sorted(p.name for p in newest.parent.iterdir())
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for read in (lambda: load(tmp_path / "edits"), lambda: clkit.editing.attach(base, tmp_path / "edits")):
        with pytest.warns(RuntimeWarning, match="Falling back to the one before"):
            read()
        assert sorted(p.name for p in newest.parent.iterdir()) == before, "it may lie where nothing can be written"
    with pytest.warns(RuntimeWarning, match="Falling back to the one before"):
        editor = load(directory=tmp_path / "edits")
    editor.edit([request(i) for i in range(3)])
    assert not newest.exists() and list(load(tmp_path / "edits").records) == ["e0", "e1", "e2"]
    for file in (tmp_path / "edits" / "state").rglob("state.json"):
        file.write_text("cut")
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(CheckpointError, match="damaged. Restore a backup, or make the edits"),
    ):
        load(tmp_path / "edits")


def test_a_disk_that_is_full_when_the_tokenizer_is_written_is_one_clear_error(load, tmp_path):
    editor = load()
    editor.edit([request(0)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5500, limits[1]))  # the tokenizer is larger, all before it is smaller
    try:
        with pytest.raises(CheckpointError, match=r"saved: can't write \(File too large\). Free some space"):
            editor.save(tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    editor.save(tmp_path / "saved")
    assert list(load(tmp_path / "saved").records) == ["e0"]


def test_a_journal_of_something_else_is_not_deleted(load, tmp_path):
    (tmp_path / "journal.jsonl").write_text("mine\n")
    with pytest.raises(CheckpointError, match="a journal.jsonl that is not of edits; choose another directory"):
        load().save(tmp_path)
    with pytest.raises(CheckpointError, match="a journal.jsonl that is not of edits"):
        load(directory=tmp_path)
    assert (tmp_path / "journal.jsonl").read_text() == "mine\n"


def test_a_model_that_lies_elsewhere_on_another_machine_is_asked_for(load, tiny_llama, tmp_path):
    here, there, edits = tmp_path / "here", tmp_path / "there", tmp_path / "edits"
    shutil.copytree(tiny_llama, here)
    load(here, directory=edits).edit([request(0)])
    here.rename(there)
    for options in ({"where": edits}, {"where": here, "directory": edits}):
        with pytest.raises(ModelError, match=r"there is no directory(?s:.*)If it lies in another place here"):
            load(**options)
    assert list(load(there, directory=edits).records) == ["e0"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_edits_are_made_where_gradients_are_switched_off(load, mode):
    with mode():
        editor, plain = load(), load()
        editor.edit([request(0), request(1)])
        assert editor.rollback("e0").relearned == ("e1",) and not torch.is_grad_enabled()
        changed = logits(editor.model.module, editor.model.tokenizer, "Town of 1? ")
        assert not torch.equal(changed, logits(plain.model.module, plain.model.tokenizer, "Town of 1? "))
    editor.edit([request(2)])


# --- models in memory -------------------------------------------------------------------------------------------------
@pytest.fixture
def base(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def logits(module, tokenizer, prompt="Town of 0? "):
    with torch.inference_mode():
        return module(torch.tensor([tokenizer(prompt).input_ids])).logits


LAYERS = ["down_proj", "q_proj"]


@pytest.mark.parametrize(
    "adapter",
    [
        peft.LoraConfig(r=2, target_modules=LAYERS, modules_to_save=["lm_head"]),
        peft.LoraConfig(r=2, target_modules=LAYERS, trainable_token_indices=[3]),
        peft.AdaLoraConfig(init_r=2, target_modules=LAYERS, total_step=10),
        peft.IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"]),
        peft.LoHaConfig(r=2, target_modules=LAYERS),
        peft.VeraConfig(r=2, target_modules=LAYERS),
    ],
    ids=["modules saved", "tokens", "adalora", "ia3", "loha", "vera"],
)
def test_edits_go_on_a_model_with_any_adapter_that_changes_layers(load, base, tmp_path, adapter):
    editor = load()
    editor.edit([request(0)])
    editor.save(tmp_path / "edits")
    wrapped = peft.get_peft_model(base, adapter).eval()
    plain = logits(wrapped, editor.model.tokenizer)
    assert fingerprint(wrapped) == editor._base
    strategy = clkit.editing.attach(wrapped, tmp_path / "edits")
    edited = logits(wrapped, editor.model.tokenizer)
    assert not torch.equal(edited, plain), "a fresh adapter changes nothing, the edit does"
    torch.testing.assert_close(edited, logits(editor.model.module, editor.model.tokenizer), rtol=0, atol=1e-5)
    strategy.detach()
    assert torch.equal(logits(wrapped, editor.model.tokenizer), plain)


@pytest.mark.parametrize("method", [METHOD, {"name": "ft_layer", "steps": 2, "contexts": 0}], ids=["wise", "ft_layer"])
def test_a_model_that_was_compiled_and_used_before_answers_with_the_edits(tiny_llama, base, tmp_path, method):
    editor = clkit.Editor.load(tiny_llama, method, device="cpu", prompt="plain")
    editor.edit([request(0)])
    editor.save(tmp_path / "edits")
    tokenizer, compiled = editor.model.tokenizer, torch.compile(base, backend="eager")
    plain = logits(compiled, tokenizer)
    for model in (base, compiled):
        strategy = clkit.editing.attach(model, tmp_path / "edits")
        edited = logits(compiled, tokenizer)
        assert not torch.equal(edited, plain)
        torch.testing.assert_close(edited, logits(base, tokenizer), rtol=0, atol=1e-5)
        strategy.detach()
        torch.testing.assert_close(logits(compiled, tokenizer), plain, rtol=0, atol=1e-5)


class Packed(torch.nn.Module):
    """A linear layer in integers that are neither parameters nor buffers, as torch keeps them on the CPU."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = float(layer.weight.detach().abs().max()) / 127
        self.packed = ((layer.weight.detach() / self.scale).round().to(torch.int8),)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.packed[0].float() * self.scale)


@pytest.mark.parametrize("name", ["wise", "grace", "in_context", "ft_layer", "lora_edit", "memit"])
def test_edits_go_on_a_quantised_copy(tiny_llama, base, tmp_path, name):
    few = {} if name == "in_context" else {"steps": 3, "contexts": 0}
    editor = clkit.Editor.load(tiny_llama, {"name": name, "layer": "0"} | few, device="cpu", prompt="plain")
    editor.edit([request(0)])
    editor.save(tmp_path / "edits")
    for block in base.model.layers:
        block.mlp.down_proj = Packed(block.mlp.down_proj)
    plain = logits(base, editor.model.tokenizer)
    strategy = clkit.editing.attach(base, tmp_path / "edits", check=False)
    assert not torch.equal(logits(base, editor.model.tokenizer), plain)
    strategy.detach()
    assert torch.equal(logits(base, editor.model.tokenizer), plain)


def test_a_model_on_which_edits_can_not_be_put_stays_as_it_was(load, base, tmp_path, monkeypatch):
    editor = load()
    editor.edit([request(0)])
    editor.save(tmp_path / "edits")
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(type(editor.strategy), "load_memory_state", lambda *_: {}["of an older clkit"])
        clkit.editing.attach(base, tmp_path / "edits")
    clkit.editing.attach(base, tmp_path / "edits")
    assert torch.equal(logits(base, editor.model.tokenizer), logits(editor.model.module, editor.model.tokenizer))


@pytest.mark.parametrize("name", ["in_context", "grace", "wise"])
def test_what_prompts_look_like_moves_with_the_model(tiny_llama, base, tmp_path, name):
    few = {} if name == "in_context" else {"steps": 3, "contexts": 0}
    editor = clkit.Editor.load(tiny_llama, {"name": name, "layer": "0"} | few, device="cpu", prompt="plain")
    editor.edit([request(0)])
    editor.save(tmp_path / "edits")
    strategy = clkit.editing.attach(base, tmp_path / "edits")
    read = strategy.wise.reading if name == "wise" else strategy.reading
    before = read("Town of 0?")
    base.to("meta")  # as to a GPU, or as a pipeline with a device does; on any machine
    assert before.device.type == "cpu" and read("Town of 0?").device.type == "meta"
