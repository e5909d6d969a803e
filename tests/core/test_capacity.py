"""`clkit plan`: the memory formulas, and the cheapest stage that fits."""

from __future__ import annotations

import json

import pytest

from clkit.capacity import need, parse_size
from clkit.cli import main
from clkit.errors import ConfigError

SIZES = {"parameters": 7_000_000_000, "trainable": 7_000_000_000, "weight_bytes": 28_000_000_000}


def test_one_process_splits_nothing_and_stage_3_splits_all():
    assert [need(stage, 1, SIZES, 2, 0).total for stage in (0, 3)] == [16 * 7 * 10**9, 20 * 7 * 10**9]
    eight = [need(stage, 8, SIZES, 2, 5) for stage in range(4)]
    assert [n.total - 5 for n in eight] == [112 * 10**9, 66_500_000_000, 42 * 10**9, 17_500_000_000]
    assert all(n.kept == 5 for n in eight)


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
    _, tight = planned(text_content, tmp_path, capsys, "--gpus", "8", "--gpu-memory", "150KiB", name="naive")
    assert "engine.zero_stage=3" in tight
    _, none = planned(text_content, tmp_path, capsys, "--gpus", "8", "--gpu-memory", "1KiB", name="lwf")
    assert "No stage fits" in none


def test_what_a_strategy_keeps_is_counted_whole(text_content, tmp_path):
    from clkit.registry import STRATEGIES

    sizes = {"parameters": 1000, "trainable": 100}
    expected = {"naive": 0, "lwf": 400, "ewc": 800, "ilora": 400, "olora": 2 * 600, "reglora": 2 * (400 + 240)}
    for name, size in expected.items():
        cls = STRATEGIES.get(name)
        assert cls.kept_bytes(cls.config_class(), sizes, 3) == size, name


def test_what_can_not_be_planned_says_why(text_content, tmp_path, capsys):
    code, shown = planned(text_content, tmp_path, capsys, name="ties")
    assert code == 2 and "local engine only" in shown
    code, shown = planned(text_content, tmp_path, capsys, "--gpus", "0", name="naive")
    assert code == 2 and "--gpus: got 0" in shown
