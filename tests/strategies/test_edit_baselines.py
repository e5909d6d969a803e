"""Baselines of editing that change weights: FT-L's norm, one LoRA, MEMIT's normal equations, WISE without a router."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from wise_models import logits, quick, record, tiny

from clkit.editing.prefix import Reader
from clkit.errors import NumericalError, RequestError
from clkit.registry import STRATEGIES
from clkit.strategies.mask_none import MaskNoneConfig
from clkit.strategies.memit.covariance import KeyMoment, readers
from clkit.strategies.memit.subject import tokens_after

QUICK = {"layer": "1", "steps": 8, "contexts": 1}
RECORDS = {f"e{i}": record(i) for i in range(4)}
PROMPTS = ("Town of 0?", "Town of 3?", "anything else")
CHANGED = ("ft_layer", "lora_edit", "memit")


def attached(name, model=None, **options):
    kind = STRATEGIES.get(name)
    strategy = kind(kind.config_class(**(QUICK | options)))
    strategy.attach(model or tiny(), 0)
    return strategy


def learned(name, ids, **options):
    strategy = attached(name, **options)
    for i in ids:
        strategy.learn(RECORDS[i])
    return strategy


def same(a, b):
    return all(torch.equal(logits(a.model, p), logits(b.model, p)) for p in PROMPTS)


# --- all of them ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CHANGED)
def test_an_edit_lowers_the_loss_and_its_target_becomes_more_likely(name):
    freedom = {"ft_layer": {"limit": 0.5}, "memit": {"largest": 9.0, "weight": 0.1, "learning_rate": 0.2}}
    strategy = attached(name, **({"steps": 40, "learning_rate": 0.02, "eos": False} | freedom.get(name, {})))
    prompt = "Town of 1? "  # the space before the target ends the prompt
    target = strategy.model.tokenizer("T").input_ids[0]
    before = logits(strategy.model, prompt)[-1].log_softmax(-1)[target]
    outcome = strategy.learn(record(1, target_new="T"))
    after = logits(strategy.model, prompt)[-1].log_softmax(-1)[target]
    assert outcome.losses["target"] < 4 < -float(before)
    assert float(after) > float(before) + 1


@pytest.mark.parametrize("subject", [None, "of 1"])
@pytest.mark.parametrize("name", ["memit", "grace"])
def test_what_an_edit_can_not_change_is_not_computed_again(name, subject, monkeypatch):
    edit = replace(record(1), subject=subject)
    short, starts, prefix = attached(name), [], Reader.prefix

    def watched(self, rows, since=None):
        found = prefix(self, rows, since)
        starts.append((found.start, rows.ends.min().item()))
        return found

    monkeypatch.setattr(Reader, "prefix", watched)
    short.learn(edit)
    monkeypatch.setattr(Reader, "prefix", lambda self, rows, since=None: prefix(self, rows))
    whole = attached(name)
    whole.learn(edit)
    after = 2 if subject and name == "memit" else 0  # "1" is two tokens before the end of "Town of 1?"
    assert [end - start for start, end in starts] == [after]
    for a, b in zip(_tensors(short), _tensors(whole), strict=True):
        assert float(b.abs().max()) > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def _tensors(strategy):
    state = strategy.memory_state()
    if "pairs" in state:
        return [t for pair in state["pairs"].values() for t in pair] + list(state["readers"])
    return [entry["value"] for entry in state["entries"]]


def test_a_subject_that_is_cut_off_is_refused():
    model = tiny()
    model.max_length = 12
    memit = attached("memit", model)
    with pytest.raises(RequestError, match=r"subject was cut off.*raise model\.max_length"):
        memit.learn(replace(record(1), prompt="Town of 1, a longer question?", subject="Town"))
    assert not memit.edits


@pytest.mark.parametrize("name", CHANGED)
def test_detaching_leaves_the_model_as_it_was(name):
    model = tiny()
    state = {k: v.clone() for k, v in model.module.state_dict().items()}
    flags = [p.requires_grad for p in model.module.parameters()]
    answers = [logits(model, p) for p in PROMPTS]
    strategy = attached(name, model)
    strategy.learn(RECORDS["e0"])
    assert not torch.equal(logits(model, PROMPTS[0]), answers[0])
    with strategy.unedited():
        assert all(torch.equal(logits(model, p), a) for p, a in zip(PROMPTS, answers, strict=True))
    strategy.detach()
    assert all(torch.equal(logits(model, p), a) for p, a in zip(PROMPTS, answers, strict=True))
    after = model.module.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[k], state[k]) for k in state)
    assert [p.requires_grad for p in model.module.parameters()] == flags


@pytest.mark.parametrize("name", CHANGED)
def test_forgetting_leaves_what_there_would_be_without_the_edit(name):
    strategy = learned(name, ["e0", "e1", "e2"])
    again = strategy.forget(["e1"], RECORDS)
    assert again == ([] if name == "memit" else ["e0", "e2"])
    assert same(strategy, learned(name, ["e0", "e2"]))
    strategy.forget(["e0", "e2"], RECORDS)
    assert strategy.holdings() == {} and same(strategy, attached(name))


@pytest.mark.parametrize("name", CHANGED)
def test_an_edit_that_fails_changes_nothing(name):
    strategy = learned(name, ["e0"])
    before = [logits(strategy.model, p) for p in PROMPTS]
    with pytest.raises(RequestError, match="takes 301 tokens"):
        strategy.learn(record(1, target_new="x" * 300))
    assert all(torch.equal(logits(strategy.model, p), b) for p, b in zip(PROMPTS, before, strict=True))
    kept = strategy.additions.changes
    with torch.no_grad():
        strategy.model.module.lm_head.weight[0, 0] = math.nan
    with pytest.raises(NumericalError, match="lower strategy.learning_rate"):
        strategy.learn(RECORDS["e1"])
    assert strategy.additions.changes == kept and list(strategy.edits) == ["e0"]


def test_rehearsal_is_refused():
    from clkit.config import ReplayConfig

    for name in CHANGED:
        kind = STRATEGIES.get(name)
        (problem,) = kind.check(kind.config_class(replay=ReplayConfig(size=5)))
        assert problem.where == "strategy.replay.size"


def test_a_change_keeps_its_type_when_the_model_is_cast():
    strategy = learned("ft_layer", ["e0"])
    strategy.model.module.to(torch.bfloat16)
    (change,) = strategy.additions.changes.values()
    assert change.matrix.dtype == torch.float32
    assert logits(strategy.model, PROMPTS[0]).dtype == torch.bfloat16


# --- FT-L -------------------------------------------------------------------------------------------------------------
def test_no_edit_moves_a_weight_further_than_the_limit():
    strategy, before = attached("ft_layer", limit=1e-3, learning_rate=0.1), torch.zeros(32, 48)
    for i in range(3):
        strategy.learn(RECORDS[f"e{i}"])
        (change,) = strategy.additions.changes.values()
        step = (change.matrix - before).abs().max()
        assert 0.99e-3 < float(step) < 1.0001e-3
        before = change.matrix.clone()


# --- MEMIT ------------------------------------------------------------------------------------------------------------
def test_the_moment_is_solved_without_making_its_matrix():
    x = torch.randn(20, 48, generator=torch.Generator().manual_seed(0))
    moment = KeyMoment(x, ridge=0.1)
    dense = x.double().T @ x.double() / 20 + moment.floor * torch.eye(48, dtype=torch.float64)
    rows = torch.randn(3, 48, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(moment.times(rows), rows @ dense)
    torch.testing.assert_close(moment.solve(rows), torch.linalg.solve(dense, rows.T).T)


def test_the_update_solves_its_normal_equations():
    strategy = learned("memit", ["e0", "e1", "e2"], weight=2.0)
    (change,) = strategy.additions.changes.values()
    matrix = (change.up @ change.down).double()
    keys, values = (torch.stack(t).double() for t in zip(*strategy.pairs.values(), strict=True))
    left = 2.0 * strategy.moment.times(matrix) + (matrix @ keys.T) @ keys
    torch.testing.assert_close(left, values.T @ keys, rtol=1e-4, atol=1e-4 * float((values.T @ keys).abs().max()))


def test_with_little_weight_on_ordinary_text_each_key_gets_its_value():
    keys = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    values = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    moment = KeyMoment(torch.randn(20, 48, generator=torch.Generator().manual_seed(2)), ridge=0.1)
    tight, loose = (values.T @ readers(keys, moment, weight) for weight in (1e-6, 1e6))
    torch.testing.assert_close(keys @ tight.T, values, rtol=0, atol=1e-4)
    assert float((keys @ loose.T).abs().max()) < 1e-2


def test_the_order_of_edits_does_not_matter():
    a, b = learned("memit", ["e0", "e1", "e2"]), learned("memit", ["e2", "e0", "e1"])
    for prompt in PROMPTS:
        torch.testing.assert_close(logits(a.model, prompt), logits(b.model, prompt), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("subject", "after"), [("Town", 7), ("of 1", 2), (None, 0), ("absent", 0)]
)  # bytes; the prompt ends with a space
def test_the_subject_s_last_token_is_found(subject, after):
    assert tokens_after(tiny().form, "Town of 1?", "T", subject) == after


# --- WISE without a router --------------------------------------------------------------------------------------------
def test_without_a_router_the_memories_are_the_same_and_everything_goes_through_them():
    options = {k: v for k, v in vars(quick()).items() if k not in ("routing", "replay")}
    routed, open_ = (STRATEGIES.get(n) for n in ("wise", "mask_none"))
    routed, open_ = routed(quick()), open_(MaskNoneConfig(**options))
    for strategy in (routed, open_):
        strategy.attach(tiny(), 0)
        for i in range(3):
            strategy.learn(RECORDS[f"e{i}"])
    for a, b in zip(routed.wise.layer.all(), open_.wise.layer.all(), strict=True):
        assert torch.equal(a.matrix, b.matrix) and a.threshold == b.threshold
    for memory in open_.wise.layer.all():
        memory.threshold = math.inf
    plain = tiny()
    for prompt in PROMPTS:
        why = open_.explain(prompt)
        assert why.memory == max(why.scores, key=why.scores.__getitem__)
        assert not torch.equal(logits(open_.wise.model, prompt), logits(plain, prompt))
