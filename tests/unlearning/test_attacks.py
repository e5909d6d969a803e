"""The attacks behind the gates: what they find, what chance explains, and that the base model's opinion is taken off."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from people import PEOPLE, rows, run

from clkit import api
from clkit.errors import VerificationError
from clkit.unlearning import attacks
from clkit.unlearning.attacks import Answers, Measured


def answered(losses, tokens=4, right=0):
    """Answers of so many tokens with these mean losses; the first ``right`` of each are given away, from the end."""
    n = len(losses)
    true = [np.arange(tokens)] * n
    said = [np.where(np.arange(tokens) >= tokens - right, t, -1) for t in true]
    return Answers([np.full(tokens, -v) for v in losses], said, true, [f"answer {i % 3}" for i in range(n)])


def measured(mine, other, mine_base=None, other_base=None, **options):
    return Measured(
        answered(mine, **options),
        answered(other),
        answered(mine if mine_base is None else mine_base),
        answered(other if other_base is None else other_base),
        True,
    )


def test_what_is_remembered_is_found_and_what_is_not_is_not():
    rng = np.random.default_rng(1)
    known, new, alike = rng.normal(1, 0.3, 60), rng.normal(4, 0.3, 80), rng.normal(4, 0.3, 60)
    figures = attacks.membership(measured(known, new, rng.normal(4, 0.3, 60), rng.normal(4, 0.3, 80)))
    assert figures["loss"]["auc"][0] == 1 and figures["n"] == [60, 80] and figures["seed"] == 0
    assert set(figures) >= {"loss", "reference", "zlib", "min-k"} and attacks.leaks(figures, 0.6)
    assert not attacks.leaks(figures, 1.0), "the limit is the user's"
    figures = attacks.membership(measured(alike, new, rng.normal(4, 0.3, 60), rng.normal(4, 0.3, 80)))
    assert not attacks.leaks(figures, 0.6)


def test_an_easy_record_is_no_member_for_the_reference_attack():
    rng = np.random.default_rng(2)
    easy, hard = rng.normal(1, 0.2, 50), rng.normal(3, 0.2, 50)
    figures = attacks.membership(measured(easy, hard, easy + rng.normal(0, 0.1, 50), hard + rng.normal(0, 0.1, 50)))
    assert figures["loss"]["auc"][0] == 1 and abs(figures["reference"]["auc"][0] - 0.5) < 0.15


def test_one_record_is_too_few_to_accuse_a_model_by():
    figures = attacks.membership(measured([1.0], [2.0, 3.0, 4.0]))
    assert figures["loss"]["auc"][:2] == [1.0, 1.0], "a resampled interval of one record has no width"
    assert not attacks.leaks(figures, 0.6), "and one in four comes first by chance"


def test_extraction_compares_with_what_was_never_seen():
    figures = attacks.extraction(measured([1.0] * 20, [1.0] * 20, right=3))
    assert figures["forgotten"] == 0.75 and figures["never_seen"] == 0 and figures["difference"] == [0.75] * 3
    assert attacks.extraction(measured([1.0] * 20, [1.0] * 20))["difference"][0] == 0


def test_log_probabilities_are_those_of_the_answers_tokens_without_the_end(people_content, tmp_path):
    run_dir = run(people_content, tmp_path)
    with api.open_run(run_dir) as trainer:
        encoded = trainer.run.encodings.train(0)
        found = attacks.answers(trainer.model, [encoded], 3)
        batch = encoded.batch(torch.tensor([0]))
        with torch.no_grad():
            whole = -float(trainer.model.loss(batch)) * batch.num_targets
            logits = torch.log_softmax(trainer.model.logits(batch), -1)
    end = float(logits[0, -1, batch.labels[0, -1]])
    assert len(found.log_probs[0]) == batch.num_targets - 1
    assert found.log_probs[0].sum() == pytest.approx(whole - end, rel=1e-4)
    assert found.texts[0] == trainer.tasks[0].train.records[0].answer


def test_a_model_that_still_has_the_records_is_told_from_one_that_never_had_them(people_content, tmp_path):
    draws = np.random.default_rng(0)
    rows = [{"prompt": f"code {i}?", "answer": "".join(draws.choice(list("abcdefgh"), 6))} for i in range(40)]
    file = tmp_path / "codes.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    content = {
        **people_content,
        "model": {**people_content["model"], "lora": {"r": 0}},
        "tasks": {**people_content["tasks"], "tasks": [str(file)], "eval_fraction": 0.4},
        "train": {"epochs": 60, "batch_size": 8, "learning_rate": 0.01},
    }
    run_dir = run(content, tmp_path)
    with api.open_run(run_dir) as trainer:
        task = trainer.tasks[0]
    figures = attacks.membership(attacks.measure(run_dir, [task]))
    assert figures["n"] == [24, 16] and attacks.leaks(figures, 0.6), figures
    never = dataclasses.replace(task, train=task.eval.subset(range(8)))
    figures = attacks.membership(attacks.measure(run_dir, [never]))
    assert figures["n"] == [8, 8] and not attacks.leaks(figures, 0.6), figures
    with pytest.raises(VerificationError, match="no forgotten training records"):
        attacks.measure(run_dir, [dataclasses.replace(task, train=task.train.subset([]))])


def test_an_evaluation_record_that_copies_a_learned_one_is_not_taken_for_never_seen(people_content, tmp_path):
    folder, known = tmp_path / "scored", rows(PEOPLE[:2])
    folder.mkdir()
    new = [{**row, "id": f"new-{row['id']}", "answer": "no one knows"} for row in known[:2]]
    scored = [{**row, "id": f"copy-{row['id']}"} for row in known] + new
    for name, part in (("train", known), ("test", scored)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    people_content["tasks"] = {"source": "jsonl", "tasks": [str(folder)]}
    run_dir = run(people_content, tmp_path)
    with api.open_run(run_dir) as trainer:
        task = trainer.tasks[0]
    found = attacks.measure(run_dir, [dataclasses.replace(task, train=task.train.subset([0]))])
    assert found.unseen.texts == ["no one knows"] * 2
