"""I-LoRA's slow learner, loss and options, on the tiny Llama; published numbers are in test_ilora_published.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from clkit import api, build, resolve
from clkit.errors import ConfigError
from clkit.strategies.ilora.consistency import find_decoder, showing, squared_gap
from clkit.strategies.ilora.strategy import ILoRAConfig, ema_weight, interpolate_
from clkit.trainer import SequentialTrainer


def settings(content, name="ilora", model=None, train=None, **options):
    return resolve.validate(
        {
            **content,
            "strategy": {"name": name, "replay": {"size": 8}, **options},
            "model": {**content["model"], **(model or {})},
            "train": {**content["train"], **(train or {})},
        }
    )


@pytest.fixture
def started(text_content):
    """Make a trainer that stands before its first step; ``stage`` earlier tasks are taken as learned."""

    def start(stage=1, batch_size=4, model=None, train=None, **options):
        config = settings(text_content, model=model, train=train, **options)
        tasks = build.make_tasks(config)
        loaded = build.make_model(config.model, tasks, config.seed, lambda text: None)
        trainer = SequentialTrainer(loaded, build.make_strategy(config.strategy), config)
        trainer.prepare(tasks)
        trainer.position.stage = stage
        perturb(trainer)
        return trainer

    return start


def perturb(trainer, seed=3):
    """Give both learners weights of their own: B is 0 at the start, and then there is nothing to compare."""
    draw = torch.Generator().manual_seed(seed)
    for learner in (trainer.strategy._fast, trainer.strategy.slow):
        for value in learner.values():
            value.data = (torch.randn(value.shape, generator=draw) * 0.2).to(value.dtype)


def joint_batch(trainer, new=(0, 1, 2), old=(1, 4), extra=0):
    """New rows of task 2 and replayed rows of task 1, which are shorter ("red" and "blue"), padded by ``extra``."""
    from clkit.loader import Pool

    encodings = trainer.run.encodings
    pool = Pool([encodings.train(1), encodings.train(0)])
    batch = pool.batch(torch.tensor([*new, *(len(encodings.train(1)) + i for i in old)]))
    batch.replayed = torch.arange(len(batch)) >= len(new)
    batch.inputs = {k: nn.functional.pad(v, (0, extra)) for k, v in batch.inputs.items()}
    batch.labels = nn.functional.pad(batch.labels, (0, extra), value=-100)
    return batch


def states(trainer, batch, learner):
    """All hidden states (L+1 tensors) the usual way."""
    with trainer.strategy.learner(learner) as module:
        return module(**batch.inputs, output_hidden_states=True, use_cache=False).hidden_states


def expected_consistency(trainer, batch, one_sided=False, layers=(1, 2)):
    rows = batch.rows(batch.replayed)
    mask = rows.inputs["attention_mask"].bool()
    fast, slow = states(trainer, rows, "fast"), states(trainer, rows, "slow")
    gaps = [(fast[k] - slow[k].detach())[mask] for k in layers]
    gaps = [g.clamp(max=0) if one_sided else g for g in gaps]
    return torch.stack([g.square().mean() for g in gaps]).mean()


# --- the slow learner ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("interpolation", [0.0, 0.25, 0.9, 0.99, 1.0])
def test_the_shadow_is_the_closed_form_of_the_average_in_float64(interpolation):
    draw = torch.Generator().manual_seed(0)
    path = [torch.randn(3, 5, generator=draw, dtype=torch.float64) for _ in range(41)]
    fast = {"w": nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))}
    slow = {"w": path[0].clone()}
    for value in path[1:]:
        fast["w"].data = value.clone()
        interpolate_(slow, fast, interpolation)
        assert torch.equal(fast["w"], value)
    steps = len(path) - 1
    closed = interpolation**steps * path[0]
    for k in range(1, steps + 1):
        closed = closed + (1 - interpolation) * interpolation ** (steps - k) * path[k]
    assert torch.allclose(slow["w"], closed, rtol=0, atol=1e-12)


def test_training_moves_the_shadow_and_leaves_base_and_fast_weights_alone(text_content, monkeypatch):
    """Fails for the published update, which finds no parameter of the slow adapter and so changes nothing."""
    seen = []
    plain = SequentialTrainer._step

    def step(self, batch, task):
        before = {k: v.clone() for k, v in self.strategy.slow.items()}
        terms = plain(self, batch, task)
        fast = {k: v.detach().clone() for k, v in self.strategy._fast.items()}
        seen.append((before, fast, {k: v.clone() for k, v in self.strategy.slow.items()}))
        return terms

    monkeypatch.setattr(SequentialTrainer, "_step", step)
    config = settings(text_content, interpolation=0.5)
    tasks = build.make_tasks(config)
    model = build.make_model(config.model, tasks, config.seed, lambda text: None)
    base = {k: v.clone() for k, v in model.module.named_parameters() if "lora" not in k}
    trainer = SequentialTrainer(model, build.make_strategy(config.strategy), config)
    trainer.fit(tasks)
    assert all(torch.equal(v, base[k]) for k, v in model.module.named_parameters() if "lora" not in k)
    for before, fast, after in seen:
        for name in before:
            assert torch.allclose(after[name], 0.5 * before[name] + 0.5 * fast[name], atol=1e-7)
    first, last = seen[0][0], seen[-1][2]
    assert all((first[name] - last[name]).abs().max() > 1e-4 for name in first)


def test_a_float32_shadow_follows_a_bfloat16_adapter_where_a_bfloat16_one_stalls(started):
    trainer = started(slow="ema", interpolation=0.99, train={"optimizer": "sgd"})
    strategy = trainer.strategy
    for p in strategy._fast.values():
        p.data = p.data.bfloat16()
    exact = {k: v.double() for k, v in strategy.slow.items()}
    rough = {k: v.bfloat16() for k, v in strategy.slow.items()}
    target = {k: p.detach().clone() for k, p in strategy._fast.items()}
    for _ in range(500):
        strategy.after_step()
        for k, value in target.items():
            exact[k].lerp_(value.double(), 0.01)
            rough[k].lerp_(value, 0.01)
    assert {v.dtype for v in strategy.slow.values()} == {torch.float32}
    assert max(float((strategy.slow[k] - exact[k]).abs().max()) for k in exact) < 1e-3
    assert max(float((rough[k] - exact[k]).abs().max()) for k in exact) > 1e-2
    with strategy.learner("slow") as module:
        served = dict(module.named_parameters())
        assert all(torch.equal(served[k], v.bfloat16()) for k, v in strategy.slow.items())
    assert all(torch.equal(p, target[k]) for k, p in strategy._fast.items())


def test_a_model_held_in_bfloat16_trains_and_keeps_a_float32_shadow(text_content):
    result = api.run(settings(text_content, model={"dtype": "bfloat16"}))
    assert not np.isnan(result.matrix[np.tril_indices(3)]).any()
    with api.open_run(result.run_dir) as trainer:
        assert {v.dtype for v in trainer.strategy.slow.values()} == {torch.float32}
        assert {p.dtype for n, p in trainer.model.module.named_parameters() if "lora" not in n} == {torch.bfloat16}


def test_in_mixed_precision_each_learner_computes_with_its_own_weights(started):
    trainer = started(model={"dtype": "bfloat16"})
    strategy, module, batch = trainer.strategy, trainer.model.module, joint_batch(trainer)
    with trainer.engine.autocast():
        terms = strategy.loss(batch)
    sum(terms.values()).backward()
    joint = {k: p.grad.clone() for k, p in strategy._fast.items()}
    with trainer.engine.autocast():
        fast, slow = states(trainer, batch, "fast"), states(trainer, batch, "slow")
        alone = trainer.model.loss(batch)
        kept = strategy._slow_states(batch.rows(batch.replayed), *find_decoder(module), [1, 2])
    mask = batch.inputs["attention_mask"].bool()
    places = mask & batch.replayed[:, None]
    gaps = [(fast[k][places] - slow[k][places].detach()).float().square().mean() for k in (1, 2)]
    assert torch.equal(terms["cross_entropy"], alone)
    assert terms["consistency"] > 1e-2 and torch.allclose(terms["consistency"], sum(gaps) / 2, rtol=1e-3)
    own = mask[batch.replayed][:, : int(mask[batch.replayed].sum(1).max())]
    rows = batch.rows(batch.replayed)
    rows.inputs = {k: v[:, : own.shape[1]] for k, v in rows.inputs.items()}
    module.zero_grad()
    with trainer.engine.autocast():
        expected = states(trainer, rows, "slow")
    assert all(torch.equal(kept[k], expected[k][own]) for k in (1, 2))  # the shadow is rounded as autocast rounds it
    (alone + sum(gaps) / 2).backward()
    for name, p in strategy._fast.items():
        assert (joint[name] - p.grad).norm() < 0.1 * p.grad.norm(), name


def test_with_interpolation_1_the_slow_learner_never_moves_and_with_0_it_is_the_fast_one(started):
    trainer = started(interpolation=1.0)
    before = {k: v.clone() for k, v in trainer.strategy.slow.items()}
    trainer.strategy.after_step()
    assert all(torch.equal(v, before[k]) for k, v in trainer.strategy.slow.items())
    trainer = started(interpolation=0.0)
    trainer.strategy.after_step()
    assert all(torch.equal(v, trainer.strategy._fast[k]) for k, v in trainer.strategy.slow.items())
    # Not 0: products of other heights may round differently.
    assert float(trainer.strategy.loss(joint_batch(trainer))["consistency"].detach()) < 1e-12


def test_a_snapshot_equals_the_fast_learner_after_a_task_and_stays_there_until_the_next(started):
    trainer = started(slow="snapshot")
    strategy, batch = trainer.strategy, joint_batch(trainer)
    assert float(strategy.loss(batch)["consistency"].detach()) > 1e-3
    strategy.end_task(trainer.tasks[1])
    assert float(strategy.loss(batch)["consistency"].detach()) < 1e-12
    kept = {k: v.clone() for k, v in strategy.slow.items()}
    for p in strategy._fast.values():
        p.data += 0.1
    strategy.after_step()
    assert all(torch.equal(v, kept[k]) for k, v in strategy.slow.items())


def test_base_anchors_to_the_untrained_model(text_content):
    config = settings(text_content, slow="base", serve="fast")
    tasks = build.make_tasks(config)
    model = build.make_model(config.model, tasks, config.seed, lambda text: None)
    trainer = SequentialTrainer(model, build.make_strategy(config.strategy), config)
    trainer.fit(tasks)
    batch = trainer.run.encodings.train(0).batch(torch.arange(3))
    with torch.no_grad(), trainer.strategy.learner("slow") as module:
        slow = module(**batch.inputs).logits
        with module.disable_adapter():
            assert torch.equal(slow, module(**batch.inputs).logits)
    assert not torch.allclose(slow, model.module(**batch.inputs).logits, atol=1e-3)


def test_the_ramp_forgets_early_values_sooner_and_never_exceeds_the_limit(started):
    assert [ema_weight(k, 0.9, True) for k in range(12)] == [min(1 - 1 / (k + 1), 0.9) for k in range(12)]
    assert {ema_weight(k, 0.9, False) for k in range(12)} == {0.9}
    trainer = started(interpolation=0.9, ramp=True)
    strategy = trainer.strategy
    before = {k: v.clone() for k, v in strategy.slow.items()}
    trainer.position.total_steps = 1
    strategy.after_step()
    for k, value in strategy.slow.items():
        assert torch.allclose(value, (before[k] + strategy._fast[k]) / 2, atol=1e-7)


# --- the loss -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["mse", "hinge"])
def test_consistency_equals_the_plain_expression_in_value_and_gradient(started, kind):
    trainer = started(consistency=kind, gamma=0.5)
    batch, parameters = joint_batch(trainer), list(trainer.strategy._fast.values())
    ours = trainer.strategy.loss(batch)["consistency"]
    plain = 0.5 * expected_consistency(trainer, batch, one_sided=kind == "hinge")
    assert plain > 1e-3
    assert torch.allclose(ours, plain, rtol=1e-6)
    for mine, theirs in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(plain, parameters), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("one_sided", [False, True])
def test_the_squared_gap_has_the_gradient_that_autograd_finds(one_sided):
    draw = torch.Generator().manual_seed(0)
    fast = torch.randn(4, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    slow = torch.randn(4, 6, generator=draw, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: squared_gap(x, slow, one_sided), (fast,))
    half = squared_gap(fast.bfloat16(), slow.bfloat16(), one_sided)
    assert half.dtype == torch.float32
    assert float(half.detach()) == pytest.approx(float(squared_gap(fast.detach(), slow, one_sided)), rel=2e-2)


def test_padding_changes_nothing(started):
    trainer = started()
    plain, padded = (trainer.strategy.loss(joint_batch(trainer, extra=n)) for n in (0, 9))
    assert plain.keys() == padded.keys() == {"cross_entropy", "consistency"}
    for name in plain:
        assert torch.allclose(plain[name], padded[name], rtol=1e-6)
    batch = joint_batch(trainer, extra=9)
    fast, slow = (states(trainer, batch.rows(batch.replayed), which) for which in ("fast", "slow"))
    everywhere = torch.stack([(fast[k] - slow[k]).square().mean() for k in (1, 2)]).mean()
    assert not torch.allclose(everywhere, padded["consistency"], rtol=1e-2)


@pytest.mark.parametrize(("layers", "meant"), [([1], [1]), ([-1], [2]), ([2, 1, -2], [1, 2])])
def test_only_the_layers_asked_for_are_compared(started, layers, meant):
    trainer = started(layers=layers)
    batch = joint_batch(trainer)
    ours = trainer.strategy.loss(batch)["consistency"]
    assert torch.allclose(ours, expected_consistency(trainer, batch, layers=meant), rtol=1e-6)


def test_new_rows_have_no_part_in_consistency_and_the_first_task_has_none(started):
    trainer = started()
    one, other = (trainer.strategy.loss(joint_batch(trainer, new=new)) for new in ((0, 1, 2), (3, 4, 5)))
    assert torch.allclose(one["consistency"], other["consistency"], rtol=1e-6)
    assert not torch.allclose(one["cross_entropy"], other["cross_entropy"], rtol=1e-6)
    fresh = trainer.run.encodings.train(0).batch(torch.arange(4))
    terms = trainer.strategy.loss(fresh)
    assert terms.keys() == {"cross_entropy"}
    assert torch.equal(terms["cross_entropy"], trainer.model.loss(fresh))


@pytest.mark.parametrize("serve", ["fast", "slow"])
def test_without_consistency_training_is_replay_to_the_last_bit(text_content, tmp_path, serve):
    found = []
    for name, options in (("ilora", {"gamma": 0.0, "serve": serve}), ("replay", {})):
        config = settings({**text_content, "output_dir": str(tmp_path / name)}, name=name, **options)
        result = api.run(config)
        with api.open_run(result.run_dir) as trainer:
            found.append((result, {k: v.clone() for k, v in trainer.strategy.model_state().items()}))
    (ours, our_weights), (theirs, their_weights) = found
    assert our_weights.keys() == their_weights.keys()
    assert all(torch.equal(our_weights[k], their_weights[k]) for k in our_weights)
    if serve == "fast":
        np.testing.assert_array_equal(ours.matrix, theirs.matrix)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_equal_one_batch_and_the_shadow_moves_once_per_step(started, compat, size):
    options = {"compat": True} if compat else {}
    found = []
    for micro in (0, size):
        trainer = started(train={"micro_batch": micro, "optimizer": "sgd", "clip": 0.0}, **options)
        trainer._start_optimizer(4)
        gradients = {}
        plain = trainer.strategy.after_backward
        trainer.strategy.after_backward = lambda t=trainer, g=gradients, p=plain: (
            p(),
            g.update({k: v.grad.clone() for k, v in t.strategy._fast.items()}),
        )
        calls = []
        after = trainer.strategy.after_step
        trainer.strategy.after_step = lambda a=after, c=calls: (a(), c.append(1))
        terms = trainer._step(joint_batch(trainer), trainer.tasks[1])
        assert len(calls) == 1
        found.append((terms, gradients, trainer.strategy.slow))
    (terms, gradients, slow), (parts, part_gradients, part_slow) = found
    assert terms.keys() == parts.keys()
    for name in terms:
        assert torch.allclose(terms[name], parts[name], rtol=1e-5), name
    for name in gradients:
        assert torch.allclose(gradients[name], part_gradients[name], rtol=1e-4, atol=1e-7)
        assert torch.allclose(slow[name], part_slow[name], atol=1e-7)


def test_gradient_checkpointing_gives_the_same_losses_and_gradients(started):
    found = []
    for checkpointing in (False, True):
        trainer = started(model={"gradient_checkpointing": checkpointing})
        trainer.model.module.train()
        terms = trainer.strategy.loss(joint_batch(trainer))
        sum(terms.values()).backward()
        found.append((terms, {k: p.grad for k, p in trainer.strategy._fast.items()}))
    (terms, gradients), (again, others) = found
    assert all(torch.allclose(terms[k], again[k], rtol=1e-6) for k in terms)
    assert all(torch.allclose(gradients[k], others[k], rtol=1e-5, atol=1e-8) for k in gradients)
    assert all(g.abs().max() > 0 for g in gradients.values())


def test_dropout_acts_on_the_fast_learner_only(started):
    trainer = started(model={"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"], "dropout": 0.5}})
    module, strategy = trainer.model.module, trainer.strategy
    module.train()
    batch = joint_batch(trainer)
    decoder, blocks = find_decoder(module)
    once, again = (strategy._slow_states(batch.rows(batch.replayed), decoder, blocks, [1, 2]) for _ in range(2))
    assert all(torch.equal(once[k], again[k]) for k in (1, 2))
    assert module.training and all(m.training for m in module.modules())
    first, second = (strategy.loss(batch)["consistency"].detach() for _ in range(2))
    assert not torch.equal(first, second)


def test_looking_at_hidden_states_leaves_the_model_as_it_was(started):
    trainer = started()
    decoder, blocks = find_decoder(trainer.model.module)
    before = list(blocks)
    with pytest.raises(ZeroDivisionError), showing(decoder, blocks, [1, 2], lambda k, value: 1 / 0):
        trainer.model.logits(joint_batch(trainer))
    assert list(blocks) == before
    assert not decoder._forward_hooks
    trainer.model.logits(joint_batch(trainer))


def test_consistency_keeps_one_difference_per_layer_for_the_backward_pass_and_no_hidden_states(started):
    def kept(**options):
        trainer, found = started(**options), {}
        trainer.strategy._output = None  # whole logits in both, so that the rest can be told apart

        def pack(tensor):
            found[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            terms = trainer.strategy.loss(joint_batch(trainer))
        assert len(terms) == (2 if options["gamma"] else 1)
        return sum(t.untyped_storage().nbytes() for t in found.values())

    tokens = int(joint_batch(started()).inputs["attention_mask"][3:].sum())
    plain, small = kept(gamma=0.0), 8 * tokens + 128  # the positions, and a few numbers
    for layers in ([-1], [1, 2]):
        more = kept(gamma=1.0, layers=layers) - plain
        states = len(layers) * tokens * 32 * 4
        assert states <= more <= states + small


# --- options, refusals, what is served ----------------------------------------------------------------------------
def test_both_learners_are_scored_and_either_is_exported(text_content, tmp_path):
    from safetensors.torch import load_file

    for serve, other in (("slow", "fast"), ("fast", "slow")):
        content = {**text_content, "output_dir": str(tmp_path / serve)}
        result = api.run(settings(content, serve=serve, interpolation=0.999))
        assert list(result.further) == [other]
        scores = result.further[other]
        assert not np.isnan(scores.matrix[np.tril_indices(3)]).any() and scores.task_metrics == result.task_metrics
        events = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
        last = [e["value"] for e in events if e["event"] == "score" and e.get("weights") == other][-3:]
        assert last == scores.matrix[2].tolist()
        exported = load_file(result.run_dir / "export" / "adapter_model.safetensors")
        with api.open_run(result.run_dir) as trainer:
            strategy = trainer.strategy
            kept = strategy.slow if serve == "slow" else strategy._fast
            assert all(torch.equal(exported[k.replace(".default", "")], v.detach()) for k, v in kept.items())
            assert any(not torch.equal(strategy.slow[k], p) for k, p in strategy._fast.items())
            with strategy.learner(other):
                assert [trainer.score_task(task).value for task in trainer.tasks] == last


def test_compat_stands_for_the_published_numbers_and_contradictions_are_refused(text_content):
    assert ILoRAConfig().replay.size == 500
    config = settings(text_content, compat=True)
    effective = build.make_strategy(config.strategy).config
    assert (effective.interpolation, effective.consistency, effective.gamma) == (0.25, "hinge", 1.0)
    with pytest.raises(ConfigError) as error:
        settings(text_content, compat=True, gamma=0.3, interpolation=0.5, layers=[1])
    for key in ("gamma", "interpolation", "layers"):
        assert f"strategy.{key}" in str(error.value)


def test_options_that_can_not_work_are_refused_before_training(text_content, started):
    with pytest.raises(ConfigError, match=r"strategy\.replay\.size.*expected >= 1"):
        settings(text_content, replay={"size": 0})
    with pytest.raises(ConfigError, match=r"strategy\.serve.*serve=fast"):
        settings(text_content, slow="base")
    with pytest.raises(ConfigError, match=r"model\.lora\.r.*needs a LoRA adapter"):
        settings(text_content, model={"lora": {"r": 0}})
    with pytest.raises(ConfigError, match="got 3, expected at least 4"):
        started(replay={"size": 3})
    for layers in ([3], [-3], [0]):
        with pytest.raises(ConfigError, match=r"strategy\.layers: got .*expected 1 to 2"):
            started(layers=layers)
