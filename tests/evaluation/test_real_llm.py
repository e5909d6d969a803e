"""Scoring real records with a real language model."""

import json

import pytest
import torch

from clkit.config import EvalConfig, ModelConfig
from clkit.errors import ModelError
from clkit.evaluation import options
from clkit.evaluation.base import evaluate
from clkit.models import load_model
from clkit.tasks.base import Task, TextExamples, TextRecord

TOPICS = ("World", "Sports", "Business", "Science or Technology")


@pytest.mark.real_llm
def test_sharing_the_prompt_chooses_the_same_topics_on_real_news(data_root, monkeypatch):
    try:
        config = ModelConfig(name="smollm2-135m", dtype="float32")
        lm = load_model(config, generator=torch.Generator(), device=torch.device("cpu"))
    except ModelError as error:
        pytest.skip(f"smollm2-135m can't be loaded here: {error}")
    lines = (data_root / "textcl" / "agnews" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    rows = [json.loads(line) for line in lines]
    records = [TextRecord(r["prompt"], r["answer"], str(i), TOPICS, label=r["label"]) for i, r in enumerate(rows)]
    news = Task("agnews", TextExamples(()), TextExamples(tuple(records)), "text", "option-loglik")
    encoded = lm.encode(news.eval)

    def score():
        return evaluate(lm, news, encoded, metric="option-loglik", options=EvalConfig(batch_size=10))

    shared = score()
    monkeypatch.setattr(options, "why_not_packed", lambda module, longest: "this is a test")
    monkeypatch.setattr(options, "packed_logliks", None)
    anew = score()
    assert [d.prediction for d in shared.details] == [d.prediction for d in anew.details]
    assert len({d.prediction for d in shared.details}) > 1, "the model says more than one thing"
    assert 0 < shared.value < 1
