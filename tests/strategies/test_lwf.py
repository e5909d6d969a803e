"""Distillation on chosen rows: replay plus KL to the previous model is one choice of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stepping import after_tasks, logits, named
from torch import nn

from clkit import api, resolve
from clkit.dealing import shares, split_batch
from clkit.errors import ConfigError
from clkit.loader import Pool
from clkit.strategies.lwf import LwF, LwFConfig
from clkit.tasks.base import LabelledExamples, Task, TaskSequence
from clkit.trainer import SequentialTrainer

NEW, OLD = (0, 1, 2), (1, 4)


def second_task(content, rows, **options):
    """A trainer in its second task with weights that differ from the teacher's, and a batch with replayed rows."""
    trainer, tasks = after_tasks(content, "lwf", 1, rows=rows, replay={"size": 10}, **options)
    trainer.strategy.begin_task(tasks[1])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in named(trainer):
            p += 0.2 * torch.randn(p.shape, generator=generator)
    pool = Pool([trainer.run.encodings.train(1), trainer.run.encodings.train(0)])
    batch = pool.batch(torch.tensor([*NEW, *(i + int(pool.offsets[1]) for i in OLD)]))
    batch.replayed = torch.arange(len(batch)) >= len(NEW)
    return trainer, batch


def expected(trainer, batch, rows, temperature):
    """Mean over the target tokens of the chosen rows, row by row, without padding."""
    terms = []
    for i in rows:
        length = int(batch.inputs["attention_mask"][i].sum())
        ids, labels = batch.inputs["input_ids"][i : i + 1, :length], batch.labels[i, 1:length]
        at = (labels != -100).nonzero()[:, 0]
        student = trainer.model.module(ids).logits[0, :-1][at]
        own = {n: p.detach().clone() for n, p in named(trainer)}
        with torch.no_grad():
            for n, p in named(trainer):
                p.copy_(trainer.strategy._teacher[n])
            teacher = trainer.model.module(ids).logits[0, :-1][at]
            for n, p in named(trainer):
                p.copy_(own[n])
        q, p = (torch.log_softmax(x / temperature, -1) for x in (student, teacher))
        terms += list((p.exp() * (p - q)).sum(-1) * temperature**2)
    return float(torch.stack(terms).mean().detach())


@pytest.mark.parametrize(("rows", "meant"), [("all", range(5)), ("new", range(3)), ("replayed", range(3, 5))])
def test_a_language_model_distils_the_target_positions_of_the_chosen_rows(text_content, rows, meant):
    trainer, batch = second_task(text_content, rows, temperature=1.5, weight=3.0)
    assert len(set(batch.inputs["attention_mask"].sum(1).tolist())) > 1, "rows of different lengths"
    terms = trainer.strategy.loss(batch)
    assert float(terms["distillation"].detach()) == pytest.approx(3.0 * expected(trainer, batch, meant, 1.5), rel=1e-4)
    assert torch.equal(terms["cross_entropy"], trainer.model.loss(batch)), "all rows are learned"


@pytest.mark.parametrize("rows", ["all", "new", "replayed"])
def test_micro_batches_equal_one_batch(text_content, rows):
    trainer, batch = second_task(text_content, rows)
    whole = {name: float(value.detach()) for name, value in trainer.strategy.loss(batch).items()}
    parts = split_batch(batch, 2)  # one has new rows only, one both, one replayed rows only
    sums: dict[str, float] = {}
    for part, share in zip(parts, shares(parts, trainer.strategy, trainer.engine), strict=True):
        for name, value in trainer.strategy.loss(part).items():
            sums[name] = sums.get(name, 0.0) + float(value.detach()) * share.get(name, share["*"])
    assert sums == pytest.approx(whole, rel=1e-5)
    assert whole["distillation"] > 0


def test_the_first_task_and_a_batch_without_replayed_rows_have_nothing_to_distil(text_content):
    trainer, batch = second_task(text_content, "replayed")
    batch = batch.rows(~batch.replayed)
    assert set(trainer.strategy.loss(batch)) == {"cross_entropy"}
    trainer, _ = after_tasks(text_content, "lwf", 0)
    assert set(trainer.strategy.loss(trainer.run.encodings.train(0).batch(torch.arange(3)))) == {"cross_entropy"}


def test_replay_plus_kl_holds_replayed_rows_nearer_to_the_previous_model_than_replay(text_content):
    def gap(weight):
        """KL between the model before and after the second task, on rows of the first."""
        content = {**text_content, "train": {**text_content["train"], "epochs": 6, "learning_rate": 0.003}}
        trainer, tasks = after_tasks(content, "lwf", 1, rows="replayed", weight=weight, replay={"size": 10})
        batch = trainer.run.encodings.train(0).batch(torch.arange(8))
        before = logits(trainer, batch).log_softmax(-1)
        trainer._learn(tasks[1])
        after = logits(trainer, batch).log_softmax(-1)
        return float((before.exp() * (before - after)).sum(-1).mean())

    assert gap(10.0) < 0.5 * gap(0.0)


def test_replay_plus_kl_with_weight_zero_is_replay_to_the_last_bit(text_content, tmp_path):
    def run(name, **options):
        strategy = {"name": name, "replay": {"size": 10}, **options}
        return api.run(resolve.validate({**text_content, "strategy": strategy, "output_dir": str(tmp_path / name)}))

    np.testing.assert_array_equal(run("lwf", rows="replayed", weight=0.0).matrix, run("replay").matrix)


def test_tasks_that_do_not_name_their_classes_distil_all_of_them():
    draw = torch.Generator().manual_seed(0)
    tasks = []
    for name in ("first", "second"):
        x = torch.randn(12, 4, generator=draw)
        examples = LabelledExamples(x, torch.randint(3, (12,), generator=draw), [f"{name} {i}" for i in range(12)])
        tasks.append(Task(name, examples, examples, "classification", "accuracy"))
    trainer = SequentialTrainer(nn.Linear(4, 3), LwF(LwFConfig()), {})
    trainer.prepare(TaskSequence(tasks))
    trainer.position.stage = 1
    trainer.strategy.begin_task(tasks[1])
    trainer.model.module.weight.data += 1.0 * torch.arange(3)[:, None]
    loss = trainer.strategy.loss(trainer.run.encodings.train(1).batch(torch.arange(12)))
    assert float(loss["distillation"].detach()) > 0.1


def test_replayed_rows_without_a_buffer_are_refused_before_training(text_content):
    with pytest.raises(ConfigError, match=r"strategy.rows: .*set strategy.replay.size"):
        resolve.validate({**text_content, "strategy": {"name": "lwf", "rows": "replayed"}})
    with pytest.raises(ConfigError, match=r"strategy.rows"):
        resolve.validate({**text_content, "strategy": {"name": "lwf", "rows": "old"}})
