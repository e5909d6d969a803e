"""DP2Unlearning: base, deployment and requests; what the certificate says of them, and what is refused."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from people import PEOPLE, nothing_forgotten, request

from clkit import api, build, resolve
from clkit.checkpoint import CheckpointStore, digest
from clkit.cli import main
from clkit.engine.accounting import Noisy, epsilon_of, group_epsilon_of
from clkit.errors import CheckpointError, ConfigError
from clkit.strategies.dp2unlearning.base import open_base
from clkit.strategies.dp2unlearning.rewrite import DpPrompt
from clkit.strategies.dp2unlearning.rewritten import write_tasks
from clkit.unlearning.records import records, without

SIGMA = 4.0


def start(content, name, folder, **changes) -> Path:
    """Do one run through the command line."""
    content = {**copy.deepcopy(content), **changes, "output_dir": str(folder / "runs" / name)}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["run", str(file), "--quiet"]) == 0
    return Path(content["output_dir"])


def protected(content, folder, name="m0", **engine) -> Path:
    chosen = {"name": "private", "noise_multiplier": SIGMA, "accountant": "rdp", "unit": "record", **engine}
    return start(content, name, folder, engine=chosen)


@pytest.fixture
def m0(people_content, tmp_path):
    return protected(people_content, tmp_path)


@pytest.fixture
def deployed(people_content, tmp_path, m0):
    return start(people_content, "deployed", tmp_path, strategy={"name": "dp2unlearning", "base": str(m0)})


def unlearn(run_dir, file, *more) -> int:
    arguments = ["--method", "dp2unlearning", "--max-utility-loss", "1", "--keep-near-duplicates", *more]
    return main(["unlearn", "--run", str(run_dir), "--request", str(file), *arguments])


def certificates(run_dir) -> list[tuple[Path, dict]]:
    found = (run_dir.parent / "unlearning").glob("*/certificate.json")
    loaded = [(path, json.loads(path.read_text())) for path in found]
    return sorted(loaded, key=lambda pair: pair[1]["records"]["forgotten"]["count"])


def new_run(path, content) -> Path:
    return (path.parent / content["new_run"]["path"]).resolve()


def exported(run_dir) -> bytes:
    return (run_dir / "export" / "adapter_model.safetensors").read_bytes()


def training_ids(run_dir, person=None) -> list[str]:
    """Ids of training records (about a person), as the run's files have them."""
    tasks = build.make_tasks(resolve.load(run_dir / "config.yaml"))
    trained = [r for r in records(tasks) if r.place.part == "train"]
    return [r.id for r in trained if person in (None, r.fields["subject"])]


def test_the_deployed_run_starts_from_the_bases_weights(m0, people_content, tmp_path):
    config = resolve.validate({**people_content, "strategy": {"name": "dp2unlearning", "base": str(m0)}})
    tasks = build.make_tasks(config)
    strategy = build.make_strategy(config.strategy)
    model = build.make_model(config.model, tasks, config.seed, lambda text: None)
    from clkit.trainer import SequentialTrainer

    trainer = SequentialTrainer(model, strategy, config)
    trainer.prepare(tasks)
    base = open_base(m0)
    assert digest(strategy.model_state()) == digest(base.weights())
    assert any("lora_B" in name and float(value.abs().sum()) > 0 for name, value in base.weights().items())


def test_a_request_is_served_from_the_base_as_if_the_records_had_never_been_there(
    deployed, m0, people_content, write, tmp_path
):
    ids = training_ids(m0)[:2]
    assert unlearn(deployed, write(request({"record_ids": ids}))) == 0
    ((path, content),) = certificates(deployed)
    tasks = build.make_tasks(resolve.load(deployed / "config.yaml"))
    gone = {r.place for r in records(tasks) if r.id in ids}
    elsewhere = resolve.validate(
        {
            **people_content,
            "strategy": {"name": "dp2unlearning", "base": str(m0)},
            "output_dir": str(tmp_path / "elsewhere" / "clean"),
        }
    )
    clean = api.run(elsewhere, tasks=without(tasks, gone))
    assert exported(new_run(path, content)) == exported(clean.run_dir), "bit for bit, with the records deleted"
    assert exported(new_run(path, content)) != exported(deployed)

    said = content["guarantee"]
    privacy = json.loads((m0 / "run.json").read_text())["privacy"]
    spent = [Noisy(*row) for row in privacy["spent"]]
    assert said["unit"] == "record" and said["noise_multiplier"] == SIGMA and said["clip"] == 1.0
    assert said["epsilon"] == pytest.approx(epsilon_of(spent, said["delta"], "rdp"))
    assert said["group"]["units"] == 2
    assert said["group"]["tight"]["epsilon"] == pytest.approx(group_epsilon_of(spent, said["delta"], 2))
    assert said["group"]["naive"]["epsilon"] == pytest.approx(2 * said["epsilon"])
    assert "the same two phases" in said["compared_with"] and said["assumptions"] and said["not_claimed"]
    page = (path.parent / "certificate.md").read_text()
    assert "| noise multiplier | 4.0 |" in page and "It assumes:" in page and "adaptive requests" in page
    for secret in (*ids, "Ada"):
        assert secret not in page and secret not in path.read_text()


def test_requests_in_sequence_restart_from_the_base_and_bound_all_that_is_forgotten(deployed, m0, write):
    first, second = training_ids(m0)[:2], training_ids(m0)[-1:]
    assert unlearn(deployed, write(request({"record_ids": first}))) == 0
    assert unlearn(deployed, write(request({"record_ids": second}, request_id="R-2"))) == 0
    (_, one), (path, both) = certificates(deployed)
    assert [c["guarantee"]["group"]["units"] for c in (one, both)] == [2, 3]
    assert one["guarantee"]["rests_on"] == both["guarantee"]["rests_on"]
    with api.open_run(new_run(path, both)) as trainer:
        assert trainer.strategy.state_dict()["base"] == both["guarantee"]["rests_on"]["weights"]
        left = {i for task in trainer.tasks for i in task.train.ids}
    assert not left & {*first, *second}


@pytest.mark.parametrize("unit", ["record", "subject"])
def test_requests_are_served_from_the_base_when_forgotten_records_are_gone_from_the_files(
    unit, people_content, tmp_path, write, capsys
):
    base = protected(people_content, tmp_path, unit=unit)
    run_dir = start(people_content, "deployed", tmp_path, strategy={"name": "dp2unlearning", "base": str(base)})
    (first, *_), second = training_ids(base, PEOPLE[0]), training_ids(base, PEOPLE[3])
    third = training_ids(base, PEOPLE[2])[:1]
    for number, (ids, units) in enumerate([([first], [1, 2]), (second, [1 + len(second), 3]), (third, [None, 5])]):
        assert unlearn(run_dir, write(request({"record_ids": ids}, request_id=f"R-{number}"))) == 0
        by_request = {content["requests"][0]["request_id"]: (path, content) for path, content in certificates(run_dir)}
        path, content = by_request[f"R-{number}"]
        wanted = units[unit == "subject"]
        assert content["guarantee"]["group"]["units"] == (wanted or 2 + len(second))
        assert main(["unlearn", "--verify", str(path)]) == 0
        run_dir = new_run(path, content)
        for name in people_content["tasks"]["tasks"]:  # as the documents say: delete them from their files
            lines = Path(name).read_text().splitlines(keepends=True)
            Path(name).write_text("".join(line for line in lines if json.loads(line)["id"] not in ids))
    # Any other change of the base's data is one that nobody can count.
    text = Path(name).read_text()
    Path(name).write_text(text[: text.rindex("{")])
    assert unlearn(run_dir, write(request({"record_ids": training_ids(base)[:1]}, request_id="R-9"))) == 2
    assert "have changed" in capsys.readouterr().err


def test_a_subject_counts_once_when_it_is_gone_and_twice_when_a_part_is(people_content, tmp_path, write):
    base = protected(people_content, tmp_path, unit="subject")
    run_dir = start(people_content, "deployed", tmp_path, strategy={"name": "dp2unlearning", "base": str(base)})
    assert unlearn(run_dir, write(request({"subject_ids": [PEOPLE[0]]}))) == 0
    part = next(ids for p in PEOPLE[2:] if len(ids := training_ids(base, p)) > 1)
    assert unlearn(run_dir, write(request({"record_ids": part[:1]}, request_id="R-2"))) == 0
    assert [c["guarantee"]["group"]["units"] for _, c in certificates(run_dir)] == [1, 3]
    assert certificates(run_dir)[0][1]["guarantee"]["unit"] == "subject"


def test_plan_shows_the_bound_and_the_cost_and_writes_nothing(deployed, m0, write, capsys):
    file = write(request({"record_ids": training_ids(m0)[:2]}))
    assert unlearn(deployed, file, "--plan") == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("* dp2unlearning")]
    assert "optimiser steps" in line and "the 2 records taken out" in line and "naively" in line
    assert not (deployed.parent / "unlearning").exists()


def test_without_its_base_a_run_opens_and_no_request_is_served(deployed, m0, write, capsys):
    file = write(request({"record_ids": training_ids(m0)[:1]}))
    m0.rename(m0.with_name("moved"))
    assert main(["eval", str(deployed)]) == 0
    capsys.readouterr()
    assert unlearn(deployed, file) == 2
    assert "holds no finished run" in capsys.readouterr().err
    assert not certificates(deployed) and nothing_forgotten(deployed)


def test_verify_finds_a_base_that_changed_after_the_certificate(deployed, m0, write, capsys):
    assert unlearn(deployed, write(request({"record_ids": training_ids(m0)[:1]}))) == 0
    ((path, content),) = certificates(deployed)
    shutil.rmtree(deployed)  # the way to the base must not lead through it
    assert main(["unlearn", "--verify", str(path)]) == 0
    assert "ok     epsilon" in capsys.readouterr().out

    store = CheckpointStore(m0 / "checkpoints")
    state = store.load()
    before = copy.deepcopy(state)
    state["model"] = {name: value + 1 for name, value in state["model"].items()}
    store.save(state)
    assert main(["unlearn", "--verify", str(path)]) == 3
    assert 'FAILED rests_on {"changed": ["checkpoints"]}' in capsys.readouterr().out
    store.save(before)
    (m0 / "export" / "adapter_model.safetensors").write_bytes(b"other")
    assert main(["unlearn", "--verify", str(path)]) == 3
    assert 'FAILED rests_on {"changed": ["export/adapter_model.safetensors"]}' in capsys.readouterr().out

    for figures in ({"epsilon": 0.1}, {"group": {**content["guarantee"]["group"], "units": 3}}):
        path.write_text(json.dumps({**content, "guarantee": {**content["guarantee"], **figures}}))
        assert main(["unlearn", "--verify", str(path)]) == 3
        assert "FAILED epsilon" in capsys.readouterr().out


def test_a_base_with_a_test_seed_guarantees_nothing_and_the_certificate_says_so(people_content, tmp_path, write):
    base = protected(people_content, tmp_path, test_seed=1)
    run_dir = start(people_content, "deployed", tmp_path, strategy={"name": "dp2unlearning", "base": str(base)})
    assert unlearn(run_dir, write(request({"record_ids": training_ids(base)[:1]}))) == 0
    ((_, content),) = certificates(run_dir)
    assert "nothing is guaranteed" in content["guarantee"]["void"] and content["guarantee"]["epsilon"] is None
    assert content["method"]["guarantee"].startswith("No guarantee: ")


def test_a_run_that_was_not_deployed_from_a_base_is_refused(people_content, tmp_path, write, capsys):
    run_dir = start(people_content, "plain", tmp_path)
    assert unlearn(run_dir, write(request({"record_ids": training_ids(run_dir)[:1]}))) == 2
    assert "the run's strategy is naive" in capsys.readouterr().err
    assert nothing_forgotten(run_dir)


def test_what_is_no_protected_base_of_this_model_is_refused_before_weights_are_loaded(
    m0, people_content, tmp_path, monkeypatch
):
    plain = start(people_content, "plain", tmp_path)
    monkeypatch.setattr("clkit.build.load_model", lambda *a, **k: pytest.fail("weights were loaded"))

    def refused(message, base, **changes):
        content = {**people_content, **changes, "strategy": {"name": "dp2unlearning", "base": str(base)}}
        with pytest.raises(ConfigError, match=message):
            api.run(resolve.validate({**content, "output_dir": str(tmp_path / "refused")}))

    refused("give the run directory", "")
    refused("holds no finished run", tmp_path / "nowhere")
    refused("was not trained by the private engine", plain)
    refused(r"other values of model\.lora", m0, model={**people_content["model"], "lora": {"r": 3}})
    facts = json.loads((m0 / "run.json").read_text())
    facts["privacy"]["spent"][0][2] -= 1
    (m0 / "run.json").write_text(json.dumps(facts))
    refused("counts fewer noisy steps than it took", m0)


def test_a_run_does_not_go_on_from_another_base(m0, people_content, tmp_path, monkeypatch):
    content = {
        **people_content,
        "strategy": {"name": "dp2unlearning", "base": str(m0)},
        "checkpoint": {"every_steps": 1},
    }
    config = resolve.validate(content)
    from clkit.trainer import SequentialTrainer

    class Cut(Exception):
        pass

    def cut(self, *args):
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(SequentialTrainer, "_score", lambda self, *a, **k: cut(self) if self.position.stage else None)
        with pytest.raises(Cut):
            api.run(config)
    m0.rename(m0.with_name("old"))
    protected(people_content, tmp_path)  # other noise
    with pytest.raises(CheckpointError, match="has changed since this run began"):
        api.run(config)


@pytest.fixture
def rewritten(people_content, tmp_path, tiny_llama):
    """The tasks rewritten by the tiny model, and a base trained on that without noise."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    rewriter = DpPrompt(model, AutoTokenizer.from_pretrained(tiny_llama), 0.5, max_new_tokens=4)
    tasks = build.make_tasks(resolve.validate(people_content))
    claim = write_tasks(tasks, tmp_path / "rewritten", rewriter)
    assert "12 texts" not in str(claim) and "epsilon 0.5 per token" in str(claim)
    folders = [str(tmp_path / "rewritten" / task.name) for task in tasks]
    return start(people_content, "m0", tmp_path, tasks={"source": "jsonl", "tasks": folders})


def test_a_base_of_rewritten_text_is_bounded_per_token(rewritten, people_content, tmp_path, write, capsys):
    for file in (tmp_path / "rewritten").rglob("train.jsonl"):
        assert not {"kiwi", "orchard", "bridge", "violin"} & {*file.read_text().replace('"', " ").split()}
    run_dir = start(people_content, "deployed", tmp_path, strategy={"name": "dp2unlearning", "base": str(rewritten)})
    ids = training_ids(run_dir)[:2]
    assert unlearn(run_dir, write(request({"record_ids": ids}))) == 0
    ((path, content),) = certificates(run_dir)
    said = content["guarantee"]
    assert said["mechanism"] == "dp_prompt" and said["tokens"] == {"sum": 16, "max": 8}
    assert said["epsilon"] == 4.0 and said["group"]["tight"] == {"epsilon": 8.0, "delta": 0.0}
    assert "that the record was there" in said["adjacency"]
    assert main(["unlearn", "--verify", str(path)]) == 0


def test_a_base_with_a_file_that_was_not_rewritten_is_refused(rewritten, tmp_path):
    (file, *_) = sorted((tmp_path / "rewritten").rglob("train.jsonl"))
    assert open_base(rewritten).rewriting is not None
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ConfigError, match="nor on rewritten text alone"):
        open_base(rewritten)


def test_the_digest_sees_values_names_and_types():
    one = {"a": torch.ones(2), "b": torch.zeros(1)}
    assert digest(one) == digest(dict(reversed(one.items())))
    others = ({"a": torch.ones(2), "c": torch.zeros(1)}, {**one, "a": torch.ones(2).double()}, {**one, "a": torch.ones(2) + 1e-6})  # fmt: skip
    assert len({digest(one), *map(digest, others)}) == 4
    assert digest({"a": torch.ones(2, dtype=torch.bfloat16)}) != digest({"a": torch.ones(2)})
