"""Only a prompt that looks like one of a memory's edits is answered by it."""

from __future__ import annotations

import pytest
import torch
from wise_models import edited, quick, record, tiny

from clkit.editing import rows
from clkit.editing.prefix import position_ids
from clkit.models.routing import marking_prompt, mean_over
from clkit.strategies.wise import core
from clkit.strategies.wise.core import Wise
from clkit.strategies.wise.likeness import Gate, Likeness, readings_of


def test_signs_give_the_cosines_without_what_is_shared():
    generator = torch.Generator().manual_seed(0)
    common = 3 * torch.randn(2, 300, generator=generator)
    likeness = Likeness.between(common + torch.randn(60, 2, 300, generator=generator))
    assert [s.shape for s in likeness.shared] == [(8, 300), (1, 300)]
    for shared in likeness.shared:
        torch.testing.assert_close(shared @ shared.T, torch.eye(len(shared)), rtol=0, atol=2e-3)
    mine = torch.randn(40, 2, 300, generator=generator)
    near = 0.7 * mine + 0.5 * torch.randn(40, 2, 300, generator=generator)
    readings, queries = common + mine, common + near
    expected = sum(
        weight * cosine(queries[:, kind], readings[:, kind], likeness.shared[kind])
        for kind, weight in enumerate((0.8, 0.2))  # the last token, and the mean
    )
    found = likeness(queries, likeness.prints(readings))
    assert likeness.prints(readings).shape == (40, 96) and likeness.prints(readings).dtype == torch.uint8
    # A sign keeps a projection's direction, not its size: an error of sqrt(pi / 2 / 768) = .045, and none in the mean.
    assert (found - expected).abs().max() < 0.2
    assert float((found - expected).square().mean().sqrt()) < 0.05
    assert abs(float((found - expected).mean())) < 0.005
    # Plain cosines are high for all of them: what is shared hides what is not.
    plain = cosine(queries[:, 0], readings[:, 0], torch.zeros(1, 300))
    apart = ~torch.eye(40, dtype=torch.bool)
    assert plain[apart].mean() > 0.8 and expected[apart].mean() < 0.1 and expected.diagonal().mean() > 0.75


def cosine(queries: torch.Tensor, readings: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """(B, N) cosines of (B, in) and (N, in) without the directions ``shared``."""
    rest = [r / r.norm(dim=-1, keepdim=True) for r in (readings, queries)]
    rest = [r - r @ shared.T @ shared for r in rest]
    return torch.nn.functional.cosine_similarity(rest[1][:, None], rest[0][None], dim=-1)


def test_what_is_read_is_the_last_token_and_the_mean_of_the_prompt():
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, True, False, False], [False, True, True, True, True]])
    found = readings_of(x, mask)
    torch.testing.assert_close(found[0], torch.stack([x[0, 2], x[0, :3].mean(dim=0)]))
    torch.testing.assert_close(found[1], torch.stack([x[1, 4], x[1, 1:].mean(dim=0)]))
    assert torch.equal(readings_of(x, None)[0], torch.stack([x[0, 4], x[0].mean(dim=0)]))


def test_the_mean_of_a_long_prompt_is_that_of_its_tokens():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1300, 8, generator=generator)
    mask = torch.rand(2, 1300, generator=generator) > 0.3
    for marked in (mask, None, mask[:1]):
        wide = torch.ones(2, 1300) if marked is None else marked.expand(2, -1).float()
        expected = (x.double() * wide[..., None]).sum(1) / wide.sum(1, keepdim=True)
        torch.testing.assert_close(mean_over(x, marked).double(), expected, rtol=0, atol=1e-6)


def test_prints_do_not_depend_on_the_machine():
    alone, both = Likeness([torch.eye(1, 16)]), Likeness([torch.eye(1, 16), torch.eye(1, 16)])
    # Of SHAKE-256's stream, which no library's random generator can change; no projection is near 0, where rounding
    # would decide the sign.
    reading = torch.arange(16.0).sqrt().expand(1, 2, 16)
    for likeness, expected in ((alone, [80, 215, 127, 191, 49, 35]), (both, [84, 215, 46, 191, 51, 35])):
        assert likeness._projected(reading)[0, :48].abs().min() > 0.01
        assert likeness.prints(reading)[0, :6].tolist() == expected


def test_a_directory_from_before_the_mean_counted_goes_on_as_it_was():
    generator = torch.Generator().manual_seed(0)
    gate, again = Gate(0.55), Gate(0.55)
    gate.likeness = Likeness([torch.eye(2, 16)])
    reading = torch.randn(2, 16, generator=generator)
    gate.add("e0", reading)
    state = gate.state_dict() | {"shared": torch.eye(2, 16).half()}  # one tensor, as it was saved
    del state["limit"]
    again.load_state_dict(state, ["e0"])
    other = torch.stack([reading[0], torch.randn(16, generator=generator)])  # another mean: it does not count
    assert again.alike(other[None], ["e0"]).item() > 0.9
    assert again.alike(reading.flip(0)[None], ["e0"]).item() < 0.6


def test_a_memory_answers_only_what_looks_like_its_edits():
    wise = edited(2, likeness=0.55)
    prompts = [wise.prompts[i][0] for i in wise.prompts]
    assert [route(wise, p) for p in prompts] == ["shard-0", "shard-0"]
    (memory,) = wise.layer.all()
    memory.threshold = 0.0  # by its score it would answer everything
    far = "An entirely different matter, at some length"
    assert route(wise, far) is None
    (decision,) = wise.router.last
    assert decision.scores["shard-0"] > decision.thresholds["shard-0"] and decision.likeness["shard-0"] < 0.55
    wise.gate.limit = -1.0
    assert route(wise, far) == "shard-0"


def test_likeness_is_that_of_the_prompt_however_it_comes():
    wise = edited(2, likeness=0.55)
    texts = ["Town of 0?", "Something else, and longer"]
    ids = [rows.prompt_ids(wise.model.form, [text], wise.model.max_length)[0] for text in texts]
    width, (short, long) = 40, map(len, ids)
    left = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    right = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    answered = torch.tensor([ids[0] + ids[1], ids[1] + ids[0]])  # each with the other as its answer
    expected = [wise.gate.alike(wise.read(text)[None], list(wise.prompts)).max().item() for text in texts]
    places = torch.arange(width)[None]
    lengths = torch.tensor([[short], [long]])
    cases = {
        "alone": (torch.tensor(ids[:1]), None),
        "padded on the left": (left, places >= width - lengths),
        "padded on the right": (right, places < lengths),
    }
    for name, (tokens, mask) in cases.items():
        mask = torch.ones_like(tokens) if mask is None else mask.long()
        with torch.inference_mode():
            wise.model.module(input_ids=tokens, attention_mask=mask, position_ids=position_ids(mask))
        found = [d.likeness["shard-0"] for d in wise.router.last]
        assert found == pytest.approx(expected[: len(found)], abs=1e-3), name
    with torch.inference_mode(), marking_prompt(torch.arange(short + long)[None] < lengths):
        wise.model.module(input_ids=answered)
    assert [d.likeness["shard-0"] for d in wise.router.last] == pytest.approx(expected, abs=1e-3)


def test_the_gate_follows_edits_out_and_through_a_saved_state():
    wise = edited(3, likeness=0.55)
    state = wise.state_dict()
    again = Wise(tiny(), quick(likeness=0.55))
    again.load_state_dict(state)
    wise.forget(["e1"], {f"e{i}": record(i) for i in range(3)})
    assert list(wise.gate.prints) == ["e0", "e2"] and list(again.gate.prints) == ["e0", "e1", "e2"]
    again.forget(["e1"], {f"e{i}": record(i) for i in range(3)})
    for prompt in ("Town of 0?", "Town of 1?", "Sum of 2?"):
        assert route(wise, prompt) == route(again, prompt)
        assert wise.router.last == again.router.last
    assert again.state_dict()["likeness"]["prints"].nbytes == 2 * 96


def test_there_is_no_gate_at_zero():
    wise = edited(1, likeness=0.0)
    assert wise.state_dict()["likeness"] is None and not wise.gate.prints and wise.router.gate is None


def route(wise: Wise, prompt: str) -> str | None:
    ids = torch.tensor(rows.prompt_ids(wise.model.form, [prompt], wise.model.max_length))
    with torch.inference_mode():
        wise.model.module(input_ids=ids)
    return wise.router.last[0].memory


@pytest.mark.parametrize("option", ["routing", "compat"])
def test_controls_have_no_gate(option):
    if option == "routing":
        wise = edited(2, likeness=0.55, routing="none")
        assert route(wise, "An entirely different matter, at some length") == "shard-0"
    else:
        assert Wise(tiny(), quick(likeness=0.55, compat=True)).gate.limit == 0.0


def test_all_edits_can_go_and_others_come():
    wise = edited(1, likeness=0.55)
    wise.forget(["e0"], {"e0": record(0)})
    again = Wise(tiny(), quick(likeness=0.55))
    again.load_state_dict(wise.state_dict())
    assert not again.layer.all() and not again.gate.prints
    again.learn(record(0))
    assert route(again, "Town of 0?") == "shard-0"


def test_of_several_memories_the_one_with_the_most_alike_edit_answers():
    wise = edited(2, likeness=0.55, shard_size=1, merge_every=0)
    prompts = [wise.prompts[i][0] for i in wise.prompts]
    first, second = wise.layer.all()
    first.threshold = second.threshold = 0.0  # both would answer by their score
    second.matrix.mul_(100.0)  # and one of them always says more
    wise.gate.limit = -1.0
    assert [route(wise, p) for p in prompts] == [first.name, second.name]


@pytest.mark.parametrize("shard_size", [1, 4])
def test_the_newest_of_two_answers_to_one_prompt_holds(shard_size):
    options = {"steps": 100, "contexts": 0, "merge_every": 0, "likeness": 0.55}
    wise = Wise(tiny(), quick(shard_size=shard_size, **options))
    for edit, target in (("first", "a"), ("other", "c"), ("second", "b")):
        wise.learn(record(1 if edit == "other" else 0, target_new=target, id=edit))
    ids = torch.tensor(rows.prompt_ids(wise.model.form, ["Town of 0?"], 200))
    with torch.inference_mode():
        scores = wise.model.module(ids).logits[0, -1]
    a, b = (wise.model.tokenizer(text).input_ids[-1] for text in "ab")
    assert wise.router.last[0].memory == ("shard-2" if shard_size == 1 else "shard-0")
    assert scores[b] > scores[a] + 2


def test_the_limit_rises_until_few_unrelated_readings_pass():
    generator = torch.Generator().manual_seed(0)
    gate = Gate(0.1, false_positive_rate=0.05)
    gate.likeness = Likeness.between(torch.randn(60, 2, 300, generator=generator))
    edits = torch.randn(40, 2, 300, generator=generator)
    for number, reading in enumerate(edits):
        gate.add(f"e{number}", reading)
    unrelated = torch.randn(210, 2, 300, generator=generator)
    nearest = gate.alike(unrelated, list(gate.prints)).amax(dim=1)
    assert int((nearest >= gate.limit).sum()) > 100  # forty edits: most are a little like one of them
    gate.adjust(unrelated)
    assert int((nearest >= gate.limit).sum()) == 10  # of 210, and the next one would be too many
    assert bool((gate.alike(edits, list(gate.prints)).amax(dim=1) >= gate.limit).all())
    gate.adjust(unrelated[:0])  # nothing to measure on
    assert gate.limit == gate.least == 0.1
    gate.adjust(edits)  # however much looks like an edit, an edit's own prompt passes
    assert gate.limit == 0.8


def test_what_edits_came_with_is_what_the_limit_is_measured_on(monkeypatch):
    monkeypatch.setattr(core, "_ENOUGH", 4)
    monkeypatch.setattr(core, "_NEWEST", 5)
    options = {"likeness": 0.05, "false_positive_rate": 0.2}
    wise = edited(3, **options)
    assert wise.gate.limit == 0.05  # three irrelevant prompts are too few
    for i in (3, 4):
        wise.learn(record(i))
    wise.learn(record(5, prompt="Sum of 4?", locality_prompt=None))  # what was irrelevant is an edit now
    unrelated = [wise.read(f"Sum of {i}?") for i in range(4)]
    alone = Gate(0.05, 0.2)
    alone.likeness, alone.prints = wise.gate.likeness, wise.gate.prints
    alone.adjust(unrelated)
    assert wise.gate.limit == alone.limit > 0.05

    again = Wise(tiny(), quick(**options))
    again.load_state_dict(wise.state_dict())
    assert again.gate.limit == wise.gate.limit
    fixed = Wise(tiny(), quick(likeness=0.05, false_positive_rate=1.0))
    fixed.load_state_dict(wise.state_dict())
    assert fixed.gate.limit == 0.05
    former = wise.state_dict()
    del former["likeness"]["limit"]  # as saved before it could rise
    again.load_state_dict(former)
    assert again.gate.limit == 0.05

    wise.forget(["e0"], {f"e{i}": record(i) for i in range(6)})
    assert wise.gate.limit == 0.05  # too few again
    assert edited(5, likeness=0.05, false_positive_rate=1.0).gate.limit == 0.05
