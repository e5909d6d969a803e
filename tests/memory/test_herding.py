"""Herding: the published order, prefixes, shares, and that a run with it is what its plan says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clkit import api, build, resolve
from clkit.errors import CapabilityError
from clkit.memory import HerdingBuffer, Ref, class_mean, herd, make_buffer
from clkit.memory.herding import held_after
from clkit.rng import fresh_generator


@pytest.fixture(scope="module")
def tables(data_root):
    with np.load(data_root.parent / "golden" / "memo" / "tables.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("name", ["herd0", "herd1", "herd2"])
def test_the_published_order_and_mean(tables, name):
    features = torch.from_numpy(tables[f"{name}/features"])
    order = herd(features, int(tables[f"{name}/m"]))
    assert order.tolist() == tables[f"{name}/order"].tolist()
    np.testing.assert_allclose(class_mean(features[order]).numpy(), tables[f"{name}/class_mean"], atol=1e-6)


def test_the_published_memory_over_three_tasks(tables):
    counts, sizes = tables["mem/samples_per_class"], tables["mem/task_sizes"].tolist()
    starts = np.concatenate([[0], np.cumsum(counts)])
    buffer, seen = HerdingBuffer(int(tables["mem/memory_size"])), 0
    for stage, new in enumerate(sizes):
        features = torch.from_numpy(tables[f"mem/s{stage}/features"])
        refs = [Ref(stage, int(starts[c] + i), c, "") for c in range(seen, seen + new) for i in range(counts[c])]
        buffer.select(refs, features[[ref.index for ref in refs]])
        seen += new
        # Theirs gives each class the floor of its share; ours hands out the rest too, which goes on in the same order.
        per_class, held = int(tables[f"mem/s{stage}/per_class"]), {c: [] for c in range(seen)}
        for ref in buffer.refs:
            held[ref.label].append(ref.index - int(starts[ref.label]))
        assert len(buffer) == int(tables["mem/memory_size"])
        theirs = list(zip(tables[f"mem/s{stage}/exemplar_class"], tables[f"mem/s{stage}/exemplar_row"], strict=True))
        assert [(c, row) for c, rows in held.items() for row in rows[:per_class]] == theirs
        for c, rows in held.items():
            mean = class_mean(features[[int(starts[c]) + row for row in rows[:per_class]]])
            np.testing.assert_allclose(mean.numpy(), tables[f"mem/s{stage}/class_means"][c], atol=1e-6)


def test_fewer_picks_are_a_prefix_and_every_pick_is_the_nearest_there_is():
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    order = herd(features, 30).tolist()
    assert sorted(order) == list(range(30)) and herd(features, 7).tolist() == order[:7]
    rows = torch.nn.functional.normalize(features.double(), dim=1)
    mean = rows.mean(dim=0)
    for k in range(1, 31):
        gaps = {
            i: float((mean - rows[[*order[: k - 1], i]].mean(dim=0)).norm()) for i in set(range(30)) - {*order[: k - 1]}
        }
        assert gaps[order[k - 1]] == pytest.approx(min(gaps.values()), abs=1e-7)


def test_shares_shrink_by_prefixes_and_sum_to_the_size():
    buffer, rng = make_buffer("herding", 11), torch.Generator().manual_seed(1)
    before: dict[int, list[int]] = {}
    for task in range(4):
        refs = [Ref(task, i, 2 * task + i % 2, f"{task}/{i}") for i in range(12)]
        buffer.select(refs, torch.rand(12, 3, generator=rng), size=11 - task)
        now: dict[int, list[int]] = {}
        for ref in buffer.refs:
            now.setdefault(ref.label, []).append(ref.index)
        assert len(buffer) == 11 - task
        assert all(before[c][: len(rows)] == rows for c, rows in now.items() if c in before)
        groups = {f"task {c // 2} class {c}": 6 for c in range(2 * task + 2)}
        assert held_after(groups, 11 - task) == len(buffer)
        before = now
    other = make_buffer("herding", 11)
    other.load_state_dict(buffer.state_dict())
    assert other.refs == buffer.refs and other.size == 8 and other.state_dict()["ids"] == buffer.state_dict()["ids"]
    buffer.select(buffer.refs, torch.rand(len(buffer), 3))
    assert other.refs == buffer.refs, "records that were taken before are not taken twice"


def herding(content, **options):
    return {**content, "strategy": {"name": "replay", "replay": {"size": 15, "policy": "herding", **options}}}


@pytest.mark.parametrize("mix", ["auto", "batch"])
def test_a_run_takes_the_steps_that_are_planned_and_holds_the_shares(vision_content, mix):
    config = resolve.validate(herding(vision_content, mix=mix))
    tasks = build.make_tasks(config)
    planned = build.stage_steps(config, tasks)
    result = api.run(config)
    with api.open_run(result.run_dir) as trainer:
        buffer = trainer.strategy.buffer
        assert len(buffer) == 15 and {ref.label for ref in buffer.refs} == set(range(10))
        assert trainer.position.total_steps == sum(planned)
    assert (planned[-1] > planned[0]) == (mix == "auto")


def test_an_epoch_of_the_union_holds_every_new_example_and_every_exemplar_once(vision_content):
    config = resolve.validate(herding(vision_content))
    with api.open_run(api.run(config).run_dir) as trainer:
        trainer.position.stage, trainer.position.step = 4, 0
        strategy = trainer.strategy
        buffer = [ref for ref in strategy.buffer.refs if ref.task < 4]
        batches = list(strategy.step_loader())
        new = [i for b in batches for i, old in zip(b.ids, b.replayed.tolist(), strict=True) if not old]
        old = [i for b in batches for i, old in zip(b.ids, b.replayed.tolist(), strict=True) if old]
        assert sorted(new) == sorted(trainer.tasks[4].train.ids) and sorted(old) == sorted(ref.id for ref in buffer)
        assert [b.ids for b in list(strategy.step_loader())[1:]] != [b.ids for b in batches[:-1]]


def test_a_model_without_features_is_refused(text_content):
    with pytest.raises(CapabilityError, match="'herding' chooses by features"):
        api.run(resolve.validate(herding(text_content)))


def test_the_generators_of_replay_are_not_drawn_from_by_the_union(vision_content):
    config = resolve.validate(herding(vision_content))
    with api.open_run(api.run(config).run_dir) as trainer:
        for name in ("replay draw", "replay keep"):
            fresh = fresh_generator(0, "stream", name).get_state()
            assert torch.equal(trainer.run.streams[name].get_state(), fresh)


def test_a_run_that_is_cut_resumes_exactly(vision_content, tmp_path, monkeypatch):
    from clkit.trainer import SequentialTrainer

    whole = api.run(resolve.validate({**herding(vision_content), "output_dir": str(tmp_path / "whole")}))
    config = resolve.validate({**herding(vision_content), "output_dir": str(tmp_path / "cut")})
    plain, left = SequentialTrainer._step, [0]

    class Cut(Exception):
        pass

    def step(self, batch, task):
        if not left[0]:
            raise Cut
        left[0] -= 1
        return plain(self, batch, task)

    monkeypatch.setattr(SequentialTrainer, "_step", step)
    for steps in (4, 5, 3):
        left[0] = steps
        with pytest.raises(Cut):
            api.run(config)
    left[0] = 10**6
    resumed = api.run(config)
    np.testing.assert_array_equal(resumed.matrix, whole.matrix)
    with api.open_run(whole.run_dir) as one, api.open_run(resumed.run_dir) as two:
        assert one.strategy.buffer.refs == two.strategy.buffer.refs
