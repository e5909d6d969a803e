"""A sequence is routed once, on its prompt: alone, padded, in a batch, with and without a cache, while it is written."""

from __future__ import annotations

import pytest
import torch
from wise_models import edited, quick, record, tiny

from clkit.editing.prefix import position_ids
from clkit.errors import RequestError
from clkit.evaluation.packing import packed_logliks, rowwise_logliks
from clkit.models.routing import marking_prompt
from clkit.strategies.wise.core import Wise
from clkit.strategies.wise.side_memory import SideMemory

PROMPTS = ["Town of 0?", "Town of 1?", "Something else entirely", "Sum of 2?", "ab", "Town of 2?"]


@pytest.fixture(scope="module")
def wise():
    made = Wise(tiny(), quick())
    generator = torch.Generator().manual_seed(3)
    made.layer.put([SideMemory([(n, [])], 0.05 * torch.randn(32, 48, generator=generator), 0.0) for n in range(2)])
    a, b = made.layer.all()
    scores = torch.tensor([[own_scores(made, text)[m.name] for m in (a, b)] for text in PROMPTS])
    # Sizes and thresholds that lie between the prompts' scores: every route is taken, with room for rounding.
    ratio = (scores[:, 0] / scores[:, 1]).sort().values
    b.matrix = b.matrix * (ratio[2] + ratio[3]) / 2
    best = torch.maximum(scores[:, 0], scores[:, 1] * (ratio[2] + ratio[3]) / 2).sort().values
    a.threshold = b.threshold = float(best[1] + best[2]) / 2 / made.router.slack
    return made


def encode(wise, texts, width=None):
    ids = [wise.model.tokenizer(t).input_ids for t in texts]
    width = width or max(map(len, ids))
    return (
        torch.tensor([[0] * (width - len(row)) + row for row in ids]),
        torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
    )


def own_scores(wise, text):
    ids, mask = encode(wise, [text])
    with torch.inference_mode():
        wise.model.module(input_ids=ids, attention_mask=mask)
    return wise.router.last[0].scores


def routes(wise, texts, width=None):
    ids, mask = encode(wise, texts, width)
    with torch.inference_mode():
        out = wise.model.module(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask))
    return [d.memory for d in wise.router.last], out.logits[:, -1]


def test_the_prompts_take_different_routes(wise):
    alone = [routes(wise, [text])[0][0] for text in PROMPTS]
    assert len(set(alone)) == 3 and None in alone


def test_alone_padded_and_in_a_batch_are_the_same(wise):
    alone = [routes(wise, [text]) for text in PROMPTS]
    for text, (route, scores) in zip(PROMPTS, alone, strict=True):
        padded, padded_scores = routes(wise, [text], width=60)
        assert padded == route
        torch.testing.assert_close(padded_scores, scores, rtol=0, atol=1e-4)
    together, scores = routes(wise, PROMPTS)
    assert together == [route[0] for route, _ in alone]
    torch.testing.assert_close(scores, torch.cat([s for _, s in alone]), rtol=0, atol=1e-4)


def test_right_padding_is_no_part_of_the_prompt_either(wise):
    for text in PROMPTS:
        ids, mask = encode(wise, [text])
        pads = torch.zeros(1, 9, dtype=torch.long)
        with torch.inference_mode():
            wise.model.module(input_ids=torch.cat([ids, pads], 1), attention_mask=torch.cat([mask, pads], 1))
        right = [d.memory for d in wise.router.last]
        assert right == routes(wise, [text])[0]


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_routes_once_with_and_without_cache(wise, beams, monkeypatch):
    expected = [routes(wise, [text])[0][0] for text in PROMPTS]
    ids, mask = encode(wise, PROMPTS)
    counted = []
    plain = wise.router.statistic
    monkeypatch.setattr(wise.router, "statistic", lambda *a: counted.append(1) or plain(*a))
    texts = []
    for cache in (True, False):
        counted.clear()
        out = wise.model.module.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False, use_cache=cache, num_beams=beams,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        assert len(counted) == len(wise.layer)  # one scoring of each memory, at the prompt
        assert [d.memory for d in wise.router.last][::beams] == expected
        texts.append(out)
    assert torch.equal(texts[0], texts[1])
    for row, text in zip(texts[0], PROMPTS, strict=True):
        ids, mask = encode(wise, [text])
        alone = wise.model.module.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False, num_beams=beams, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        assert torch.equal(alone[0, ids.shape[1] :], row[-20:])


def test_a_cache_passed_by_hand_keeps_the_decision(wise):
    text = next(t for t in PROMPTS if routes(wise, [t])[0][0] is not None)
    ids, mask = encode(wise, [text])
    with torch.inference_mode():
        first = wise.model.module(input_ids=ids, attention_mask=mask, use_cache=True)
        decided = wise.router.last
        token = first.logits[:, -1:].argmax(-1)
        name = next(n for n in ("cache", "past_key_values") if n in first)  # transformers 5.23 renamed it
        kept = wise.model.module(input_ids=token, use_cache=True, **{name: first[name]}).logits
        assert wise.router.last is decided
        whole = torch.cat([ids, token], 1)
        with marking_prompt(torch.arange(whole.shape[1])[None] < ids.shape[1]):
            expected = wise.model.module(input_ids=whole).logits[:, -1:]
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-4)


def test_an_answer_in_the_same_pass_does_not_count_when_the_prompt_is_marked(wise):
    for text in PROMPTS:
        ids, mask = encode(wise, [text + " answers of any length, to be ignored"])
        size = len(wise.model.tokenizer(text).input_ids)
        with torch.inference_mode(), marking_prompt(torch.arange(ids.shape[1])[None] < size):
            wise.model.module(input_ids=ids, attention_mask=mask)
        (decision,) = wise.router.last
        assert decision.scores == pytest.approx(own_scores(wise, text), rel=1e-5)


def test_the_decision_is_readable(wise):
    names = [m.name for m in wise.layer.all()]
    assert names == ["shard-0", "shard-1"]
    route, _ = routes(wise, PROMPTS[:1])
    (decision,) = wise.router.last
    assert list(decision.scores) == list(decision.thresholds) == names
    passing = {n: s for n, s in decision.scores.items() if s > decision.thresholds[n]}
    assert route[0] == decision.memory == (max(passing, key=passing.get) if passing else None)


def test_the_decision_can_be_overridden(wise):
    plain = tiny().module
    ids, mask = encode(wise, PROMPTS[:2])
    with torch.inference_mode():
        base = plain(input_ids=ids, attention_mask=mask).logits
        with wise.router.forced(None):
            assert torch.equal(wise.model.module(input_ids=ids, attention_mask=mask).logits, base)
        answers = {}
        for memory in wise.layer.all():
            with wise.router.forced(memory.name):
                answers[memory.name] = wise.model.module(input_ids=ids, attention_mask=mask).logits
            assert not torch.equal(answers[memory.name], base)
        assert not torch.equal(*answers.values())
    with (
        pytest.raises(RequestError, match="no memory 'shard-9'.*There are: shard-0, shard-1"),
        wise.router.forced("shard-9"),
    ):
        wise.model.module(input_ids=ids, attention_mask=mask)


def test_a_sequence_that_no_memory_answers_is_bit_for_bit_the_unedited_model(wise):
    plain = tiny().module
    untouched = [t for t in PROMPTS if routes(wise, [t])[0] == [None]]
    assert untouched
    for text in untouched:
        ids, _ = encode(wise, [text])
        with torch.inference_mode():
            assert torch.equal(wise.model.module(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_scoring_never_merges_nor_moves_a_threshold():
    wise = edited(3, merge_every=0)
    before = [(m.name, m.threshold, m.matrix.clone()) for m in wise.layer.all()]
    for text in PROMPTS:
        routes(wise, [text])
    after = [(m.name, m.threshold, m.matrix) for m in wise.layer.all()]
    assert [b[:2] for b in before] == [a[:2] for a in after]
    assert all(torch.equal(b[2], a[2]) for b, a in zip(before, after, strict=True))


def test_a_weak_live_shard_does_not_veto_another_memory():
    wise = edited(3)
    closed, live = wise.layer.all()
    scores = own_scores(wise, record(0).prompt)
    live.matrix = live.matrix * (2 * scores[closed.name] / scores[live.name])  # scores higher, ...
    live.threshold = 1e9  # ... and does not pass
    closed.threshold = 0.0
    assert routes(wise, [record(0).prompt])[0] == [closed.name]


@pytest.mark.parametrize("logliks", [packed_logliks, rowwise_logliks])
def test_options_are_scored_by_the_memory_that_answers_their_prompt(wise, logliks):
    prompts, _ = zip(*[encode(wise, [text]) for text in PROMPTS], strict=True)
    options = [[[70, 71, 72, 73, 74], [80]]] * len(PROMPTS)
    names = [routes(wise, [text])[0][0] for text in PROMPTS]
    with torch.inference_mode():
        found = logliks(wise.model.module, [p[0].tolist() for p in prompts], options)
        for name, prompt, values in zip(names, prompts, found, strict=True):
            with wise.router.forced(name):
                alone = logliks(wise.model.module, [prompt[0].tolist()], options[:1])[0]
            assert values == pytest.approx(alone, abs=1e-4)
