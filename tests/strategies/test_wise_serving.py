"""However ``generate`` computes its input, each call is routed once, on its whole input and on nothing else."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers import DynamicCache
from wise_models import edited, tiny

from clkit.editing.rows import prompt_ids
from clkit.errors import CapabilityError
from clkit.models.routing import CACHES, marking_prompt
from clkit.strategies.wise.core import Wise

# The first and the last look like edits; "abab" lets prompt lookup guess an answer before the first pass.
PROMPTS = ("Town of 0?", "An entirely different matter", "abab abab abab abab", "Town of 2?")
CACHE = next(name for name in CACHES if name in inspect.signature(type(tiny().module).forward).parameters)
SETTINGS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def wise():
    made = edited(3, likeness=0.55)
    for memory in made.layer.all():
        memory.threshold = 0.0  # by its score it would answer everything: likeness decides
    return made


def tokens(wise, text):
    return torch.tensor(prompt_ids(wise.model.form, [text], wise.model.max_length))


def write(wise, ids, pads=0, **settings):
    """What is written after a prompt, and how that was decided."""
    wise.router.last = []
    padded = torch.cat([torch.zeros(1, pads, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, pads, dtype=torch.long), torch.ones_like(ids)], 1)
    out = wise.model.module.generate(input_ids=padded, attention_mask=mask, **SETTINGS | settings)
    (decision,) = wise.router.last
    return out[:, padded.shape[1] :], decision


def equal(found, expected):
    assert found.memory == expected.memory
    assert found.scores == pytest.approx(expected.scores, rel=1e-3)
    assert found.likeness == pytest.approx(expected.likeness, abs=1e-3)


@pytest.fixture(scope="module")
def plain(wise):
    found = {text: write(wise, tokens(wise, text)) for text in PROMPTS}
    assert len({decision.memory for _, decision in found.values()}) == 3, "two memories and none"
    return found


@pytest.mark.parametrize(
    ("settings", "pads"),
    [
        ({"prefill_chunk_size": 4}, 0),
        ({"prefill_chunk_size": 4}, 7),
        ({"cache_implementation": "static"}, 0),
        ({"cache_implementation": "static"}, 7),
        ({"prompt_lookup_num_tokens": 3}, 0),  # not padded: transformers looks padding up too
    ],
)
@pytest.mark.parametrize("text", PROMPTS)
def test_routes_and_answers_are_those_of_plain_generation(wise, plain, text, settings, pads):
    answer, decision = write(wise, tokens(wise, text), pads, **settings)
    equal(decision, plain[text][1])
    assert torch.equal(answer, plain[text][0])


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("text", PROMPTS)
def test_a_prompt_whose_beginning_is_in_a_cache_is_routed_as_a_whole(wise, plain, text, by_hand):
    ids = tokens(wise, text)
    cache = DynamicCache(config=wise.model.module.config)
    if by_hand:
        with torch.no_grad():
            wise.model.module(input_ids=ids[:, :5], use_cache=True, **{CACHE: cache})
    else:
        write(wise, ids[:, :2], **{CACHE: cache, "max_new_tokens": 4})
        cache.crop(2 - cache.get_seq_length())
    for begun in (copy.deepcopy(cache), copy.deepcopy(cache)):  # one prefix for many prompts
        _, decision = write(wise, ids, **{CACHE: begun})
        if by_hand:
            equal(decision, plain[text][1])
        else:  # what was cut off a cache is not known: only the last token and those after the cut count
            assert decision.scores == pytest.approx(plain[text][1].scores, rel=1e-3)


def test_a_further_turn_is_a_prompt_of_its_own(wise):
    cache = DynamicCache(config=wise.model.module.config)
    first = tokens(wise, "Town of 0?")
    answer, decision = write(wise, first, **{CACHE: cache})
    assert decision.memory is not None
    turn = torch.cat([first, answer, tokens(wise, " Town of 2?")], 1)
    _, further = write(wise, turn, **{CACHE: cache})
    _, alone = write(wise, turn)
    assert alone.memory not in (None, decision.memory)
    equal(further, alone)


def test_a_prefix_from_before_the_edits_still_lets_the_prompt_be_routed(wise, plain):
    with torch.no_grad(), wise.unedited():
        ids = tokens(wise, PROMPTS[0])
        prefix = wise.model.module(input_ids=ids[:, :2], use_cache=True)
    answer, decision = write(wise, ids, **{CACHE: prefix[CACHE]})
    assert decision.memory == plain[PROMPTS[0]][1].memory
    assert torch.equal(answer, plain[PROMPTS[0]][0])


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_tokens_that_an_adapter_puts_before_the_prompt_belong_to_it(wise, kind):
    import peft

    model = tiny()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        adapter = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
        wrapped = peft.get_peft_model(model.module, adapter).eval()
    other = Wise(model, wise.config)
    other.load_state_dict(wise.state_dict())
    ids, counted = tokens(wise, PROMPTS[0]), []
    plain = other.router.read
    other.router.read = lambda x, mask: (
        counted.append(x.shape[1] if mask is None else int(mask.sum())) or plain(x, mask)
    )
    # Without a cache: peft 0.21 does not know the name that transformers 5.23 gave it.
    wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **SETTINGS | {"use_cache": False})
    assert set(counted) == {ids.shape[1] + 4}, "decided once, on all of it"


def test_rows_of_a_cache_that_is_repeated_keep_the_decision(wise, plain):
    ids = torch.cat([tokens(wise, PROMPTS[k]) for k in (0, 3)])
    cache = DynamicCache(config=wise.model.module.config)
    options = torch.tensor([[40], [50], [60]] * 2)
    with torch.no_grad():
        wise.model.module(input_ids=ids, use_cache=True, **{CACHE: cache})
        decided = wise.router.last
        assert [d.memory for d in decided] == [plain[PROMPTS[k]][1].memory for k in (0, 3)]
        cache.batch_repeat_interleave(3)
        found = wise.model.module(input_ids=options, **{CACHE: cache}).logits[:, -1]
        assert wise.router.last is decided
        whole = torch.cat([ids.repeat_interleave(3, 0), options], 1)
        with marking_prompt(torch.arange(whole.shape[1]).expand(6, -1) < ids.shape[1]):
            expected = wise.model.module(input_ids=whole).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_several_sequences_in_one_row_are_refused(wise):
    ids = torch.cat([tokens(wise, PROMPTS[0]), tokens(wise, PROMPTS[1])], 1)
    ends = torch.tensor([0, tokens(wise, PROMPTS[0]).shape[1], ids.shape[1]])
    with pytest.raises(CapabilityError, match="several sequences in one row"):
        wise.model.module(input_ids=ids, cu_seq_lens_q=ends)
    tiny().module(input_ids=ids, cu_seq_lens_q=ends)  # the model itself does not mind


def test_sequences_that_are_told_apart_by_their_positions_are_refused(wise):
    from transformers import DataCollatorWithFlattening

    rows = [{"input_ids": tokens(wise, PROMPTS[k])[0].tolist()} for k in (0, 1)]
    batch = DataCollatorWithFlattening(return_position_ids=True)(rows, return_tensors="pt")
    packed = {name: batch[name] for name in ("input_ids", "position_ids")} | {"use_cache": False}
    with pytest.raises(CapabilityError, match="several sequences in one row"):
        wise.model.module(**packed)
    found = tiny().module(**packed).logits  # the model itself reads two
    first = tokens(wise, PROMPTS[0]).shape[1]
    torch.testing.assert_close(found[:, first:], tiny().module(tokens(wise, PROMPTS[1])).logits, rtol=0, atol=1e-4)
    ids = tokens(wise, PROMPTS[0])
    wise.model.module(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None])
