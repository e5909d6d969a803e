"""WISE learns edits into shards, merges them on schedule, measures thresholds, takes edits out, and saves its state."""

from __future__ import annotations

import math

import pytest
import torch
from wise_models import edited, logits, quick, record, tiny

from clkit.checkpoint import pack, unpack
from clkit.config import ReplayConfig
from clkit.editing import rows
from clkit.editing.contexts import IRRELEVANT
from clkit.errors import ClkitError, NumericalError, RequestError
from clkit.strategies.wise.config import WISEConfig, problems, settled
from clkit.strategies.wise.core import Wise
from clkit.strategies.wise.delta import SparseDelta
from clkit.strategies.wise.masks import shard_mask
from clkit.strategies.wise.optimise import Objective, optimise
from clkit.strategies.wise.protect import Protection

PROMPTS = ("Town of 0?", "Town of 3?", "anything else")


# --- rows -------------------------------------------------------------------------------------------------------------
def test_labels_are_the_target_and_its_end_whatever_is_longest():
    form = tiny().form
    for irrelevant in ("no", "a very long irrelevant prompt, longer than everything else"):
        made = rows.build(form, "Town of 1?", "T1x", ["ab", "cdefg"], [irrelevant], 200, eos=True)
        assert made.edits == 3
        learned = [row[row != -100].tolist() for row in made.labels]
        target = [*form.tokenizer("T1x").input_ids, form.eos]  # of bytes; the space before it ends the prompt
        assert learned == [target, target, target, []]
        assert not bool((made.prompt & (made.labels != -100)).any())
        assert [form.tokenizer.decode(r[p]) for r, p in zip(made.input_ids, made.prompt, strict=True)] == [
            "Town of 1? ", "ab Town of 1? ", "cdefg Town of 1? ", irrelevant + " ",
        ]  # fmt: skip
        assert made.learned.tolist() == [made.input_ids.shape[1] - len(target) - 1 + k for k in range(len(target))]


def test_without_eos_only_the_target_is_learned():
    made = rows.build(tiny().form, "Town of 1?", "T1x", [], ["no"], 200, eos=False)
    assert made.labels[0][made.labels[0] != -100].tolist() == tiny().tokenizer("T1x").input_ids


def test_the_chat_template_is_on_every_row():
    from clkit.models.prompts import PromptFormat

    tokenizer = tiny().tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    made = rows.build(PromptFormat(tokenizer, "auto"), "Town?", "X", ["ab"], ["Sum {of} 2?"], 200, eos=True)
    texts = [tokenizer.decode(r[p]) for r, p in zip(made.input_ids, made.prompt, strict=True)]
    assert texts == ["<u>Town?</u><a>", "<u>ab Town?</u><a>", "<u>Sum {of} 2?</u><a>"]


def test_a_target_that_does_not_fit_is_refused_and_nothing_changes():
    wise = edited(1)
    before = wise.layer.all()[0].matrix.clone()
    with pytest.raises(RequestError, match="takes 301 tokens.*raise model.max_length"):
        wise.learn(record(1, target_new="x" * 300))
    assert torch.equal(wise.layer.all()[0].matrix, before) and wise.layer.all()[0].edits == ["e0"]


# --- learning ---------------------------------------------------------------------------------------------------------
def test_an_edit_is_answered_and_an_irrelevant_prompt_is_not_touched():
    model = tiny()
    before = logits(model, "Sum of 1?")
    wise = Wise(model, quick(steps=120, mask_ratio=0.9, learning_rate=0.3, contexts=0, eos=False))
    outcome = wise.learn(record(1, target_new="T"))
    assert outcome.losses[0][0] > 3 and sum(outcome.losses[-1]) < 2  # final norm and weights allow no certainty
    ids = torch.tensor([model.tokenizer("Town of 1? ").input_ids])
    out = model.module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    assert model.tokenizer.decode(out[0, ids.shape[1] :]) == "T"
    assert wise.router.last[0].memory == "shard-0"
    assert torch.equal(logits(model, "Sum of 1?"), before)


def test_only_entries_of_the_mask_move_and_none_further_than_the_clamp():
    wise = edited(1, clamp=0.01, learning_rate=1.0)
    matrix = wise.layer.all()[0].matrix
    mask = shard_mask((32, 48), 0.2, 0, 0)
    assert not bool(matrix[~mask].any()) and bool(matrix[mask].any())
    unit, squared = wise._units  # the clamp is relative to them
    assert float(matrix.abs().max()) == pytest.approx(0.01 * unit / squared**0.5)


def test_a_loss_that_is_not_finite_is_an_error_and_nothing_changes():
    wise = edited(1)
    before = wise.layer.all()[0].matrix.clone()
    with torch.no_grad():
        wise.model.module.lm_head.weight[0, 0] = math.nan
    with pytest.raises(NumericalError, match="lower strategy.learning_rate"):
        wise.learn(record(1))
    assert torch.equal(wise.layer.all()[0].matrix, before) and wise.layer.all()[0].edits == ["e0"]


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("fails", ["target", "loss"])
def test_what_is_saved_after_an_edit_that_failed_is_what_was_before_it(count, fails):
    wise, target = edited(count), "x" * 300 if fails == "target" else "T9x"
    before = wise.state_dict()
    weight = wise.model.module.lm_head.weight
    kept = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = math.nan if fails == "loss" else kept
    with pytest.raises(ClkitError):
        wise.learn(record(9, target_new=target))
    with torch.no_grad():
        weight[0, 0] = kept
    after = wise.state_dict()
    assert (after["live"], after["units"]) == (before["live"], before["units"])
    again = Wise(tiny(), quick())
    again.load_state_dict(after)
    for made in (wise, again):
        made.learn(record(3))
    assert again.layer.all()[-1].edits == wise.layer.all()[-1].edits
    assert torch.equal(again.layer.all()[-1].matrix, wise.layer.all()[-1].matrix)


def test_one_step_is_masked_gradient_descent_with_a_clamp():
    wise = Wise(tiny(), quick(steps=1))
    found = wise._rows(record(0))
    with wise.router.switched_off():
        prefix = wise.reader.prefix(found)
        settings = wise._settings(prefix.activations, prefix.base, found)
        objective = Objective(prefix, found, wise.router, settings)
        start = torch.zeros(32, 48, requires_grad=True)
        answer, margin, scores = (value.detach() if i == 2 else value for i, value in enumerate(objective(start)))
        (gradient,) = torch.autograd.grad(answer + margin, start)
        mask = shard_mask((32, 48), 0.2, 0, 0)
        nothing = Protection(torch.zeros(0, 48), torch.zeros(48), 1.0, 0.0)
        matrix, outcome = optimise(objective, torch.zeros(32, 48), mask, nothing)
    expected = (-settings.learning_rate * gradient * mask).clamp(-1, 1)
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-7)
    assert outcome.losses == [(answer.item(), margin.item())]
    assert outcome.score == pytest.approx(float(scores[:3].mean()))


def test_the_published_stop_wants_a_flat_loss_too():
    wise = Wise(tiny(), quick(compat=True, steps=30, alpha=0.1, beta=0.2, gamma=0.1, learning_rate=1e-6, stop_loss=1e9))
    assert len(wise.learn(record(0)).losses) == 2  # the first loss has none before it
    ours = Wise(tiny(), quick(steps=30, stop_loss=1e9))
    assert len(ours.learn(record(0)).losses) == 1


def test_the_same_edits_give_the_same_bits_and_leave_the_global_generators_alone():
    torch.manual_seed(5)
    first = edited(3)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    for a, b in zip(first.layer.all(), edited(3).layer.all(), strict=True):
        assert torch.equal(a.matrix, b.matrix) and a.threshold == b.threshold
    assert not torch.equal(first.layer.all()[0].matrix, edited(3, seed=1).layer.all()[0].matrix)


# --- shards and merging -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("retrieve", [["e0"], ["e0", "e1"], ["e2"], ["e0", "e1", "e2", "e3"], ["e4"], ["e4", "e5", "e6", "e7"]]),
        ("merge", [["e0"], ["e0", "e1"], ["e2"], ["e0", "e1", "e2", "e3"], ["e4"], [f"e{i}" for i in range(8)]]),
    ],
)
def test_the_schedule_of_shards_and_merges(mode, expected):
    wise = Wise(tiny(), quick(mode=mode, steps=1))
    seen = []
    for i in range(8):
        wise.learn(record(i))
        seen.append(wise.layer.all()[-1].edits)
    assert [seen[i] for i in (0, 1, 2, 3, 4, 7)] == expected
    assert len(wise.layer) == (2 if mode == "retrieve" else 1)


def test_without_a_schedule_shards_are_merged_only_when_asked():
    wise = edited(5, merge_every=0, steps=1)
    assert [m.name for m in wise.layer.all()] == ["shard-0", "shard-1", "shard-2"]
    wise.consolidate()
    assert [m.name for m in wise.layer.all()] == ["shards-0-1", "shard-2"]
    assert wise.live is wise.layer.all()[1]


@pytest.mark.parametrize("how", ["ties", "sign", "linear", "dare"])
def test_thresholds_are_measured_anew_after_a_merge(how):
    wise = edited(4, merge=how)
    (memory,) = wise.layer.all()
    scores = [float(wise.scores(memory, [record(i).prompt])) for i in range(4)]
    assert memory.threshold == pytest.approx(min(scores), rel=1e-5)


def test_after_every_edit_thresholds_are_those_of_the_edits_as_they_are_now():
    wise = Wise(tiny(), quick(shard_size=3, merge_every=3))
    for i in range(4):
        wise.learn(record(i))
        for memory in wise.layer.all():
            scores = [float(wise.scores(memory, [wise.prompts[i][0]])) for i in memory.edits]
            assert memory.threshold == pytest.approx(min(scores), rel=1e-5)
    assert [m.name for m in wise.layer.all()] == ["shard-0", "shard-1"]


# --- what earlier edits leave for later ones -----------------------------------------------------------------------------
def others(wise, number, held=None, gone=frozenset(), **fields):
    """Prompts to answer and to leave alone while an edit is learned."""
    known = {*IRRELEVANT, *(p for i in range(16) for p in (record(i).prompt, record(i).locality_prompt))}
    readings = {tuple(wise.reading(p).tolist()): p for p in known}
    found = wise._others(record(number, **fields), wise.live.edits if held is None else held, gone)
    return [{readings[tuple(row)] for row in side.tolist()} for side in (found.inside, found.outside)]


def test_earlier_edits_of_a_memory_stay_inside_and_all_that_is_not_its_own_stays_outside():
    wise = edited(3, negatives=0)  # shards of two: e0 and e1, then e2
    elsewhere = {"Sum of 0?", "Sum of 1?", "Town of 0?", "Town of 1?"}
    assert others(wise, 3) == [{"Town of 2?"}, {"Sum of 3?", "Sum of 2?"} | elsewhere]
    again = others(wise, 1, held=["e0"])
    assert again == [{"Town of 0?"}, {"Sum of 1?", "Sum of 0?"}], "learned again: with what came before it"
    assert others(wise, 1, held=[], gone={"e0"}) == [set(), {"Sum of 1?"}]
    fields = {"prompt": "Sum of 1?", "locality_prompt": "Town of 2?"}
    inside, outside = others(wise, 4, **fields)
    assert inside == {"Town of 2?"} and not outside & {"Sum of 1?", "Town of 2?"}, "what is edited is not irrelevant"


def test_the_history_is_a_bounded_draw_of_its_own_for_every_edit():
    wise = edited(4, negatives=3, history=2, shard_size=9, merge_every=0, steps=1)
    inside, outside = others(wise, 4)
    assert len(inside) == 2 and len(outside & set(IRRELEVANT)) == 3 and len(outside) == 1 + 3 + 2
    assert [inside, outside] == others(wise, 4)
    draws = [others(wise, 10 + k)[0] for k in range(6)]
    assert len({tuple(sorted(d)) for d in draws}) > 1
    none = edited(4, negatives=0, history=0, shard_size=9, merge_every=0, steps=1)
    assert others(none, 4) == [set(), {"Sum of 4?"}]


def test_margins_reach_earlier_edits():
    """Without the history a later edit changes what an earlier one's prompts score far more."""
    options = {"shard_size": 9, "merge_every": 0, "steps": 30, "negatives": 0, "learning_rate": 0.3, "stop_loss": 0.0}

    def gap(history):
        wise = edited(3, history=history, mask_ratio=0.9, **options)
        kept = wise.scores(wise.live, [record(i).prompt for i in range(3)])
        apart = wise.scores(wise.live, [record(i).locality_prompt for i in range(3)])
        return float((kept.min() - apart.max()) / kept.max())

    assert gap(64) > gap(0)


# --- taking edits out -------------------------------------------------------------------------------------------------
def test_forgetting_learns_the_other_edits_of_the_memory_again():
    wise = edited(3)
    again = wise.forget(["e0"], {f"e{i}": record(i) for i in range(3)})
    assert again == ["e1"]
    alone = Wise(tiny(), quick())
    alone._contexts, alone._units = wise._contexts, wise._units
    alone.learn(record(1))
    alone._round(alone.live)
    first, second = wise.layer.all()
    assert torch.equal(first.matrix, alone.layer.all()[0].matrix)
    assert first.edits == ["e1"] and second.edits == ["e2"] and second is wise.live
    assert "e0" not in wise.prompts


def test_forgetting_everything_leaves_the_unedited_model():
    wise = edited(5)
    before = [logits(tiny(), p) for p in PROMPTS]
    assert wise.forget([f"e{i}" for i in range(5)], {}) == []
    assert len(wise.layer) == 0 and wise.live is None
    assert all(torch.equal(logits(wise.model, p), b) for p, b in zip(PROMPTS, before, strict=True))
    wise.learn(record(9))
    assert wise.layer.all()[0].edits == ["e9"]


def test_forgetting_in_a_merged_memory_merges_it_again():
    wise = edited(4)
    again = wise.forget(["e1"], {f"e{i}": record(i) for i in range(4)})
    assert again == ["e0", "e2", "e3"]
    (memory,) = wise.layer.all()
    assert memory.parts == [(0, ["e0"]), (1, ["e2", "e3"])]


def test_a_forgetting_that_fails_changes_nothing(monkeypatch):
    wise, whole = edited(3), edited(3)
    learn, calls = wise._learn, []

    def fails(*args):
        calls.append(args)
        if len(calls) == 3:  # e3, then e1 again, then e3 again
            raise NumericalError("the loss is nan")
        return learn(*args)

    monkeypatch.setattr(wise, "_learn", fails)
    wise.learn(record(3))  # shards of e0, e1 and of e2, e3
    with pytest.raises(NumericalError):
        wise.forget(["e0", "e2"], {f"e{i}": record(i) for i in range(4)})
    monkeypatch.undo()
    whole.learn(record(3))
    assert [m.edits for m in wise.layer.all()] == [m.edits for m in whole.layer.all()]
    assert all(torch.equal(logits(wise.model, p), logits(whole.model, p)) for p in PROMPTS)
    assert wise.forget(["e0", "e2"], {f"e{i}": record(i) for i in range(4)}) == ["e1", "e3"]


# --- state ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_a_saved_state_serves_the_same_and_goes_on_the_same(count):
    first = edited(count)
    second = Wise(tiny(), quick())
    second.load_state_dict(unpack(*pack(first.state_dict())))
    for prompt in PROMPTS:
        assert torch.equal(logits(first.model, prompt), logits(second.model, prompt))
    for wise in (first, second):
        for i in range(count, count + 3):
            wise.learn(record(i))
    for a, b in zip(first.layer.all(), second.layer.all(), strict=True):
        assert torch.equal(a.matrix, b.matrix) and a.threshold == b.threshold and a.parts == b.parts


@pytest.mark.parametrize("count", [0, 2])  # no shard, and a closed one
def test_the_state_after_an_edit_that_failed_is_that_of_before_it(count):
    first, second = edited(count), Wise(tiny(), quick())
    with pytest.raises(RequestError):
        first.learn(record(9, target_new="x" * 300))
    second.load_state_dict(unpack(*pack(first.state_dict())))
    for wise in (first, second):
        for i in range(count, count + 3):
            wise.learn(record(i))
    assert [m.parts for m in first.layer.all()] == [m.parts for m in second.layer.all()]
    assert all(len(m.edits) <= 2 * len(m.parts) for m in second.layer.all()), "shards are of two"


def test_a_memory_is_packed_again_only_when_it_changed(monkeypatch):
    wise, packed = edited(5, merge_every=0), []  # three shards, the last one open
    plain = SparseDelta.from_dense
    monkeypatch.setattr(SparseDelta, "from_dense", lambda dense: packed.append(dense) or plain(dense))
    first = wise.state_dict()
    assert len(packed) == 3 and len(wise.state_dict()["memories"]) == len(packed) == 3
    packed.clear()
    wise.live.matrix = wise.live.matrix + 1.0
    wise.state_dict()
    assert len(packed) == 1 and packed[0] is wise.live.matrix
    monkeypatch.undo()
    wise.layer.all()[0].matrix[0, 0] = 7.0  # in place
    again = wise.state_dict()
    for state, memory in zip(again["memories"], wise.layer.all(), strict=True):
        assert torch.equal(SparseDelta.from_state(state["delta"]).dense(), memory.matrix)
    assert not torch.equal(again["memories"][0]["delta"]["bits"], first["memories"][0]["delta"]["bits"])


def test_a_closed_memory_takes_a_quarter_of_the_dense_matrix():
    wise = edited(4, shard_size=2, merge_every=4)
    (state,) = wise.state_dict()["memories"]
    stored = sum(t.numel() * t.element_size() for t in (state["delta"]["bits"], state["delta"]["values"]))
    assert stored <= 0.25 * 32 * 48 * 4


# --- options ----------------------------------------------------------------------------------------------------------
def test_options_that_do_not_fit_together_are_found_before_anything_is_loaded():
    replay = ReplayConfig(size=5)
    found = problems(WISEConfig(shard_size=300, merge_every=1000, alpha=2.0, beta=1.0, replay=replay))
    assert [p.where for p in found] == ["strategy.replay.size", "strategy.merge_every", "strategy.alpha"]
    assert problems(WISEConfig()) == [] == problems(WISEConfig(compat=True))


def test_compat_has_the_published_numbers_and_keeps_given_ones():
    config = settled(WISEConfig(compat=True, beta=7.0), 11008)
    assert (config.steps, config.learning_rate, config.alpha, config.beta, config.gamma) == (70, 1.0, 5.0, 7.0, 10.0)
    assert (config.eos, config.negatives, config.storage) == (False, 0, "float32")
    assert (config.shard_size, config.merge_every) == (500, 1000)
    assert settled(WISEConfig(), 1536).eos


@pytest.mark.parametrize(
    ("given", "width", "shard", "merged"),
    [
        ({}, 1536, 10, 0),  # SmolLM2-135M
        ({}, 11008, 73, 0),  # LLaMA 7B
        ({"mask_ratio": 0.05}, 1536, 2, 0),
        ({}, 48, 1, 0),
        ({"shard_size": 40}, 1536, 40, 0),
        ({"merge_every": 1000}, 1536, 500, 1000),
        ({"mode": "merge"}, 1536, 500, 1000),
        ({"mode": "merge", "shard_size": 25, "merge_every": 50}, 1536, 25, 50),
    ],
)
def test_as_many_edits_share_a_mask_as_the_layer_has_room_for(given, width, shard, merged):
    config = settled(WISEConfig(**given), width)
    assert (config.shard_size, config.merge_every) == (shard, merged)
    assert problems(WISEConfig(**given)) == []


def test_without_a_number_shards_are_closed_when_the_layer_has_no_more_room():
    wise = edited(3, shard_size=None, merge_every=None, steps=1)  # 48 numbers wide: one edit a shard
    assert [m.edits for m in wise.layer.all()] == [["e0"], ["e1"], ["e2"]]
