"""`clkit plan`: the memory formulas, and the cheapest stage that fits."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from clkit import build, resolve
from clkit.capacity import capacity, need, parse_size, rows_at_once
from clkit.cli import main
from clkit.errors import ConfigError
from clkit.models.activations import activation_bytes

SIZES = {"parameters": 7_000_000_000, "trainable": 7_000_000_000, "weight_bytes": 28_000_000_000}


def test_one_process_splits_nothing_and_stage_3_splits_all():
    def all_but_buffers(processes, stages):
        return [n.total - n.buffers for n in (need(stage, processes, SIZES, 2) for stage in stages)]

    assert all_but_buffers(1, (0, 3)) == [16 * 7 * 10**9, 20 * 7 * 10**9]
    assert all_but_buffers(8, range(4)) == [112 * 10**9, 66_500_000_000, 42 * 10**9, 17_500_000_000]
    assert need(2, 8, SIZES, 2, offload=True).optimizer == 0


def test_what_is_sent_and_fetched_takes_room():
    assert [need(stage, 8, SIZES, 2).buffers for stage in (0, 2)] == [2 * 10**9] * 2
    assert need(3, 8, SIZES, 2).buffers == 2 * 10**9 + 4 * 11 * 10**8
    small = {"parameters": 1000, "trainable": 100, "weight_bytes": 4000}
    assert need(3, 8, small, 2).buffers == 400 + 2 * 4000


@pytest.mark.parametrize(("processes", "replay", "micro", "rows"), [
    (1, 0, 0, 4), (2, 0, 0, 2), (2, 9, 0, 4), (3, 9, 0, 3), (2, 9, 1, 1),
])  # fmt: skip
def test_rehearsed_rows_go_through_the_model_too(text_content, processes, replay, micro, rows):
    text_content["train"] |= {"batch_size": 4, "micro_batch": micro}
    config = resolve.validate({**text_content, "strategy": {"name": "replay", "replay": {"size": replay}}})
    assert rows_at_once(config, processes) == rows


def test_activations_are_those_of_a_real_pass(text_content):
    """Against the tensors that autograd really keeps, which are a part of what is alive at the peak."""
    config = resolve.validate(text_content)
    model = build.make_model(config.model, build.make_tasks(config), 0, lambda text: None)
    ids, kept = torch.zeros(3, config.model.max_length, dtype=torch.long), {}
    own = {t.untyped_storage().data_ptr() for t in (*model.module.parameters(), *model.module.buffers())}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    found = activation_bytes(config.model, 3)
    assert loss.isfinite() and sum(kept.values()) < found < 1.5 * sum(kept.values())
    assert 1.9 * found < activation_bytes(config.model, 6) < 2.1 * found
    recomputed = dataclasses.replace(config.model, gradient_checkpointing=True)
    assert activation_bytes(recomputed, 3) < 0.8 * found


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("1.5 GB", 1_500_000_000), ("512MiB", 2**29)])
def test_sizes_are_read_with_their_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["80", "GiB", "80Gb", "0GiB", "-1GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="expected a number and a unit"):
        parse_size(text)


def planned(text_content, tmp_path, capsys, *arguments, **strategy):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({**text_content, "strategy": strategy}))
    code = main(["plan", str(file), *arguments])
    out, err = capsys.readouterr()
    return code, out or err


def test_the_cheapest_stage_that_fits_is_named(text_content, tmp_path, capsys):
    text_content["model"]["lora"] = {"r": 0}
    code, roomy = planned(text_content, tmp_path, capsys, "--gpus", "8", name="naive")
    assert code == 0 and "engine.zero_stage=0" in roomy
    totals = [one.total for one in capacity(resolve.validate({**text_content, "strategy": "naive"}), 8).needs]
    assert totals[0] > totals[1] > totals[2]
    size = f"{(totals[1] + totals[2]) // 2}B"
    _, tight = planned(text_content, tmp_path, capsys, "--gpus", "8", "--gpu-memory", size, name="naive")
    assert "engine.zero_stage=2" in tight
    _, none = planned(text_content, tmp_path, capsys, "--gpus", "8", "--gpu-memory", "1KiB", name="lwf")
    assert "No stage fits" in none


def test_what_a_strategy_keeps_is_counted_whole(text_content, tmp_path):
    from clkit.registry import STRATEGIES

    sizes = {"parameters": 1000, "trainable": 100}
    expected = {"naive": 0, "lwf": 400, "ewc": 800, "ilora": 400, "olora": 2 * 600, "reglora": 2 * (400 + 240)}
    sizes["weight_bytes"] = 4000
    expected["memo"] = 2 * 4000
    for name, size in expected.items():
        cls = STRATEGIES.get(name)
        assert cls.kept_bytes(cls.config_class(), sizes, 3) == size, name


def test_what_can_not_be_planned_says_why(text_content, tmp_path, capsys):
    code, shown = planned(text_content, tmp_path, capsys, name="ties")
    assert code == 2 and "local engine only" in shown
    code, shown = planned(text_content, tmp_path, capsys, "--gpus", "0", name="naive")
    assert code == 2 and "--gpus: got 0" in shown
