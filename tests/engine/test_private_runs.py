"""Whole private runs: what they refuse, how they resume, what they write down and what they never do."""

import json
import math

import pytest
import torch
from privately import begin, moved
from torch import nn

from clkit import api, build, resolve
from clkit.engine import ENGINES
from clkit.engine.accounting import Noisy, epsilon_of, find_sigma, group_epsilon_of, sigma_for
from clkit.engine.guarantee import FILE, statement
from clkit.engine.private import PrivateEngine
from clkit.errors import CapabilityError, CheckpointError, ConfigError
from clkit.trainer import SequentialTrainer


@pytest.fixture
def content(text_content):
    """Three tasks of 8 records, 4 steps each at rate 1/2, with a checkpoint every 2 steps."""
    return {
        **text_content,
        "engine": {"name": "private", "noise_multiplier": 1.5, "accountant": "rdp", "device": "cpu"},
        "eval": {"initial": False},
    }


def privacy(run_dir):
    return json.loads((run_dir / "run.json").read_text())["privacy"]


def weights(run_dir):
    from safetensors.torch import load_file

    newest = sorted((run_dir / "checkpoints").glob("[0-9]*"))[-1]
    found = load_file(newest / "state.safetensors")
    return {k: v for k, v in found.items() if k.startswith("/model/")}


def cut_after(monkeypatch, steps, where="_step"):
    """Let the process end after that many steps, or within one, when the noise is drawn."""

    class Cut(Exception):
        pass

    owner = SequentialTrainer if where == "_step" else ENGINES.get("private")
    whole, done = getattr(owner, where), 0

    def step(self, *args):
        nonlocal done
        if done == steps:
            if where == "unscale":
                whole(self)
            raise Cut
        done += 1
        return whole(self, *args)

    monkeypatch.setattr(owner, where, step)
    return Cut


def test_a_run_says_what_it_spent_and_what_follows(content, tmp_path):
    result = api.run(resolve.validate(content))
    facts = privacy(result.run_dir)
    steps = 12
    assert facts["spent"] == [[1.5, 0.5, steps]] and facts["units"] == 24 and facts["void"] is None
    assert facts["epsilon"] == pytest.approx(epsilon_of([Noisy(1.5, 0.5, steps)], 0.1 / 24 if 0.1 / 24 < 1e-5 else 1e-5, "rdp"))  # fmt: skip
    assert facts["per_unit"] == "hooks" and facts["because"]
    events = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
    assert [e["per_unit"] for e in events if e["event"] == "privacy_plan"] == ["hooks"] * 3
    (last,) = [e for e in events if e["event"] == "privacy"]
    assert last["spent"] == facts["spent"] and last["epsilon"] == facts["epsilon"]
    plans = [e["planned_epsilon"] for e in events if e["event"] == "privacy_plan"]
    assert plans == pytest.approx([facts["epsilon"]] * 3)


def test_target_epsilon_finds_the_noise_before_training(content):
    content["engine"] = {"name": "private", "target_epsilon": 5.0, "accountant": "rdp", "device": "cpu"}
    result = api.run(resolve.validate(content))
    facts = privacy(result.run_dir)
    assert 4.98 < facts["epsilon"] <= 5.0 and facts["noise_multiplier"] > 0.5


def test_several_stages_under_one_noise_cost_at_most_the_target():
    stages = [(0.5, 4), (0.1, 30), (1.0, 2), (0.3, 0)]
    sigma = sigma_for(3.0, stages, 1e-5, "rdp")
    assert 2.98 < epsilon_of([Noisy(sigma, q, t) for q, t in stages], 1e-5, "rdp") <= 3.0
    assert sigma_for(3.0, [(0.5, 4)], 1e-5, "rdp") == find_sigma(3.0, 0.5, 4, 1e-5, "rdp")
    parts = [Noisy(1.0, 0.1, 30), Noisy(1.0, 0.1, 70)]
    assert epsilon_of(parts, 1e-5, "prv") == pytest.approx(epsilon_of([Noisy(1.0, 0.1, 100)], 1e-5, "prv"), abs=0.05)
    whole = group_epsilon_of([Noisy(1.0, 0.1, 100)], 1e-5, 3)
    assert group_epsilon_of(parts, 1e-5, 3) == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("where", ["_step", "unscale"])
def test_steps_taken_again_after_a_crash_count_twice(where, steps, content, monkeypatch):
    """Also the one in which the process ended, when its noise was drawn but no weight had moved."""
    config = resolve.validate(content)
    with monkeypatch.context() as patch:
        cut = cut_after(patch, steps, where)
        with pytest.raises(cut):
            api.run(config)
    drawn = steps + (where == "unscale")
    result = api.run(config)
    kept = steps - steps % 2
    facts = privacy(result.run_dir)
    assert facts["spent"] == [[1.5, 0.5, 12 - kept + drawn]]
    assert facts["epsilon"] > epsilon_of([Noisy(1.5, 0.5, 12)], facts["delta"], "rdp") or drawn == kept
    assert len((result.run_dir / FILE).read_text().splitlines()) == 12 - kept + drawn


def test_a_lost_or_shortened_count_stops_the_resume(content, monkeypatch):
    config = resolve.validate(content)
    with monkeypatch.context() as patch:
        cut = cut_after(patch, 5)
        with pytest.raises(cut):
            api.run(config)
    file = build.located(config).output_dir + f"/{FILE}"
    from pathlib import Path

    lines = Path(file).read_text()
    for damaged, message in ((lines[: len(lines) // 2 // 8 * 8], "fewer noisy|is cut|damaged"), ("1.5 half\n", "damaged"), (lines + "1.5", "is cut")):  # fmt: skip
        Path(file).write_text(damaged)
        with pytest.raises(CheckpointError, match=message):
            api.run(config)
    Path(file).unlink()
    with pytest.raises(CheckpointError, match="fewer noisy steps"):
        api.run(config)
    Path(file).write_text(lines)
    api.run(config)


def test_fresh_noise_after_a_resume_and_the_same_in_a_test(content, tmp_path, monkeypatch):
    def run(name, steps=None, **engine):
        config = resolve.validate({**content, "engine": {**content["engine"], **engine}, "output_dir": str(tmp_path / name)})  # fmt: skip
        if steps is not None:
            with monkeypatch.context() as patch:
                cut = cut_after(patch, steps)
                with pytest.raises(cut):
                    api.run(config)
        return weights(api.run(config).run_dir)

    def same(a, b):
        return all(torch.equal(a[k], b[k]) for k in a)

    whole = run("whole", test_seed=3)
    assert same(whole, run("again", test_seed=3))
    assert same(whole, run("cut", steps=5, test_seed=3)), "a test resumes bit for bit"
    assert not same(run("secret"), run("secret2")), "the same seed of the run, other noise"


def test_a_test_seed_voids_the_guarantee_wherever_epsilon_stands(content):
    content["engine"]["test_seed"] = 3
    result = api.run(resolve.validate(content))
    facts = privacy(result.run_dir)
    assert "nothing is guaranteed" in facts["void"] and facts["epsilon"] is None
    events = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
    for event in events:
        if event["event"].startswith("privacy"):
            assert event["void"] == facts["void"] and event.get("planned_epsilon") is None
    said = statement(facts, 2)
    assert said["void"] == facts["void"] and said["epsilon"] is None
    assert said["group"] == {"units": 2, "tight": None, "naive": None}


def test_no_seed_and_no_generator_is_written_down(content):
    result = api.run(resolve.validate(content))
    with api.open_run(result.run_dir) as trainer:
        state = trainer.engine.state_dict()
    assert set(state) == {"optimizer", "done", "total", "scaler", "spent"}
    assert set(privacy(result.run_dir)) == {
        *("unit", "units", "noise_multiplier", "clip", "delta", "accountant", "target_epsilon", "planned", "void"),
        *("per_unit", "because", "spent", "epsilon", "planned_epsilon"),
    }


def test_empty_batches_are_steps_of_a_run(content):
    content["train"] = {**content["train"], "batch_size": 1, "steps": 40}
    drawn = []
    trainer = begin(resolve.validate(content))
    for batch in trainer.loader:
        drawn.append(len(batch))
        trainer._step(batch, trainer.tasks[0])
    assert 0 in drawn, "at a rate of 1/8 a third of the batches is empty"
    assert sum(steps for _, _, steps in trainer.engine.facts["spent"]) == len(drawn)


def test_statement_gives_the_group_bound_tight_and_naive(content):
    result = api.run(resolve.validate(content))
    facts = privacy(result.run_dir)
    said = statement(facts, 3)
    spent = [Noisy(1.5, 0.5, 12)]
    assert said["group"]["tight"]["epsilon"] == pytest.approx(group_epsilon_of(spent, facts["delta"], 3))
    assert said["group"]["naive"]["epsilon"] == pytest.approx(3 * facts["epsilon"])
    assert said["assumptions"] and said["not_claimed"] and math.isfinite(said["epsilon"])
    json.dumps(said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": {"name": "naive", "replay": {"size": 4}}}, "strategy.replay.size: a rehearsed example"),
        ({"model": {"dtype": "float16"}}, "model.dtype: the loss scaling"),
        ({"train": {"clip": 0.0}}, "train.clip: 0 does not clip"),
        ({"engine": {"name": "private", "noise_multiplier": 1.0, "unit": "subject"}}, "engine.unit: subject needs a `subject`"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_privacy_is_refused_before_weights_are_loaded(change, message, content, monkeypatch):
    monkeypatch.setattr("clkit.build.load_model", lambda *a, **k: pytest.fail("weights were loaded"))
    merged = {k: {**content[k], **v} if isinstance(content.get(k), dict) and k != "strategy" else v for k, v in change.items()}  # fmt: skip
    with pytest.raises(CapabilityError, match=message):
        api.run(resolve.validate({**content, **merged}))


def test_batch_norm_is_refused_and_a_frozen_backbone_is_not(vision_content, monkeypatch):
    vision_content["engine"] = {"name": "private", "noise_multiplier": 1.0}
    with monkeypatch.context() as patch:
        patch.setattr("clkit.build.load_model", lambda *a, **k: pytest.fail("weights were loaded"))
        with pytest.raises(CapabilityError, match="batch normalisation"):
            api.run(resolve.validate(vision_content))
    frozen = {**vision_content, "model": {"name": "cifar-resnet-8", "freeze_backbone": True}}
    assert privacy(api.run(resolve.validate(frozen)).run_dir)["per_unit"] == "hooks"
    with pytest.raises(CapabilityError, match="batch normalisation"):
        made = build.make_model(resolve.validate(vision_content).model, build.make_tasks(resolve.validate(vision_content)), 0, print)  # fmt: skip
        ENGINES.get("private")(resolve.validate(vision_content).engine.config).prepare(made)


def test_batch_norm_is_refused_too_where_a_module_comes_in_evaluation_mode(vision_content):
    config = resolve.validate(vision_content)
    module = build.make_model(config.model, build.make_tasks(config), 0, print).module.eval()
    engine = {"name": "private", "noise_multiplier": 1.0, "device": "cpu"}
    private = resolve.validate({**vision_content, "model": {"name": "mlp"}, "engine": engine})
    with pytest.raises(CapabilityError, match="batch normalisation"):
        api.run(private, model=nn.Sequential(module).eval())
    assert not module.training


def test_running_statistics_of_instance_normalisation_are_refused_because_they_get_no_noise(vision_content):
    tasks = build.make_tasks(resolve.validate(vision_content))
    engine = {"name": "private", "noise_multiplier": 1.0, "device": "cpu"}
    private = resolve.validate({**vision_content, "model": {"name": "mlp"}, "engine": engine})

    def network(**options):
        first = nn.Conv2d(tasks[0].train.inputs.shape[1], 2, 3), nn.InstanceNorm2d(2, **options), nn.ReLU()
        return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 10))

    with pytest.raises(CapabilityError, match="running statistics"):
        api.run(private, model=network(track_running_stats=True))
    api.run(private, model=network(affine=True))


def test_strategies_whose_loss_couples_examples_are_refused(content):
    for name in ("lwf", "ilora", "reglora"):
        with pytest.raises(ConfigError, match=f"strategy '{name}' does not run on 'private'"):
            resolve.validate({**content, "strategy": name})


@pytest.mark.parametrize("given", [{}, {"noise_multiplier": 1.0, "target_epsilon": 1.0}])
def test_noise_is_given_in_exactly_one_way(given, content):
    with pytest.raises(ConfigError, match=r"engine.target_epsilon: give it or engine.noise_multiplier"):
        resolve.validate({**content, "engine": {"name": "private", **given}})


def test_no_noise_is_said_to_guarantee_nothing(content):
    content["engine"]["noise_multiplier"] = 0.0
    facts = privacy(api.run(resolve.validate(content)).run_dir)
    assert facts["void"] == "no noise was added, so nothing is guaranteed" and facts["epsilon"] is None


def test_noise_of_which_no_epsilon_follows_is_said_to_guarantee_nothing(content, monkeypatch):
    from clkit.plan import describe

    # What PRV gives at noise 0.1, rate 0.3 and 20 steps, after seconds.
    monkeypatch.setattr("clkit.engine.guarantee.epsilon_of", lambda *_: math.inf)
    facts = privacy(api.run(config := resolve.validate(content)).run_dir)
    assert "no finite epsilon" in facts["void"] and facts["epsilon"] is None
    assert statement(facts, 3)["void"] == facts["void"]
    assert f"no guarantee: {facts['void']}" in describe(config)


def test_an_engine_that_nobody_asked_before_refuses_and_plans_when_training_begins(content):
    config = resolve.validate(content)
    tasks = build.make_tasks(config)

    def trainer(strategy):
        model = build.make_model(config.model, tasks, config.seed, lambda text: None)
        return SequentialTrainer(model, strategy, config, engine=build.make_engine(config.engine))

    chosen = trainer(build.make_strategy(config.strategy))
    chosen.fit(tasks)
    assert chosen.engine.facts["spent"] == [[1.5, 0.5, 12]] and chosen.engine.facts["epsilon"] > 0
    replaying = resolve.validate({**content, "strategy": {"name": "naive", "replay": {"size": 4}}}).strategy
    with pytest.raises(CapabilityError, match="a rehearsed example"):
        trainer(build.make_strategy(replaying)).fit(tasks)


def test_an_engine_without_a_directory_counts_in_memory(content):
    trainer = begin(resolve.validate(content))
    assert isinstance(trainer.engine, PrivateEngine)
    moved(trainer, [0])
    assert trainer.engine.state_dict()["spent"] == {"history": [[1.5, 0.5, 1]]}
    trainer.engine.finish()


def test_a_plan_says_the_noise_and_what_it_buys(content):
    from clkit.plan import describe

    said = describe(resolve.validate({**content, "engine": {**content["engine"], "accountant": "rdp"}}))
    assert "private: 24 records drawn at rate 0.5, clipped to 1, noise multiplier 1.5; epsilon" in said
    voided = describe(resolve.validate({**content, "engine": {**content["engine"], "test_seed": 1}}))
    assert "no guarantee: engine.test_seed" in voided and "epsilon" not in voided
