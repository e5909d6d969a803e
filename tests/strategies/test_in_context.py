"""Retrieval in context: the nearest edit is told before the prompt, in any kind of forward pass; else nothing changes."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import DynamicCache
from wise_models import logits, record, tiny

from clkit.editing.judging import judge
from clkit.editing.prefix import position_ids
from clkit.errors import CapabilityError, RequestError
from clkit.evaluation.packing import rowwise_logliks, why_not_packed
from clkit.models.routing import CACHES
from clkit.strategies.in_context.strategy import InContext, InContextConfig
from clkit.strategies.in_context.widening import Insertion, Widening

TOLD = "New fact: Town of 0? T0x\nPrompt: "


@pytest.fixture
def told():
    strategy = InContext(InContextConfig(layer="1", similarity=0.995))
    strategy.attach(tiny(), 0)
    strategy.learn(record(0))
    return strategy


def encode(model, texts):
    ids = [model.tokenizer(t).input_ids for t in texts]
    width = max(map(len, ids))
    rows = torch.tensor([[0] * (width - len(r)) + r for r in ids])
    return rows, torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in ids])


def test_columns_are_inserted_and_taken_out_again():
    wide = Widening([Insertion("a", 2, (7, 8)), Insertion(None, 0, ()), Insertion("b", 1, (9,))], torch.device("cpu"))
    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [0, 1, 2]])
    assert wide.ids(ids, 0).tolist() == [[1, 2, 7, 8, 3], [0, 0, 4, 5, 6], [0, 0, 9, 1, 2]]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    assert wide.mask(mask).tolist() == [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    wide_ids = wide.ids(ids, 0)[..., None]
    assert torch.equal(wide.narrowed(wide_ids)[..., 0], ids)


def test_the_model_answers_as_if_the_statement_stood_before_the_prompt(told):
    ours, plain = logits(told.model, "Town of 0? "), logits(tiny(), TOLD + "Town of 0? ")
    torch.testing.assert_close(ours, plain[-len(ours) :], rtol=0, atol=1e-4)
    assert told.explain("Town of 0?").memory == "statement-e0"


def test_other_prompts_are_not_touched(told):
    for prompt in ("Sum of 2?", "anything else"):
        assert told.explain(prompt).memory is None
        assert torch.equal(logits(told.model, prompt), logits(tiny(), prompt))


def test_what_it_writes_is_the_same_with_a_cache_without_and_in_a_batch(told):
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    plain = tiny().module
    ids, mask = encode(told.model, [TOLD + "Town of 0? "])
    wanted = plain.generate(input_ids=ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    ids, mask = encode(told.model, ["Town of 0? "])
    for use_cache in (True, False):
        out = told.model.module.generate(input_ids=ids, attention_mask=mask, use_cache=use_cache, **settings)
        assert torch.equal(out[:, ids.shape[1] :], wanted)
    ids, mask = encode(told.model, ["Town of 0? ", "Something else entirely"])
    out = told.model.module.generate(input_ids=ids, attention_mask=mask, **settings)
    other, other_mask = encode(told.model, ["Something else entirely"])
    second = plain.generate(input_ids=other, attention_mask=other_mask, **settings)
    assert torch.equal(out[:1, ids.shape[1] :], wanted)
    assert torch.equal(out[1:, ids.shape[1] :], second[:, other.shape[1] :])


def test_a_cache_that_was_begun_without_a_statement_stays_without_and_one_with_it_ends_there(told):
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ids, mask = encode(told.model, ["Town of 0? "])
    wanted = tiny().module.generate(input_ids=ids, attention_mask=mask, **settings)
    out = told.model.module.generate(input_ids=ids, attention_mask=mask, prefill_chunk_size=4, **settings)
    assert torch.equal(out, wanted), "nothing can be told before the prompt is known"
    name = next(n for n in CACHES if n in inspect.signature(type(told.model.module).forward).parameters)
    cache = DynamicCache(config=told.model.module.config)
    out = told.model.module.generate(input_ids=ids, attention_mask=mask, **settings, **{name: cache})
    with pytest.raises(CapabilityError, match="the whole conversation without a cache"):
        told.model.module.generate(input_ids=out, attention_mask=torch.ones_like(out), **settings, **{name: cache})


def test_a_padded_row_is_told_after_its_padding(told):
    ids, mask = encode(told.model, ["Town of 0? ", "Something else entirely"])
    with torch.inference_mode():
        ours = told.model.module(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits
    torch.testing.assert_close(ours[0, -1], logits(told.model, "Town of 0? ")[-1], rtol=0, atol=1e-4)


def test_the_statement_stands_inside_the_chat_template():
    from clkit.models.causal_lm import CausalLM

    plain = tiny()
    plain.tokenizer.chat_template = (
        "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    model = CausalLM("chat", plain.module, plain.tokenizer, prompt="chat", max_length=200)
    wanted = logits(tiny(), f"<u>{TOLD}Town of 0?</u><a>")[-1]
    strategy = InContext(InContextConfig(layer="1", similarity=0.9999))
    strategy.attach(model, 0)
    strategy.learn(record(0))
    torch.testing.assert_close(logits(model, "<u>Town of 0?</u><a>")[-1], wanted, rtol=0, atol=1e-4)


def test_options_are_scored_a_row_each_behind_what_is_told(told):
    module = told.model.module
    assert why_not_packed(module, 10) == "edits on the model put text before the prompt"
    encode = told.model.tokenizer
    options = [encode(o).input_ids for o in ("T0x", "Sum")]
    ours = rowwise_logliks(module, [encode("Town of 0? ").input_ids], [options])
    plain = rowwise_logliks(tiny().module, [encode(TOLD + "Town of 0? ").input_ids], [options])
    assert ours[0] == pytest.approx(plain[0], abs=1e-4)
    told.detach()
    assert why_not_packed(module, 10) is None


def test_forgetting_and_detaching_leave_the_model_alone(told):
    told.forget(["e0"], {})
    assert told.holdings() == {}
    assert torch.equal(logits(told.model, "Town of 0?"), logits(tiny(), "Town of 0?"))
    told.learn(record(0))
    told.detach()
    assert "forward" not in told.location.decoder.__dict__ and "generate" not in told.location.lm.__dict__
    assert torch.equal(logits(told.model, "Town of 0?"), logits(tiny(), "Town of 0?"))


def test_an_edit_that_the_model_could_not_read_behind_its_statement_is_refused():
    strategy = InContext(InContextConfig(layer="1"))
    strategy.attach(tiny("gpt2"), 0)  # reads 256 tokens
    fits, not_any_more = record(0, target_new="x" * 107), record(1, target_new="x" * 108)
    with pytest.raises(RequestError, match="takes 138 tokens, its prompt with the target 120, .* reads 256"):
        strategy.learn(not_any_more)
    assert strategy.holdings() == {}
    strategy.learn(fits)
    scores, routes = judge(strategy, strategy.model, fits)
    assert routes["prompt"]["memory"] == "statement-e0" and set(scores) == {"prompt"}


def test_several_sequences_in_one_row_are_refused(told):
    ids, _ = encode(told.model, ["Town of 0? "])
    with pytest.raises(CapabilityError, match="several sequences in one row"):
        told.model.module(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 3, ids.shape[1]]))


def test_embeddings_are_refused(told):
    embedded = torch.zeros(1, 3, 32)
    with pytest.raises(CapabilityError, match="in_context.*reads token ids"):
        told.model.module(inputs_embeds=embedded)
