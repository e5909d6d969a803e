"""Approximate unlearning: closed forms of the losses, and what each strategy does to forgotten and retained records."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit import build, resolve
from clkit.dealing import shares, split_batch
from clkit.strategies.unlearning import losses
from clkit.trainer import SequentialTrainer

METHODS = ("gradient_ascent", "gradient_difference", "kl", "npo", "simnpo", "idk")


def test_log_probabilities_of_answers_are_sums_over_their_own_tokens():
    logits = torch.zeros(2, 3, 5)
    sums, counts = losses.sequence_log_probs(logits, torch.tensor([[1, 2, -100], [4, -100, -100]]))
    assert torch.allclose(sums, torch.tensor([-2 * math.log(5), -math.log(5)])) and counts.tolist() == [2, 1]
    sums, counts = losses.sequence_log_probs(torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([1]))
    assert torch.allclose(sums, torch.tensor([math.log(0.75)])) and counts.tolist() == [1]


@given(beta=st.floats(0.01, 5), gap=st.floats(-20, 5))
@settings(max_examples=60, deadline=None)
def test_npo_is_a_softplus_whose_gradient_fades_as_the_model_forgets(beta, gap):
    log_probs = torch.tensor([-3.0 + gap], requires_grad=True, dtype=torch.float64)
    value = losses.npo(log_probs, torch.tensor([-3.0], dtype=torch.float64), beta)
    assert value.item() == pytest.approx(2 / beta * math.log1p(math.exp(beta * gap)), rel=1e-9)
    value.backward()
    # 2 pi^beta / (pi^beta + pi_ref^beta), the paper's adaptive weight
    assert log_probs.grad.item() == pytest.approx(2 / (1 + math.exp(-beta * gap)), rel=1e-9)


def test_npo_at_its_reference_and_for_small_beta_is_gradient_ascent():
    x = torch.tensor([-4.0, -1.0], dtype=torch.float64)
    assert losses.npo(x, x, 0.3).item() == pytest.approx(2 / 0.3 * math.log(2))
    low = losses.npo(x, torch.tensor([-2.0, -2.0], dtype=torch.float64), 1e-6).item() - 2e6 * math.log(2)
    assert low == pytest.approx((x + 2).mean().item(), abs=1e-4)


def test_simnpo_and_preference_have_their_closed_forms():
    log_probs, counts = torch.tensor([-6.0, -2.0]), torch.tensor([3, 1])
    expected = np.mean([2 / 4.5 * math.log1p(math.exp(-4.5 * 2 + 0.5))] * 2)
    assert losses.simnpo(log_probs, counts, 4.5, 0.5).item() == pytest.approx(expected, rel=1e-5)
    chosen, rejected = torch.tensor([1.0]), torch.tensor([-2.0])
    assert losses.preference(chosen, rejected, 0.1).item() == pytest.approx(math.log1p(math.exp(-0.3)))
    assert losses.preference(rejected, chosen, 0.1) > losses.preference(chosen, rejected, 0.1), "the sign is right"
    assert losses.mean_nll(log_probs, counts).item() == 2.0


def trained(content, name, **options):
    """Two tasks are learned; the second one comes again under another name, and then it is forgotten."""
    first, second = map(Path, content["tasks"]["tasks"][:2])
    again = second.with_name("again.jsonl")
    again.write_text(second.read_text())
    tasks = {**content["tasks"], "tasks": [str(first), str(second), str(again)]}
    train = {**content["train"], "learning_rate": 0.01, "epochs": 8}
    model = {**content["model"], "lora": {"r": 0}}  # an adapter on so small a model learns next to nothing
    strategy = {"name": name, "forget_tasks": ["again"], "epochs": 3, **options}
    config = resolve.validate({**content, "tasks": tasks, "strategy": strategy, "train": train, "model": model})
    built = build.make_tasks(config)
    model = build.make_model(config.model, built, 0, lambda text: None)
    trainer = SequentialTrainer(model, build.make_strategy(config.strategy), config)
    begin, before = trainer.strategy.begin_task, {}

    def nll(task: int) -> float:
        encoded = trainer.run.encodings.train(task)
        with torch.no_grad():
            return float(model.loss(encoded.batch(torch.arange(len(encoded)))))

    def watched(task):
        before.update({t: nll(t) for t in (0, 2)})
        begin(task)

    trainer.strategy.begin_task = watched
    trainer.fit(built)
    return before, {t: nll(t) for t in (0, 2)}, trainer


@pytest.mark.parametrize("name", METHODS)
def test_what_comes_as_a_forget_task_is_pushed_down_and_the_rest_is_held(name, text_content):
    before, after, trainer = trained(text_content, name, learning_rate=0.003)
    assert after[2] > before[2] + 0.01, "it is forgotten"
    if name != "gradient_ascent":
        assert after[0] - before[0] < after[2] - before[2], "more than what is retained"
    assert trainer.strategy.stage_steps(2) == 3 * -(-len(trainer.tasks[2].train) // 4)


def test_forgotten_records_are_in_no_retained_row(text_content):
    _, _, trainer = trained(text_content, "npo")
    trainer.position.stage, trainer.position.step = 2, 0
    batches = list(trainer.strategy.train_loader(trainer.tasks[2]))
    gone = set(trainer.tasks[2].train.ids)
    for batch in batches:
        ids = np.array(batch.ids)
        assert not gone & set(ids[batch.replayed.numpy()]), "though the second task holds them too"
        assert gone >= set(ids[~batch.replayed.numpy()])
    assert sorted(i for b in batches[:2] for i in np.array(b.ids)[~b.replayed.numpy()]) == sorted(gone)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_in_pieces_has_the_same_gradient(name, text_content):
    _, _, trainer = trained(text_content, name)
    trainer.position.stage = 2
    trainer.position.step = 0
    batch = next(iter(trainer.strategy.train_loader(trainer.tasks[2])))
    found = []
    for size in (0, 3):
        trainer.config.train.micro_batch = size
        trainer.model.module.eval().zero_grad()
        parts = split_batch(batch, size)
        given = shares(parts, trainer.strategy, trainer.engine) if size else [{"*": 1.0}]
        for part, share in zip(parts, given, strict=True):
            terms = trainer.strategy.loss(part)
            sum(v * share.get(k, share["*"]) for k, v in terms.items()).backward()
        found.append([p.grad.clone() for p in trainer.strategy.parameters()])
    for whole, pieces in zip(*found, strict=True):
        assert torch.allclose(whole, pieces, atol=1e-5, rtol=1e-4)


def test_kl_is_against_the_model_before_and_not_against_itself(text_content):
    _, _, trainer = trained(text_content, "kl")
    trainer.position.stage, trainer.position.step = 2, 0
    batch = next(iter(trainer.strategy.train_loader(trainer.tasks[2])))
    retain = batch.rows(batch.replayed)
    assert trainer.strategy.retain_loss(retain) > 1e-4
    trainer.strategy._reference = {k: v.clone() for k, v in trainer.strategy.model_state().items()}
    assert abs(trainer.strategy.retain_loss(retain)) < 1e-5


def test_a_refusal_becomes_likelier_in_both_forms(text_content):
    for form in ("likelihood", "preference"):
        _, _, trainer = trained(text_content, "idk", form=form, learning_rate=0.003)
        trainer.position.stage = 2
        strategy = trainer.strategy
        refusals = strategy._encoded().batch(torch.arange(4))
        now, before = strategy.log_probs(refusals)[0], strategy.reference_log_probs(refusals)
        assert (now > before).all(), form


def test_each_of_two_forgotten_tasks_has_refusals_to_its_own_prompts(text_content):
    content = {**text_content, "strategy": {"name": "idk", "forget_tasks": ["blue", "green"], "epochs": 1}}
    config = resolve.validate(content)
    tasks = build.make_tasks(config)
    model = build.make_model(config.model, tasks, 0, lambda text: None)
    trainer = SequentialTrainer(model, build.make_strategy(config.strategy), config)
    strategy, asked = trainer.strategy, []
    forget_loss = strategy.forget_loss

    def watched(batch):
        refusals = strategy._encoded()
        asked.append([refusals.ids[i] for i in batch.indices.tolist()] == list(batch.ids))
        return forget_loss(batch)

    strategy.forget_loss = watched
    trainer.fit(tasks)
    assert asked and all(asked)
