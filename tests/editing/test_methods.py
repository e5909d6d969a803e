"""Every method of editing in the Editor and on the command line: edit, save, load, go on, take back."""

from __future__ import annotations

import copy
import gc
import json

import pytest
import torch

import clkit
from clkit.cli import main
from clkit.editing import attach
from clkit.errors import CapabilityError
from clkit.registry import STRATEGIES
from clkit.tasks.base import EditRecord

METHODS = [n for n in STRATEGIES.names() if STRATEGIES.get(n).capabilities.kinds == {"edit"}]
PROMPTS = ("Town of 0? ", "Town of 2? ", "something else")  # the space before an answer ends a plain prompt


def requests(*numbers):
    return [clkit.EditRequest(prompt=f"Town of {i}?", target_new="ab"[i % 2], id=f"e{i}") for i in numbers]


def answers(editor):
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([editor.model.tokenizer(prompt).input_ids])
        with torch.inference_mode():
            found.append(editor.model.module(ids).logits)
    return found


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def section(name):
    """Few steps, for methods that take any."""
    options = vars(STRATEGIES.get(name).config_class())
    return {"name": name} | ({"steps": 4, "contexts": 1} if "steps" in options else {})


def test_all_of_them_are_here():
    assert {"wise", "mask_none", "grace", "ft_layer", "lora_edit", "memit", "in_context"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_it_saves_loads_goes_on_and_takes_back(name, tiny_llama, tmp_path):
    editor = clkit.Editor.load(tiny_llama, section(name), device="cpu", prompt="plain")
    plain = answers(editor)
    made = editor.edit(requests(0, 1))
    assert [e["id"] for e in made] == ["e0", "e1"]
    assert sorted(i for ids in editor.memories().values() for i in ids) == ["e0", "e1"]
    editor.save(tmp_path / "saved")
    loaded = clkit.Editor.load(tmp_path / "saved", device="cpu", prompt="plain")
    assert same(answers(editor), answers(loaded)) and not same(answers(editor), plain)
    assert isinstance(editor.generate("Town of 0?", 3), str)
    assert editor.explain("Town of 0?").nearest[0][0] == "e0"
    for each in (editor, loaded):
        each.edit(requests(2))
        each.rollback("e1")
    assert same(answers(editor), answers(loaded))
    for i in ("e0", "e2"):
        editor.rollback(i)
    assert same(answers(editor), plain) and not editor.memories()


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_as_ever_in_a_server_s_modes(name, tiny_llama, tmp_path):
    plain = clkit.Editor.load(tiny_llama, section(name), device="cpu", prompt="plain")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        served = clkit.Editor.load(tiny_llama, section(name), device="cpu", prompt="plain", directory=tmp_path / "kept")
        served.edit(requests(0))
        served.explain("Town of 0?")
        served.edit(requests(1, 2))
        served.rollback("e1")
        served = clkit.Editor.load(tmp_path / "kept", device="cpu")
        served.explain("Town of 0?")
        served.edit(requests(3))
    plain.edit(requests(0, 1, 2))
    plain.rollback("e1")
    plain.edit(requests(3))
    assert same(answers(served), answers(plain))


@pytest.mark.parametrize("name", METHODS)
def test_the_type_that_torch_makes_tensors_of_does_not_matter(name, tiny_llama, tmp_path):
    editor = clkit.Editor.load(tiny_llama, section(name), device="cpu", prompt="plain")
    editor.edit(requests(0, 1))
    editor.save(tmp_path / "saved")
    other = clkit.Editor.load(tiny_llama, section(name), device="cpu", prompt="plain")
    other.strategy.detach()
    record = EditRecord("Town of 2?", "a", "e2")
    torch.set_default_dtype(torch.bfloat16)
    try:
        attached = attach(other.model.module, tmp_path / "saved")
        again = answers(other)
        attached.learn(record)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(again, answers(editor))
    editor.strategy.learn(record)
    assert same(answers(other), answers(editor))


@pytest.mark.parametrize("name", ["grace", "in_context", "memit"])
def test_the_newest_of_two_answers_to_one_prompt_holds(name, tiny_llama, tmp_path):
    """As in a run whose later task corrects what an earlier one taught; the Editor itself would refuse or replace."""
    editor = clkit.Editor.load(tiny_llama, section(name), device="cpu", prompt="plain")
    first, second = (EditRecord("Town of 0?", target, f"of {target}") for target in "ab")
    for record in (first, EditRecord("Sum of 1 and 2?", "c", "other"), second):
        editor.strategy.learn(record)
        editor.records[record.id] = record
    if name in ("grace", "in_context"):
        assert editor.explain("Town of 0?").memory.endswith("-of b")
    editor.save(tmp_path / "saved")
    assert same(answers(clkit.Editor.load(tmp_path / "saved", device="cpu", prompt="plain")), answers(editor))
    if name == "memit":
        alone = clkit.Editor.load(tiny_llama, section(name), device="cpu", prompt="plain")
        alone.edit([EditRecord("Sum of 1 and 2?", "c", "other"), second])
        assert same(answers(alone), answers(editor))
        editor.rollback("of b")
        assert not same(answers(alone), answers(editor)) and list(editor.records) == ["of a", "other"]


@pytest.mark.parametrize("name", METHODS)
def test_a_deep_copy_runs_its_own_weights(name, tiny_llama):
    editor = clkit.Editor.load(tiny_llama, section(name), device="cpu", prompt="plain")
    editor.edit(requests(0, 1))
    model = editor.model.module
    changed = copy.deepcopy(model)
    ids = torch.tensor([editor.model.tokenizer(PROMPTS[0]).input_ids])
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(changed.generate(ids, **settings), model.generate(ids, **settings))
    with torch.inference_mode():
        changed.lm_head.weight.zero_()
        changed.get_decoder().norm.weight.zero_()
        assert not changed(ids).logits.any()
    written = changed.generate(ids, **settings)
    assert not torch.equal(written, model.generate(ids, **settings)) and not written[0, -3:].any()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "in_context"])
def test_an_adapter_that_is_unloaded_under_the_edits_does_not_take_them_along_silently(name, tiny_llama, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    editor = clkit.Editor.load(tiny_llama, section(name), device="cpu", prompt="plain")
    editor.edit(requests(0, 1))
    editor.save(tmp_path / "saved")
    ids = torch.tensor([editor.model.tokenizer(PROMPTS[0]).input_ids])
    every = LoraConfig(r=2, target_modules="all-linear")  # changes nothing: B is zero
    with torch.inference_mode():
        expected = editor.model.module(ids).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
        strategy = clkit.editing.attach(base, tmp_path / "saved")
        above = get_peft_model(base, every).eval().merge_and_unload()
        torch.testing.assert_close(above(ids).logits, expected, rtol=0, atol=1e-5)
        strategy.detach()
        wrapped = get_peft_model(base, every).eval()
        strategy = clkit.editing.attach(wrapped, tmp_path / "saved")
        torch.testing.assert_close(wrapped(ids).logits, expected, rtol=0, atol=1e-5)
        merged = wrapped.merge_and_unload()
        with pytest.raises(CapabilityError, match="adapter that was merged or unloaded"):
            merged(ids)
        strategy.detach()
        assert not torch.allclose(merged(ids).logits, expected, rtol=0, atol=1e-5)
        clkit.editing.attach(merged, tmp_path / "saved", check=False)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_model_answers_with_the_edits(name, tiny_llama):
    editor = clkit.Editor.load(tiny_llama, section(name), device="cpu", prompt="plain")
    plain = answers(editor)
    editor.edit(requests(0, 1, 2))
    edited, model = answers(editor), editor.model.module
    assert not same(edited, plain)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")  # the graph is made, and run as it is
    for prompt, expected in zip(PROMPTS, edited, strict=True):
        ids = torch.tensor([editor.model.tokenizer(prompt).input_ids])
        with torch.inference_mode():
            torch.testing.assert_close(compiled(ids).logits, expected, rtol=0, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("name", METHODS)
def test_what_is_asked_about_is_not_kept(name, tiny_llama):
    editor = clkit.Editor.load(tiny_llama, section(name), device="cpu", prompt="plain")
    editor.edit(requests(0, 1))
    sizes = []
    for i in range(8):
        editor.explain(f"Nobody's {i} question?")
        gc.collect()
        sizes.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
    assert len(set(sizes[2:])) == 1


@pytest.mark.parametrize("name", METHODS)
def test_the_command_line_knows_it(name, tiny_llama, tmp_path, capsys):
    file = tmp_path / "edits.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": r.prompt, "target_new": r.target_new}) + "\n" for r in requests(0, 1))
    )
    options = [f"{k}={v}" for k, v in section(name).items() if k != "name"]
    arguments = ["edit", "--model", str(tiny_llama), "--requests", str(file), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--strategy", name, "--device", "cpu", *(["--set", *options] if options else [])]) == 0
    assert "2 active edits" in capsys.readouterr().out
