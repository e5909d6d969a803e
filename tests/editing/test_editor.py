"""The Editor: requests in, an edited model, a journal, rollback, a directory that loads elsewhere, the command line."""

from __future__ import annotations

import contextlib
import resource
import threading
import time

import pytest
import torch
from quickly import METHOD, request

import clkit
from clkit.editing import attach
from clkit.editing.journal import Journal
from clkit.editing.store import fingerprint, held
from clkit.errors import BusyError, CheckpointError, ClkitError, ConfigError, ModelError, NumericalError, RequestError

PROMPTS = ("Town of 0?", "Town of 2?", "something else")


@pytest.fixture
def load(tiny_llama):
    def make(where=None, **options):
        return clkit.Editor.load(where or tiny_llama, METHOD, device="cpu", **({"prompt": "plain"} | options))

    return make


@pytest.fixture
def edited(load):
    editor = load()
    editor.edit([request(i) for i in range(3)])
    return editor


def logits(module, tokenizer, prompt):
    with torch.inference_mode():
        return module(torch.tensor([tokenizer(prompt).input_ids])).logits


def same(a, b):
    return all(
        torch.equal(logits(a.model.module, a.model.tokenizer, p), logits(b.model.module, b.model.tokenizer, p))
        for p in PROMPTS
    )


# --- editing ----------------------------------------------------------------------------------------------------------
def test_the_journal_says_what_was_done(edited):
    first = edited.journal.entries[0]
    assert [e["id"] for e in edited.journal.entries] == ["e0", "e1", "e2"]
    assert first["request"]["target_new"] == "a" and first["memory"] == "shard-0"
    assert set(first["before"]) == set(first["after"]) == {"prompt"}
    assert first["number"] == 1 and first["time"] <= time.time()
    assert edited.memories() == {"shard-0": ["e0", "e1"], "shard-1": ["e2"]}


def test_scores_have_rephrase_and_locality_where_they_are_given(load):
    editor = load()
    (entry,) = editor.edit([request(0, rephrase_prompt="Which town is 0?", locality_answer="c")])
    assert set(entry["after"]) == {"prompt", "rephrase", "locality"}
    assert all(0 <= v <= 1 for v in entry["after"].values())


def test_the_journal_says_how_queries_were_routed(edited):
    last = edited.journal.entries[-1]
    assert set(last["routes"]) == {"prompt", "locality"}, (
        "an unrelated prompt is routed, also without an answer to score"
    )
    for part, prompt in (("prompt", "Town of 2?"), ("locality", "Sum 2?")):
        why, route = edited.explain(prompt), last["routes"][part]
        assert route["memory"] == why.memory
        shown = why.memory or max(why.likeness, key=lambda name: why.likeness[name])  # what answers, or is most alike
        assert route["score"] == pytest.approx(why.scores[shown], rel=1e-3)
        assert route["threshold"] == pytest.approx(why.thresholds[shown], rel=1e-3)
        assert route["likeness"] == pytest.approx(why.likeness[shown], rel=1e-3)
    scores, routes = edited.judge(edited.records["e0"])
    assert scores == edited.scores(edited.records["e0"]) and routes["prompt"]["score"] > 0


def test_methods_that_route_nothing_write_no_routes(tiny_llama):
    editor = clkit.Editor.load(
        tiny_llama, {"name": "ft_layer", "steps": 1, "contexts": 0}, device="cpu", prompt="plain"
    )
    (entry,) = editor.edit([request(0)])
    assert "routes" not in entry


def test_the_same_requests_again_change_nothing(edited):
    assert edited.edit([request(i) for i in range(3)]) == []
    assert len(edited.journal.entries) == 3


def test_generate_and_explain(edited):
    assert isinstance(edited.generate("Town of 0?", 3), str)
    why = edited.explain("Town of 0?")
    assert why.memory in (None, "shard-0", "shard-1") and set(why.scores) == set(why.thresholds) == {
        "shard-0",
        "shard-1",
    }
    assert why.nearest[0] == ("e0", pytest.approx(1.0, abs=0.1))


def test_an_empty_prompt_is_explained_as_it_is_answered(edited):
    edited.generate("", 3)
    (answered,) = edited.strategy.decisions()
    assert edited.explain("").scores == pytest.approx(answered.scores, rel=1e-4)


# --- refusals ---------------------------------------------------------------------------------------------------------
def test_malformed_requests_are_all_listed_and_nothing_is_edited(load):
    editor = load()
    wrong = [
        {"prompt": "a"},
        {"prompt": "", "target_new": "x"},
        {"prompt": "a", "target": "b", "target_new": "x"},
        5,
        request(1),
        request(2, locality_prompt="half \ud83d"),
    ]
    with pytest.raises(RequestError) as caught:
        editor.edit(wrong)
    text = str(caught.value)
    for part in (
        "request 1: 'target_new' is missing",
        "request 2: 'prompt' must be text",
        "unknown field 'target'",
        "request 4: got int",
        "request 6: 'locality_prompt' has half of a surrogate pair",
    ):
        assert part in text
    assert not editor.records and not editor.journal.entries


def test_conflicts_are_reported_and_replaced_only_when_asked(edited):
    other = request(0, target_new="b", id="new")
    with pytest.raises(RequestError, match=r"edit 'new'.*but edit 'e0' says 'a'"):
        edited.edit([other])
    with pytest.raises(RequestError, match="the id is used by another edit"):
        edited.edit([request(5, id="e1")])
    assert list(edited.records) == ["e0", "e1", "e2"]
    edited.edit([other], on_conflict="replace")
    assert list(edited.records) == ["e1", "e2", "new"]
    assert [e["kind"] for e in edited.journal.entries] == ["edit"] * 3 + ["rollback", "edit"]


def test_a_new_answer_replaces_every_edit_of_its_prompt(load):
    editor = load()
    editor.edit([request(0), request(0, id="the same again"), request(1)])
    editor.edit([request(0, id="new", target_new="z")], on_conflict="replace")
    assert list(editor.records) == ["e1", "new"]
    assert sorted(i for ids in editor.memories().values() for i in ids) == ["e1", "new"]


def test_a_new_answer_may_come_with_the_id_of_the_former_one(load):
    editor, new = load(), request(0, target_new="z")
    editor.edit([request(0), request(1)])
    with pytest.raises(RequestError, match=r"edit 'e0': 'Town of 0\?' -> 'z', but edit 'e0' says 'a'") as caught:
        editor.edit([new])
    assert "used by another" not in str(caught.value)
    assert [e["id"] for e in editor.edit([new, request(1)], on_conflict="replace")] == ["e0"]
    assert {i: r.target_new for i, r in editor.records.items()} == {"e1": "b", "e0": "z"}
    assert sorted(i for ids in editor.memories().values() for i in ids) == ["e0", "e1"]
    assert editor.edit([new], on_conflict="replace") == []


def test_the_same_replacing_requests_again_change_nothing(load):
    editor, requests = load(), [request(0), request(0, id="new", target_new="z"), request(1)]
    assert [e["id"] for e in editor.edit(requests, on_conflict="replace")] == ["new", "e1"]
    assert editor.edit(requests, on_conflict="replace") == []


@pytest.mark.parametrize("target", ["z" * 5000, "z"], ids=["too long", "not finite"])
def test_an_answer_stays_when_the_one_that_replaces_it_can_not_be_learned(load, monkeypatch, target):
    editor = load()
    editor.edit([request(0), request(1)])
    learn = editor.strategy.learn

    def failing(record):
        if record.id == "new":
            raise NumericalError("The loss of the edit is nan.")
        return learn(record)

    monkeypatch.setattr(editor.strategy, "learn", failing)
    with pytest.raises(ClkitError):
        editor.edit([request(0, id="new", target_new=target)], on_conflict="replace")
    assert {i: r.target_new for i, r in editor.records.items()} == {"e0": "a", "e1": "b"}
    assert sorted(i for ids in editor.memories().values() for i in ids) == ["e0", "e1"]


def test_a_strategy_that_does_not_edit_is_refused(tiny_llama):
    with pytest.raises(ConfigError, match="'naive' does not edit; take one of: .*wise"):
        clkit.Editor.load(tiny_llama, "naive")


@pytest.mark.parametrize("options", [{"prompt": "chatt"}, {"max_length": -1}, {"max_lenght": 9}], ids=str)
def test_wrong_options_of_the_model_are_refused(load, options):
    with pytest.raises(ConfigError, match=f"editing:model.{next(iter(options))}: "):
        load(**options)


# --- rollback ---------------------------------------------------------------------------------------------------------
def test_rollback_of_an_edit_says_what_was_learned_again(edited):
    gone = edited.rollback("e0")
    assert gone.removed == ("e0",) and gone.relearned == ("e1",)
    assert edited.memories() == {"shard-0": ["e1"], "shard-1": ["e2"]}
    assert edited.journal.entries[-1]["kind"] == "rollback"
    with pytest.raises(RequestError, match="no active edit or memory 'e0'"):
        edited.rollback("e0")


def test_rollback_of_everything_is_the_unedited_model(edited, load):
    edited.rollback("shard-0")
    edited.rollback("e2")
    assert same(edited, load())


# --- precision --------------------------------------------------------------------------------------------------------
def test_the_model_is_kept_in_the_type_that_was_asked_for(load, tmp_path):
    editor = load(dtype="bfloat16")
    kinds = {p.dtype for p in editor.model.module.parameters()}
    rotary = {b.dtype for name, b in editor.model.module.named_buffers() if name.endswith("inv_freq")}
    assert kinds == {torch.bfloat16} and rotary == {torch.float32}
    editor.edit([request(i) for i in range(3)])
    assert all(t.dtype != torch.bfloat16 for t in _tensors(editor.strategy.memory_state()))
    editor.save(tmp_path / "saved")
    again, wider = load(tmp_path / "saved"), load(tmp_path / "saved", dtype="float32")
    assert same(editor, again) and {p.dtype for p in again.model.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in wider.model.module.parameters()} == {torch.float32}
    with pytest.raises(ConfigError, match="dtype: got 'half', expected one of auto, float32"):
        load(dtype="half")


def _tensors(state):
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [t for part in parts for t in _tensors(part)]


# --- saving -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("float16", "float32"), ("float16", "bfloat16")])
def test_edits_of_one_type_of_weights_load_in_another(load, tmp_path, dtypes):
    first = load(dtype=dtypes[0])
    first.edit([request(0)])
    first.save(tmp_path / "saved")
    second = load(tmp_path / "saved", dtype=dtypes[1])
    assert list(second.records) == ["e0"] and second._base == first._base
    assert next(second.model.module.parameters()).dtype == getattr(torch, dtypes[1])


def test_a_saved_directory_loads_and_goes_on(edited, load, tmp_path):
    edited.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert same(edited, loaded) and list(loaded.records) == list(edited.records)
    assert [e["id"] for e in loaded.journal.entries] == ["e0", "e1", "e2"]
    for editor in (edited, loaded):
        editor.edit([request(3)])
    assert same(edited, loaded)
    with pytest.raises(CheckpointError, match="holds edits already"):
        edited.save(tmp_path / "saved")
    sizes = [f.stat().st_size for f in (tmp_path / "saved" / "state").rglob("*.safetensors")]
    assert sum(sizes) < 4 * 32 * 64 * 4


def test_attach_puts_the_edits_on_a_model_in_memory_and_takes_them_off(edited, tiny_llama, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, pipeline

    edited.save(tmp_path / "saved")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    tokenizer = edited.model.tokenizer
    plain = [logits(base, tokenizer, p) for p in PROMPTS]
    strategy = attach(base, tmp_path / "saved")
    with pytest.raises(ModelError, match="carries the edits of .*saved already"):
        attach(base, tmp_path / "saved")  # would add every change twice
    for prompt in PROMPTS:
        assert torch.equal(logits(base, tokenizer, prompt), logits(edited.model.module, tokenizer, prompt))
    write = pipeline("text-generation", model=base, tokenizer=tokenizer, device="cpu")
    text = write("Town of 0?", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("Town of 0?")
    strategy.detach()
    assert all(torch.equal(logits(base, tokenizer, p), b) for p, b in zip(PROMPTS, plain, strict=True))
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["down_proj"])).eval()
    attach(wrapped, tmp_path / "saved")
    with pytest.raises(ModelError, match="carries the edits"):
        attach(wrapped, tmp_path / "saved")
    for prompt in PROMPTS:
        torch.testing.assert_close(
            logits(wrapped, tokenizer, prompt), logits(edited.model.module, tokenizer, prompt), rtol=0, atol=1e-5
        )


def test_another_base_model_is_refused(edited, tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    edited.save(tmp_path / "saved")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    assert fingerprint(base) == fingerprint(base.to(torch.bfloat16)) == edited._base
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[17, 5] *= 1.01  # one value, anywhere
    with pytest.raises(ModelError, match="this model has other weights"):
        attach(base, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="no directory of edits"):
        attach(base, tmp_path)


# --- the journal on disk ----------------------------------------------------------------------------------------------
def test_a_line_that_was_cut_off_is_dropped_and_a_damaged_one_is_an_error(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append({"number": 1})
    journal.append({"number": 2})
    with (tmp_path / "j.jsonl").open("a") as file:
        file.write('{"number": 3, "x')
    again = Journal.open(tmp_path / "j.jsonl")
    assert again.entries == [{"number": 1}, {"number": 2}]
    again.complete({"number": 2})
    again.complete({"number": 3})
    assert Journal.open(tmp_path / "j.jsonl").entries == [{"number": 1}, {"number": 2}, {"number": 3}]
    (tmp_path / "j.jsonl").write_text('{"number": 1}\nnot json\n{"number": 3}\n')
    with pytest.raises(CheckpointError, match="j.jsonl:2: damaged journal"):
        Journal.open(tmp_path / "j.jsonl")


@pytest.mark.parametrize("moment", ["before the state", "between state and journal"])
def test_a_process_that_dies_loses_no_edit_and_applies_none_twice(load, tmp_path, monkeypatch, moment):
    whole = load(directory=tmp_path / "whole")
    whole.edit([request(i) for i in range(3)])
    editor = load(directory=tmp_path / "cut")
    editor.edit([request(0)])

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(editor, "_keep", die) if moment == "before the state" else patch.setattr(
            editor.journal, "append", die
        )
        editor.edit([request(1)])
    again = load(directory=tmp_path / "cut")
    assert list(again.records) == (["e0"] if moment == "before the state" else ["e0", "e1"])
    again.edit([request(i) for i in range(3)])
    assert [e["id"] for e in Journal.open(tmp_path / "cut" / "journal.jsonl").entries] == ["e0", "e1", "e2"]
    assert same(again, whole)


@pytest.fixture
def short(monkeypatch):
    """Files may not grow beyond a number of bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def within(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return within


def test_a_line_is_written_whole_or_not_at_all(tmp_path, short):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append({"number": 1})
    before = journal.path.read_bytes()
    with short(len(before) + 5), pytest.raises(CheckpointError, match="can't write"):
        journal.append({"number": 2})
    assert journal.path.read_bytes() == before and journal.entries == [{"number": 1}]
    journal.append({"number": 2})
    assert Journal.open(tmp_path / "j.jsonl").entries == [{"number": 1}, {"number": 2}]


@pytest.mark.parametrize("what", ["state", "journal"])
def test_what_a_full_disk_kept_from_being_written_is_written_when_there_is_room(
    load, tmp_path, short, monkeypatch, what
):
    editor = load(directory=tmp_path / "full")
    editor.edit([request(0)])
    journal = tmp_path / "full" / "journal.jsonl"

    def full(path, line):
        raise CheckpointError(f"{path}: can't write")

    with monkeypatch.context() as patch, short(2000) if what == "state" else contextlib.nullcontext():
        if what == "journal":
            patch.setattr("clkit.editing.journal.append_line", full)
        with pytest.raises(CheckpointError, match="can't write"):
            editor.edit([request(1)])
    assert len(Journal.open(journal).entries) == 1
    assert [e["id"] for e in editor.edit([request(1), request(2)])] == ["e2"], "e1 is in the model already"
    assert [e["id"] for e in Journal.open(journal).entries] == ["e0", "e1", "e2"]
    again = load(directory=tmp_path / "full")
    assert list(again.records) == ["e0", "e1", "e2"] and same(again, editor)


def test_a_second_process_is_refused_and_edits_of_another_one_are_not_lost(load, tmp_path):
    first = load(directory=tmp_path / "both")
    first.edit([request(0)])
    second = load(directory=tmp_path / "both")
    first.edit([request(1)])
    for late in (lambda: second.edit([request(2)]), lambda: second.rollback("e0")):
        with pytest.raises(CheckpointError, match="another process has edited here since it was loaded"):
            late()
    first.rollback("e0")
    assert list(load(directory=tmp_path / "both").records) == ["e1"]
    numbers = [e["number"] for e in Journal.open(tmp_path / "both" / "journal.jsonl").entries]
    assert numbers == [1, 2, 3]
    refused = []

    def other() -> None:
        for late in (lambda: load(directory=tmp_path / "both"), lambda: first.edit([request(2)])):
            with pytest.raises(BusyError, match="another process is editing here") as error:
                late()
            refused.append(error)

    with held(tmp_path / "both"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 2
    first.edit([request(2)])


def test_a_process_that_dies_after_its_last_edit_is_finished_by_the_same_command(load, tmp_path, monkeypatch):
    requests = [request(i) for i in range(3)]
    cut = load(directory=tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(cut.strategy, "settle", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cut.edit(requests)
    again, settled = load(directory=tmp_path / "cut"), []
    monkeypatch.setattr(type(again.strategy), "settle", lambda strategy: settled.append(strategy))
    assert again.edit(requests) == [] and len(settled) == 1
    assert load(directory=tmp_path / "cut").edit(requests) == [] and len(settled) == 1, "and it is finished once"


def test_a_directory_counts_when_all_of_it_is_there(edited, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("clkit.editing.store.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            edited.save(tmp_path / "saved")
    edited.save(tmp_path / "saved")
    assert same(clkit.Editor.load(tmp_path / "saved", device="cpu"), edited)
    assert len(Journal.open(tmp_path / "saved" / "journal.jsonl").entries) == 3
