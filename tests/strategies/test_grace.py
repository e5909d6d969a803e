"""GRACE's codebook: when keys are made, grown and split, what is answered, and what is left alone bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from wise_models import logits, record, tiny

from clkit.evaluation.base import evaluation_mode
from clkit.models.encoded_text import EncodedText
from clkit.models.routing import CACHES, marking_prompt
from clkit.strategies.grace.codebook import LEAST_RADIUS, Codebook, admit, distances, unit
from clkit.strategies.grace.strategy import Grace, GraceConfig
from clkit.tasks.base import TextRecord

RECORDS = {f"e{i}": record(i, target_new="TU"[i % 2]) for i in range(4)}


def at(degrees: float) -> torch.Tensor:
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angle.cos(), angle.sin()])


def gap(degrees: float) -> float:
    return 2 * float(torch.deg2rad(torch.tensor(degrees / 2)).sin())


def book(*edits, radius=0.3):
    entries = []
    for i, (degrees, target) in enumerate(edits):
        entries, _ = admit(entries, f"e{i}", at(degrees), target, radius)
    return entries


def grace(*ids, **options):
    strategy = Grace(GraceConfig(**({"layer": "1", "steps": 20, "radius": 0.05} | options)))
    strategy.attach(tiny(), 0)
    for i in ids:
        strategy.learn(RECORDS[i])
    return strategy


# --- the rules --------------------------------------------------------------------------------------------------------
def test_a_far_key_is_an_entry_of_its_own():
    entries = book((0, "a"), (90, "b"))
    assert [(e.edits, e.radius) for e in entries] == [(("e0",), 0.3), (("e1",), 0.3)]


def test_a_near_key_with_the_same_target_grows_the_entry():
    (entry,) = book((0, "a"), (30, "a"))
    assert entry.edits == ("e0", "e1") and entry.radius == pytest.approx(gap(30), abs=1e-6)
    (entry,) = book((0, "a"), (5, "a"))
    assert entry.radius == 0.3, "what is covered already grows nothing"
    assert len(book((0, "a"), (40, "a"))) == 2, "further than both radii together"


def test_a_near_key_with_another_target_splits_the_space_between_them():
    first, second = book((0, "a"), (30, "b"))
    assert first.radius == second.radius == pytest.approx(gap(30) / 2, abs=1e-6)
    assert first.edits == ("e0",) and second.edits == ("e1",)


def test_a_split_never_widens():
    grown = book((0, "a"), (34, "a"), (-34, "b"))
    assert [e.radius for e in grown] == pytest.approx([gap(34) / 2] * 2, abs=1e-6)
    narrow = book((0, "a"), (10, "b"), (-19, "c"))
    assert narrow[0].radius == pytest.approx(gap(10) / 2, abs=1e-6), "half of the larger distance would be more"


def test_the_newest_of_two_equal_keys_answers():
    entries = book((0, "a"), (0, "b"))
    assert [e.radius for e in entries] == [LEAST_RADIUS] * 2
    made = Codebook(torch.stack([e.key for e in entries]), torch.zeros(2, 2), torch.tensor([LEAST_RADIUS] * 2))
    assert made.find(made.gaps(torch.stack([3 * at(0), at(1)]))) == [1, -1]


def test_distances_are_exact_at_zero():
    keys = unit(torch.randn(5, 40, generator=torch.Generator().manual_seed(0)))
    assert distances(keys, keys).diagonal().tolist() == [0.0] * 5


# --- the model --------------------------------------------------------------------------------------------------------
def test_an_edit_is_learned_and_other_prompts_are_not_touched():
    strategy = grace(steps=150, eos=False)
    before = logits(strategy.model, "Town of 1? ")[-1].log_softmax(-1)
    outcome = strategy.learn(RECORDS["e1"])
    after = logits(strategy.model, "Town of 1? ")
    target = strategy.model.tokenizer("U").input_ids[0]
    assert outcome.losses["target"] < -float(before[target])
    assert int(after[-1].argmax()) == target
    plain = tiny()
    for prompt in ("Sum of 2?", "anything else", "Town of 1"):
        assert strategy.explain(prompt).memory is None
        assert torch.equal(logits(strategy.model, prompt), logits(plain, prompt))


def test_before_the_last_token_of_the_prompt_nothing_changes():
    strategy = grace("e0")
    ours, plain = logits(strategy.model, "Town of 0? "), logits(tiny(), "Town of 0? ")
    assert torch.equal(ours[:-1], plain[:-1]) and not torch.equal(ours[-1], plain[-1])


def test_generation_with_and_without_a_cache_and_teacher_forcing_agree():
    strategy = grace("e0", "e1", steps=40)
    model = strategy.model
    ids = torch.tensor([model.tokenizer("Town of 0? ").input_ids])
    lm, settings = model.module, {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    mask = torch.ones_like(ids)
    written = lm.generate(input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(written, lm.generate(input_ids=ids, attention_mask=mask, use_cache=False, **settings))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    left = torch.cat([torch.zeros(1, 5, dtype=torch.long), mask], 1)
    assert torch.equal(lm.generate(input_ids=padded, attention_mask=left, **settings)[:, 5:], written)
    prompt = torch.zeros_like(written, dtype=torch.bool)
    prompt[:, : ids.shape[1]] = True
    with torch.inference_mode(), marking_prompt(prompt):
        forced = lm(input_ids=written).logits.argmax(-1)
    start = ids.shape[1]
    # An end token is never written here (min_new_tokens), so compare where it is not the most likely one.
    for ours, theirs in zip(written[0, start:].tolist(), forced[0, start - 1 : -1].tolist(), strict=True):
        assert ours == theirs or theirs == model.form.eos


def test_a_prompt_in_pieces_or_with_its_beginning_in_a_cache_is_answered_as_a_whole():
    strategy = grace("e0", "e1", steps=40)
    model, lm = strategy.model, strategy.model.module
    ids = torch.tensor([model.tokenizer("Town of 0? ").input_ids])
    settings = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6, "attention_mask": torch.ones_like(ids)}
    written = lm.generate(input_ids=ids, **settings)
    assert not torch.equal(written, tiny().module.generate(input_ids=ids, **settings))
    assert torch.equal(lm.generate(input_ids=ids, prefill_chunk_size=4, **settings), written)
    with torch.no_grad():
        prefix = lm(input_ids=ids[:, :4], use_cache=True)
    name = next(n for n in CACHES if n in prefix)
    assert torch.equal(lm.generate(input_ids=ids, **settings, **{name: prefix[name]}), written)


def test_a_batch_is_answered_row_by_row():
    strategy = grace("e0")
    rows = [TextRecord(p, "T", str(i)) for i, p in enumerate(("Town of 0?", "Something else entirely"))]
    encoded = EncodedText(rows, strategy.model.form, 200)
    with evaluation_mode(strategy.model):
        batch = encoded.batch(torch.arange(2))
        prompt = (batch.labels == -100) & batch.inputs["attention_mask"].bool()
        with marking_prompt(prompt):
            ours = strategy.model.module(**batch.inputs).logits
        with strategy.unedited():
            plain = strategy.model.module(**batch.inputs).logits
    assert not torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])


def test_a_sequence_in_a_cache_whose_entry_is_taken_out_is_answered_by_no_other():
    strategy = grace("e0", "e1", "e3")
    assert [e.edits for e in strategy.entries] == [("e0",), ("e1",), ("e3",)]
    lm, tokenizer = strategy.model.module, strategy.model.tokenizer

    def begun(prompt):
        with torch.no_grad():
            out = lm(input_ids=torch.tensor([tokenizer(prompt).input_ids]), use_cache=True)
        name = next(n for n in CACHES if n in out)
        return {name: out[name]}

    caches = [begun(RECORDS[i].prompt + " ") for i in ("e0", "e1", "e3")]
    strategy.forget(["e1"], RECORDS)
    token = torch.tensor([tokenizer("a").input_ids[:1]])
    with torch.no_grad():
        mine, gone, last = (lm(input_ids=token, use_cache=True, **copy.deepcopy(cache)).logits for cache in caches)
        with strategy.unedited():
            bare, plain, third = (lm(input_ids=token, use_cache=True, **cache).logits for cache in caches)
    assert torch.equal(gone, plain) and not torch.equal(mine, bare) and not torch.equal(last, third)


# --- taking edits out -------------------------------------------------------------------------------------------------
def test_forgetting_restores_split_radii_and_learns_nothing_anew():
    strategy = grace("e0", "e1", radius=0.4)
    split = [e.radius for e in strategy.entries]
    assert max(split) < 0.4
    assert strategy.forget(["e1"], RECORDS) == []
    alone = grace("e0", radius=0.4)
    assert [e.radius for e in strategy.entries] == [0.4]
    assert torch.equal(strategy.entries[0].value, alone.entries[0].value)


def test_an_entry_that_loses_an_edit_is_learned_again_from_the_others():
    strategy = grace("e0", "e2", radius=2.0)  # one entry: both say T
    assert strategy.holdings() == {"key-e0": ["e0", "e2"]}
    assert strategy.forget(["e0"], RECORDS) == ["e2"]
    alone = grace("e2", radius=2.0)
    assert strategy.holdings() == {"key-e2": ["e2"]}
    assert torch.equal(strategy.entries[0].value, alone.entries[0].value)
    strategy.forget(["e2"], RECORDS)
    assert torch.equal(logits(strategy.model, "Town of 2?"), logits(tiny(), "Town of 2?"))
