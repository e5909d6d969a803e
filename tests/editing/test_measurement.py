"""Measuring edits: batched scores are those of each probe alone; locality is against the unedited model."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import clkit
from clkit.config import EvalConfig
from clkit.editing import EditScores, Measure, Probe, measure
from clkit.editing.measurement import probes_of
from clkit.errors import RequestError
from clkit.metrics.editing import READINGS, normalised_match, prefers
from clkit.models.causal_lm import CausalLM
from clkit.models.routing import marking_prompt

METHOD = {
    "name": "wise",
    "layer": "0",
    "steps": 30,
    "contexts": 0,
    "mask_ratio": 0.9,
    "learning_rate": 0.5,
    "keep": 0.0,
    "slack": 0.01,  # almost everything is answered by the memory: something to see for locality
}
SHORT = EvalConfig(max_new_tokens=4, batch_size=3)
PROBES = [
    *(Probe("reliability", f"Town of {i}?", "ab"[i % 2] * 2, f"e{i}", ("cc", "dddd")) for i in range(4)),
    Probe("generalisation", "Which town is 0, that one there?", "aa", "e0"),
    *(Probe("locality", f"Sum {i}, please?", answer, f"e{i}", ("x", "yy")) for i, answer in enumerate(("seven", None))),
    Probe("portability", "Mayor of the town of 1?", "m", "e1", ("n",)),
]


@pytest.fixture
def editor(tiny_llama):
    return clkit.Editor.load(tiny_llama, METHOD, device="cpu", prompt="plain")


@pytest.fixture
def edited(editor):
    editor.edit([{"prompt": p.prompt, "target_new": p.answer, "id": p.edit} for p in PROBES[:4]])
    return editor


def ids(editor, text):
    return editor.model.tokenizer(text).input_ids


def alone(editor, prompt, answer):
    """Predicted tokens, right tokens and log-likelihood of one answer, by one plain pass per token."""
    question, wanted = ids(editor, prompt + " "), ids(editor, answer)
    memory, total, predicted = editor.explain(prompt).memory, 0.0, []
    with editor.strategy.wise.router.forced(memory), torch.inference_mode():
        for k in range(len(wanted)):
            row = torch.tensor([question + wanted[:k]])
            with marking_prompt(torch.arange(row.shape[1])[None] < len(question)):
                logits = editor.model.module(row).logits[0, -1]
            predicted.append(int(logits.argmax()))
            total -= float(F.cross_entropy(logits, torch.tensor(wanted[k])))
    return predicted, wanted, total


def test_scores_are_those_of_each_probe_alone(edited):
    scores = measure(edited, PROBES, options=SHORT)
    assert scores.edits == 4 and [r.probe for r in scores.rows] == PROBES
    seen = set()
    for row in scores.rows:
        probe = row.probe
        if probe.aspect == "locality":
            continue
        predicted, wanted, loglik = alone(edited, probe.prompt, probe.answer)
        said = edited.generate(probe.prompt, 4)
        want = {
            "tokens": sum(p == w for p, w in zip(predicted, wanted, strict=True)) / len(wanted),
            "exact": float(predicted == wanted),
            "generated": float(said == probe.answer),
            "generated-normalised": float(normalised_match(said, probe.answer)),
        }
        if probe.others:
            options = [alone(edited, probe.prompt, o)[2] / len(ids(edited, o)) for o in (probe.answer, *probe.others)]
            want["options"] = float(prefers(options))
        assert row.scores == want and row.said == said
        assert row.nll == pytest.approx(-loglik, abs=1e-4) and row.tokens == len(wanted)
        seen.add(tuple(want.values()))
    assert len(seen) > 2, "else the probes tell nothing apart"


def test_locality_is_agreement_with_the_unedited_model(edited, editor, tiny_llama):
    plain = clkit.Editor.load(tiny_llama, METHOD, device="cpu", prompt="plain")
    rows = measure(edited, PROBES[5:7], options=SHORT).rows
    for row in rows:
        prompt = row.probe.prompt
        before, now = plain.generate(prompt, 4), edited.generate(prompt, 4)
        shown = row.probe.answer or before
        old, new = alone(plain, prompt, shown)[0], alone(edited, prompt, shown)[0]
        assert row.scores["tokens"] == sum(a == b for a, b in zip(old, new, strict=True)) / len(old)
        assert row.scores["exact"] == float(old == new)
        assert row.scores["generated"] == float(before == now) and row.said == now
    assert {r.scores["tokens"] for r in rows} != {1.0}, "the edits reach these prompts"
    with edited.strategy.unedited():
        untouched = measure(edited, PROBES[5:7], options=SHORT)
    assert all(value == 1.0 for row in untouched.rows for value in row.scores.values())
    assert set(untouched.rows[0].scores) == set(READINGS)


def test_the_unedited_answers_are_computed_once(editor, monkeypatch):
    calls, plain = [], CausalLM.generate

    def generate(self, encoded, indices, *args):
        calls.append(editor.strategy.wise.router.off)
        return plain(self, encoded, indices, *args)

    monkeypatch.setattr(CausalLM, "generate", generate)
    asked = Measure(editor, PROBES, options=SHORT)
    first = asked.scores(["e0"])
    assert {r.probe.edit for r in first.rows} == {"e0"} and sum(calls) == 1
    asked.scores()
    assert sum(calls) == 2, "that of the other locality prompt"
    asked.scores()
    assert sum(calls) == 2


def test_records_bring_their_probes_and_what_answers_is_counted(edited):
    record = clkit.EditRequest("Town of 0?", "aa", "Which town?", "Sum 0?", id="e0").record()
    assert [(p.aspect, p.answer) for p in probes_of([record])] == [
        ("reliability", "aa"),
        ("generalisation", "aa"),
        ("locality", None),
    ]
    scores = measure(edited, [record], readings=["tokens"], routes=True)
    assert scores.routes()["reliability"] == {"shard-0": 1}
    assert set(scores.cases["reliability"]) == {"tokens"} and scores.estimates()["reliability"]["tokens"].n == 1
    reliability = scores.rows[0]
    assert scores.perplexity() == pytest.approx(math.exp(reliability.nll / reliability.tokens))
    assert EditScores(0, ()).perplexity() is None


def test_unknown_words_and_missing_answers_are_refused(editor):
    with pytest.raises(RequestError, match="unknown readings: forced; there are: tokens"):
        Measure(editor, PROBES, readings=["forced"])
    with pytest.raises(RequestError, match="unknown aspect 'scope'"):
        Measure(editor, [Probe("scope", "a", "b", "e")])
    with pytest.raises(RequestError, match="edit 'e': a probe of portability needs an answer"):
        Measure(editor, [Probe("portability", "a", None, "e")])
