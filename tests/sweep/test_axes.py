"""Axes: how many settings there are and which, and everything that can be wrong with them."""

from __future__ import annotations

import pytest

from clkit.sweep import axes as axes_

BASE = {"strategy": "naive", "train": {"epochs": 2}}


def parsed(section):
    problems = []
    found = axes_.parse(section, problems)
    assert not problems, problems
    return found


def names(section, content=BASE):
    return [s.name for s in axes_.settings(content, parsed(section))]


def values(section, key):
    return [s.values[key] for s in axes_.settings(BASE, parsed(section))]


def test_a_grid_has_as_many_settings_as_the_product_and_the_last_axis_changes_fastest():
    section = {"axes": {"train.epochs": [1, 2, 3], "train.batch_size": [4, 8]}}
    assert names(section) == [f"epochs={e},batch_size={b}" for e in (1, 2, 3) for b in (4, 8)]
    assert axes_.most(parsed(section), repeats=5) == 30


def test_keys_of_a_zip_group_change_together():
    section = {"axes": {"strategy": ["naive", "joint"]}, "zip": [{"train.epochs": [1, 2], "train.batch_size": [8, 4]}]}
    found = list(axes_.settings(BASE, parsed(section)))
    assert len(found) == 4
    assert [(s.values["train.epochs"], s.values["train.batch_size"]) for s in found] == [(1, 8), (2, 4)] * 2


def test_an_axis_under_a_condition_is_left_out_where_it_does_not_hold():
    section = {
        "axes": {
            "strategy": ["naive", "replay", "lwf"],
            "strategy.replay.size": {"values": [10, 20], "when": {"strategy": ["replay", "lwf"]}},
            "train.learning_rate": {"values": [0.1, 0.2], "when": {"strategy.replay.size": 20, "strategy": "lwf"}},
        }
    }
    assert names(section) == [
        "naive", "replay,size=10", "replay,size=20", "lwf,size=10",
        "lwf,size=20,learning_rate=0.1", "lwf,size=20,learning_rate=0.2",
    ]  # fmt: skip


def test_a_condition_sees_the_file_and_the_defaults_too():
    axes = {"train.momentum": {"values": [0.0, 0.5], "when": {"train.optimizer": "sgd"}}}
    assert names({"axes": axes}) == ["base"], "the default optimiser is adamw"
    assert len(names({"axes": axes}, {**BASE, "train": {"optimizer": "sgd"}})) == 2


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"from": 1, "to": 5, "step": 2}, [1, 3, 5]),
        ({"from": 0.1, "to": 0.4, "step": 0.1}, [0.1, 0.2, 0.3, 0.4]),
        ({"from": 0.0, "to": 1.0, "count": 5}, [0.0, 0.25, 0.5, 0.75, 1.0]),
        ({"from": 1e-4, "to": 0.1, "count": 4, "scale": "log"}, [1e-4, 1e-3, 1e-2, 0.1]),
        ({"from": 1, "to": 100, "count": 3, "scale": "log"}, [1, 10, 100]),
        ({"from": 2, "to": 2, "count": 1}, [2]),
    ],
)
def test_ranges_include_both_ends_and_keep_decimal_steps(spec, expected):
    found = values({"axes": {"train.x": spec}}, "train.x")
    assert found == expected
    assert [type(v) for v in found] == [type(v) for v in expected]


def test_values_can_be_named_and_plug_ins_are_called_by_their_names():
    section = {"axes": {"tasks.tasks": {"values": {"a": ["x", "y"], "b": ["y", "x"]}}}}
    assert names(section) == ["a", "b"] and values(section, "tasks.tasks") == [["x", "y"], ["y", "x"]]
    strategies = {"axes": {"strategy": ["naive", {"name": "dkvb", "decoder": "votes"}], "train.epochs": [3]}}
    assert names(strategies) == ["naive", "dkvb,decoder=votes"], "an axis of one value is in no name"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"axes": {"train.epochs": []}}, "an empty axis"),
        ({"axes": {"train.epochs": {"values": []}}}, "an empty axis"),
        ({"axes": {"train.epochs": 3}}, "expected a list"),
        ({"axes": {"train.epochs": {"vlaues": [1]}}}, "Did you mean 'values'"),
        ({"axes": {"train.epochs": {"from": 1, "to": 3}}}, "either `step` or `count`"),
        ({"axes": {"train.epochs": {"from": 3, "to": 1, "step": 1}}}, "an empty range"),
        ({"axes": {"train.epochs": {"from": 0, "to": 1, "count": 3, "scale": "log"}}}, "`from` above 0"),
        ({"axes": {"train.epochs": {"from": 0, "to": 1, "step": 0}}}, "`step` must be above 0"),
        ({"axes": {"train.epochs": {"from": "a", "to": True, "step": 1}}}, "`from` must be a number"),
        ({"axes": {"seed": [0, 1]}}, "use sweep.seeds"),
        ({"axes": {"output_dir": ["a"]}}, "can't be swept"),
        ({"axes": [1]}, "expected a mapping"),
        ({"zip": [{"train.epochs": [1, 2], "train.batch_size": [1]}]}, "unequal length"),
        ({"zip": [{"train.epochs": []}]}, "at least one value"),
        ({"zip": {"train.epochs": [1]}}, "expected a list of groups"),
        ({"axes": {"train.epochs": [1]}, "zip": [{"train.epochs": [1, 2]}]}, "swept twice"),
        ({"axes": {"train.epochs": {"values": [1], "when": []}}}, "expected a mapping from keys"),
    ],
)
def test_what_is_wrong_with_an_axis_is_said_with_its_place(section, message):
    problems = []
    axes_.parse(section, problems)
    assert any(message in p.what and p.where.startswith("sweep.") for p in problems), problems


@pytest.mark.parametrize(("given", "expected"), [(3, [0, 1, 2]), ([4, 2], [4, 2])])
def test_seeds_are_a_number_or_a_list(given, expected):
    assert axes_.seeds({"seeds": given}, 9, []) == expected
    assert axes_.seeds({}, 9, []) == [9]


@pytest.mark.parametrize("given", [0, [], [1, 1], [-1], "three", [True], 1.5])
def test_seeds_that_are_none_or_double_are_problems(given):
    problems = []
    axes_.seeds({"seeds": given}, 0, problems)
    assert problems
