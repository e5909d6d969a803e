"""Only a prompt that looks like one of a memory's edits is answered by it."""

from __future__ import annotations

import pytest
import torch
from wise_models import edited, quick, record, tiny

from clkit.editing import rows
from clkit.strategies.wise.core import Wise
from clkit.strategies.wise.likeness import Likeness


def test_signs_give_the_cosine_without_what_is_shared():
    generator = torch.Generator().manual_seed(0)
    common = 3 * torch.randn(300, generator=generator)
    others = common + torch.randn(60, 300, generator=generator)
    likeness = Likeness.between(others)
    assert likeness.shared.shape == (8, 300)
    torch.testing.assert_close(likeness.shared @ likeness.shared.T, torch.eye(8), rtol=0, atol=2e-3)
    mine = torch.randn(40, 300, generator=generator)
    near = 0.7 * mine + 0.5 * torch.randn(40, 300, generator=generator)
    readings, queries = common + mine, common + near
    rest = [r / r.norm(dim=-1, keepdim=True) for r in (readings, queries)]
    rest = [r - r @ likeness.shared.T @ likeness.shared for r in rest]
    expected = torch.nn.functional.cosine_similarity(rest[1][:, None], rest[0][None], dim=-1)
    found = likeness(queries, likeness.prints(readings))
    assert likeness.prints(readings).shape == (40, 96) and likeness.prints(readings).dtype == torch.uint8
    # A sign keeps a projection's direction, not its size: an error of sqrt(pi / 2 / 768) = .045, and none in the mean.
    assert (found - expected).abs().max() < 0.2
    assert float((found - expected).square().mean().sqrt()) < 0.05
    assert abs(float((found - expected).mean())) < 0.005
    # Plain cosines are high for all of them: what is shared hides what is not.
    plain = torch.nn.functional.cosine_similarity(queries[:, None], readings[None], dim=-1)
    apart = ~torch.eye(40, dtype=torch.bool)
    assert plain[apart].mean() > 0.8 and expected[apart].mean() < 0.1 and expected.diagonal().mean() > 0.75


def test_prints_do_not_depend_on_the_machine():
    likeness = Likeness(torch.eye(1, 16))
    # Of SHAKE-256's stream, which no library's random generator can change; no projection is near 0, where rounding
    # would decide the sign.
    reading = torch.arange(16.0).sqrt()[None]
    assert likeness._projected(reading)[0, :48].abs().min() > 0.01
    assert likeness.prints(reading)[0, :6].tolist() == [80, 215, 127, 191, 49, 35]


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
