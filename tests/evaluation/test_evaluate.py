"""The scoring loop: batches, order, training flags, refusals, and accuracy."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from clkit.config import EvalConfig
from clkit.engine.group import LocalGroup
from clkit.errors import CapabilityError, ConfigError, DataError
from clkit.evaluation import SCORERS
from clkit.evaluation.base import Detail, Scorer, evaluate, plan_batches
from clkit.models.base import Model
from clkit.tasks.base import LabelledExamples, Task
from clkit.tasks.batch import Batch, Encoded


class Rows(Encoded):
    def __init__(self, examples: LabelledExamples, lengths=None) -> None:
        self.examples, self.ids, self.lengths = examples, examples.ids, lengths

    def batch(self, indices):
        inputs = {"x": self.examples.inputs[indices]}
        return Batch(inputs, self.examples.labels[indices], len(indices), indices, self)


class Linear(Model):
    """A classifier that notes how it was run."""

    kinds = frozenset({"classification"})
    autocast_dtype: torch.dtype | None = None

    def __init__(self) -> None:
        module = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 4, bias=False))
        nn.init.eye_(module[1].weight)
        super().__init__("linear", module)
        self.batches: list[list[int]] = []
        self.seen: set[tuple] = set()

    def encode(self, examples):
        return Rows(examples)

    def logits(self, batch):
        out = self.module(batch.inputs["x"])
        self.batches.append(batch.indices.tolist())
        self.seen.add((self.module.training, torch.is_inference_mode_enabled(), out.dtype))
        return out

    def loss(self, batch, logits=None):
        raise NotImplementedError

    def export(self, directory):
        raise NotImplementedError


def task(count: int = 10, metric: str = "accuracy", kind: str = "classification") -> Task:
    """Inputs are one-hot; the model is right where the label is the position of the one."""
    hot = torch.arange(count) % 3
    labels = torch.where(torch.arange(count) < 7, hot, (hot + 1) % 3)
    examples = LabelledExamples(torch.eye(3)[hot], labels, [f"e{count - i}" for i in range(count)])
    return Task("points", examples.subset([]), examples, kind, metric, classes=(0, 1, 2))


def test_accuracy_is_the_share_of_right_classes_with_one_detail_per_example_in_order():
    model, points = Linear(), task()
    score = evaluate(model, points, model.encode(points.eval), metric="accuracy", options=EvalConfig(batch_size=4))
    assert score.value == pytest.approx(0.7) and score.n == 10 and score.metric == "accuracy" and score.higher_is_better
    assert [d.id for d in score.details] == [f"e{10 - i}" for i in range(10)]
    assert [d.value for d in score.details] == [1.0] * 7 + [0.0] * 3
    assert (score.details[8].prediction, score.details[8].gold) == ("2", "0")
    assert [len(batch) for batch in model.batches] == [4, 4, 2]


def test_where_the_task_is_known_only_its_classes_are_chosen_from():
    model, points = Linear(), task()
    model.module[1].weight.data[3] = 5.0  # a class of another task always wins
    encoded = model.encode(points.eval)
    assert evaluate(model, points, encoded, metric="accuracy").value == 0.0
    assert evaluate(model, points, encoded, metric="accuracy", restrict_to=(2, 0, 1)).value == pytest.approx(0.7)


def test_the_model_runs_in_evaluation_and_inference_mode_and_every_flag_comes_back():
    model, points = Linear(), task()
    model.module.train()
    model.module[1].eval()  # frozen part
    evaluate(model, points, model.encode(points.eval), metric="accuracy")
    assert model.seen == {(False, True, torch.float32)}
    assert model.module.training and model.module[0].training and not model.module[1].training
    assert not torch.is_inference_mode_enabled()


def test_the_flags_come_back_when_scoring_fails():
    model, points = Linear(), task()
    model.module.train()
    model.logits = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate(model, points, model.encode(points.eval), metric="accuracy")
    assert model.module.training and not torch.is_inference_mode_enabled()


def test_the_models_autocast_type_is_used():
    model, points = Linear(), task()
    model.autocast_dtype = torch.bfloat16
    evaluate(model, points, model.encode(points.eval), metric="accuracy")
    assert model.seen == {(False, True, torch.bfloat16)}


def test_progress_counts_examples():
    model, points, calls = Linear(), task(), []
    options = EvalConfig(batch_size=4)
    encoded = model.encode(points.eval)
    evaluate(model, points, encoded, metric="accuracy", options=options, progress=lambda *c: calls.append(c))
    assert calls == [(4, 10), (8, 10), (10, 10)]


@pytest.mark.parametrize(
    ("points", "metric", "error", "message"),
    [
        (task(), "acuracy", ConfigError, "Did you mean 'accuracy'"),
        (task(), "perplexity", CapabilityError, "scores text tasks, and this task is of kind classification"),
        (task(kind="edit"), "accuracy", CapabilityError, "of kind edit"),
        (task(0), "accuracy", DataError, "'points' has no evaluation examples"),
    ],
)
def test_what_can_not_be_scored_is_refused_before_any_forward_pass(points, metric, error, message):
    model = Linear()
    with pytest.raises(error, match=message):
        evaluate(model, points, model.encode(points.eval), metric=metric)
    assert model.batches == []


def test_batches_have_similar_lengths_and_stay_within_both_limits():
    cost = np.random.default_rng(0).integers(1, 300, size=500)
    options = EvalConfig(batch_size=16, max_batch_tokens=1024)
    batches = plan_batches(cost, options)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    for batch in batches:
        assert len(batch) <= 16 and len(batch) * max(cost[batch]) <= 1024
    padded = sum(len(batch) * max(cost[batch]) for batch in batches)
    assert padded / cost.sum() < 1.1


def test_an_example_above_the_token_limit_is_a_batch_of_its_own():
    assert plan_batches(np.array([10, 5000, 10]), EvalConfig(max_batch_tokens=64)) == [[1], [0, 2]]


def test_the_longest_batch_comes_first():
    assert plan_batches(np.array([1, 3, 2]), EvalConfig(batch_size=1)) == [[1], [2], [0]]


class Part(LocalGroup):
    """One process of several, that keeps what it would send."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.sent = rank, world, None

    def all_gather(self, obj):
        self.sent = super().all_gather(obj)[0]
        return [self.sent]


@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_share_the_batches_without_overlap_and_without_gaps(world):
    model, points = Linear(), task(23)
    options = EvalConfig(batch_size=4)
    parts = [Part(rank, world) for rank in range(world)]
    for part in parts:
        if part.rank < 6:
            evaluate(model, points, model.encode(points.eval), metric="accuracy", options=options, group=part)
        else:  # more processes than batches: this one has nothing to score, and alone no score
            with pytest.raises(ZeroDivisionError):
                evaluate(model, points, model.encode(points.eval), metric="accuracy", options=options, group=part)
    indices = sorted(index for part in parts for index, _ in part.sent)
    assert indices == list(range(23))
    alone = Linear()
    evaluate(alone, points, alone.encode(points.eval), metric="accuracy", options=options)
    assert sorted(model.batches) == sorted(alone.batches), "the same batches, so the same rounding"


def test_the_total_does_not_depend_on_the_order_of_details():
    class Any(Scorer):
        def score(self, scoring, indices):
            raise NotImplementedError

    values = [1e16, 1.0, -1e16, 3.0]
    details = [Detail(str(i), v) for i, v in enumerate(values)]
    assert Any().aggregate(details) == Any().aggregate(details[::-1]) == 1.0


def test_a_third_party_metric_is_used_by_its_name(monkeypatch):
    class Half(Scorer):
        name = "half"
        higher_is_better = False
        kinds = frozenset({"classification"})

        def score(self, scoring, indices):
            return [Detail(scoring.encoded.ids[i], 0.5, extra={"index": float(i)}) for i in indices]

    monkeypatch.setitem(SCORERS._targets, "half", Half)
    model, points = Linear(), task()
    score = evaluate(model, points, model.encode(points.eval), metric="half")
    assert score.value == 0.5 and not score.higher_is_better and score.details[3].extra == {"index": 3.0}


def test_every_registered_metric_loads_and_carries_its_own_name():
    for name in SCORERS.names():
        scorer = SCORERS.get(name)
        assert scorer.name == name and scorer.kinds and isinstance(scorer.higher_is_better, bool)
        assert scorer.__doc__ and SCORERS.describe(name)
    assert not math.isnan(len(SCORERS.names())) and len(SCORERS.names()) >= 7


def test_the_registry_is_read_without_importing_torch():
    import subprocess
    import sys

    code = "import sys; from clkit.evaluation import SCORERS; SCORERS.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
