"""What DeepSpeed is told, what is refused, and how a batch is dealt out; nothing here starts a process."""

from __future__ import annotations

import itertools
import json
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clkit import api, resolve
from clkit.config import TrainConfig
from clkit.dealing import cut, dealt
from clkit.engine import base
from clkit.engine.settings import DeepSpeedConfig, settings
from clkit.errors import CapabilityError, ConfigError
from clkit.registry import STRATEGIES
from clkit.tasks.batch import Batch, Encoded


def test_clipping_and_types_are_always_written():
    told = settings(DeepSpeedConfig(zero_stage=2), {"gradient_clipping": 1.0, "comms_logger": {"enabled": False}})
    assert told["gradient_clipping"] == 0.0, "DeepSpeed clips at 1.0 where the key is missing"
    assert told["fp16"] == told["bf16"] == {"enabled": False}
    assert told["prescale_gradients"] is False and told["gradient_accumulation_steps"] == 1
    assert told["comms_logger"] == {"enabled": False}, "what does not concern the run is passed on"


def test_the_bucket_is_no_larger_than_what_is_trained():
    assert settings(DeepSpeedConfig(), {}, 1000)["zero_optimization"]["reduce_bucket_size"] == 1000
    assert settings(DeepSpeedConfig(), {}, 10**10)["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    given = {"zero_optimization": {"reduce_bucket_size": 7}}
    assert settings(DeepSpeedConfig(), given, 1000)["zero_optimization"]["reduce_bucket_size"] == 7


def run(text_content, tmp_path, given=None, **engine):
    if given is not None:
        file = tmp_path / "ds.json"
        file.write_text(given if isinstance(given, str) else json.dumps(given))
        engine["config_file"] = str(file)
    return {**text_content, "engine": {"name": "deepspeed", **engine}}


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"gradient_clipping": 2.0}, "engine.config_file:gradient_clipping: got 2.0; that is set by train.clip"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage: got 3; that is set by engine.zero_stage"),
        ({"optimizer": {"type": "Adam"}}, "engine.config_file:optimizer: is set by train.optimizer"),
        ({"bf16": {"enabled": True}}, "engine.config_file:bf16: is set by model.dtype"),
        ({"train_batch_size": 64}, "train_batch_size: got 64; that is set by train.batch_size (here 4)"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "got nvme; that is set by engine.offload"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_run_is_an_error(text_content, tmp_path, given, shown):
    with pytest.raises(ConfigError) as error:
        api.run(resolve.validate(run(text_content, tmp_path, given)))
    assert shown in str(error.value)


def test_a_deepspeed_file_that_agrees_is_not(text_content, tmp_path):
    from clkit.engine.deepspeed import DeepSpeedEngine

    agreed = {"gradient_clipping": 1.0, "train_batch_size": "auto", "zero_optimization": {"stage": 2}}
    config = resolve.validate(run(text_content, tmp_path, agreed))
    assert DeepSpeedEngine.refuse(config, STRATEGIES.get("naive").capabilities) == []


@pytest.mark.parametrize(
    ("given", "engine", "shown"),
    [
        ("{", {}, "is not JSON"),
        ("[1]", {}, "expected an object"),
        (None, {"config_file": "nowhere.json"}, "nowhere.json: can't be read"),
        (None, {"zero_stage": 4}, "engine.zero_stage: out of range"),
        (None, {"zero_stage": 0, "offload_optimizer": "cpu"}, "needs engine.zero_stage=1, 2 or 3"),
        (None, {"zero_stage": 2, "offload_parameters": "cpu"}, "needs engine.zero_stage=3 (got 2)"),
    ],
)
def test_options_that_can_not_work_are_refused_with_the_configuration(text_content, tmp_path, given, engine, shown):
    with pytest.raises(ConfigError) as error:
        resolve.validate(run(text_content, tmp_path, given, **engine))
    assert shown in str(error.value)


@pytest.mark.parametrize(
    ("engine", "why"), [("deepspeed", "sums gradients over the batch before"), ("local", "clips no single units")]
)
def test_options_of_private_training_are_refused_with_where_they_belong(text_content, tmp_path, engine, why):
    wanted = text_content | {"engine": {"name": engine, "target_epsilon": 8, "unit": "subject"}}
    with pytest.raises(CapabilityError) as error:
        resolve.validate(wanted, overridden=["engine.target_epsilon"])
    first, second = (str(p) for p in error.value.problems)
    assert first.startswith("command line:engine.target_epsilon: is an option of private training, which is engine=pri")
    assert why in first and "engine=private --num-processes N" in first
    assert second == "config:engine.unit: is an option of engine=private too"

    wanted["engine"] |= {"unti": "record"}
    with pytest.raises(ConfigError, match=r"engine\.unti: unknown key") as error:
        resolve.validate(wanted)
    assert len(error.value.problems) == 3


@pytest.mark.parametrize("name", STRATEGIES.names())
@pytest.mark.parametrize("stage", [0, 3])
def test_a_stage_that_a_strategy_does_not_declare_is_refused_before_anything_is_loaded(name, stage):
    from clkit.engine.deepspeed import DeepSpeedEngine

    capabilities = STRATEGIES.get(name).capabilities
    assert ("deepspeed" in capabilities.engines) == bool(capabilities.zero_stages)
    config = resolve.validate({"tasks": "facts", "engine": {"name": "deepspeed", "zero_stage": stage}})
    refused = [e for e in DeepSpeedEngine.refuse(config, capabilities) if isinstance(e, CapabilityError)]
    assert bool(refused) == (stage not in capabilities.zero_stages)


@given(st.data(), st.integers(1, 40), st.integers(0, 9), st.integers(1, 5))
def test_every_row_is_dealt_once_and_parts_that_are_computed_together_have_the_same_kinds(data, count, size, processes):
    replayed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    parts = cut(count, replayed, size, processes)
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert all(0 < len(part) <= (size or count) for part in parts)
    if processes == 1:
        return
    assert max(map(len, parts)) <= -(-count // processes), "none does the work of others"
    kinds = [replayed[part].unique().tolist() for part in parts]
    runs = [list(run) for _, run in itertools.groupby(parts, lambda part: replayed[part].unique().tolist())]
    assert kinds in ([kinds[0]] * len(parts), sorted(kinds)), "each kind by itself, the new rows first, or both in all"
    for run in runs:
        for kind in (replayed, ~replayed):
            held = [int(kind[part].sum()) for part in run]
            assert max(held) - min(held) <= 1


def test_few_rehearsed_rows_are_dealt_apart_and_idle_processes_repeat_a_part_of_the_same_kind():
    class Rows(Encoded):
        ids = [f"{i}" for i in range(9)]

        def batch(self, indices):
            return Batch({}, indices, len(indices), indices, self)

    class Engine:
        device = torch.device("cpu")
        rows = base.Engine.rows

        def __init__(self, rank):
            self.group = types.SimpleNamespace(rank=rank, world=4)

        def units(self, strategy, part):
            return {"*": float(len(part))}

    batch = Rows().batch(torch.arange(9))
    batch.replayed = torch.arange(9) >= 8  # one of them, which a part of every process would have to share
    given = [dealt(batch, TrainConfig(micro_batch=2), None, Engine(rank), None) for rank in range(4)]
    assert [[part.labels.tolist() for part, _ in own] for own in given] == [[[k, k + 4], [8]] for k in range(4)]
    assert [[share["*"] * 9 for _, share in own] for own in given] == [[2, 1], [2, 0], [2, 0], [2, 0]]
