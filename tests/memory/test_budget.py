"""One byte budget for model and exemplars: the published table, the strict counting, areas over budgets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from torch import nn

from clkit.errors import ConfigError
from clkit.memory import Budget, Footprint, bytes_per_exemplar, exemplar_equivalent
from clkit.metrics.continual import budget_auc
from clkit.tasks.base import LabelledExamples

CIFAR, IMAGENET = 3072, 150528


@pytest.fixture(scope="module")
def tables(data_root):
    with np.load(data_root.parent / "golden" / "memo" / "tables.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize(
    ("parameters", "size", "count"),
    [
        (463504, CIFAR, 603),
        (351488, CIFAR, 457),
        (112016, CIFAR, 145),
        (11176512, IMAGENET, 296),
        (8393728, IMAGENET, 223),
        (0, 1, 0),
    ],
)
def test_a_network_is_worth_so_many_exemplars(parameters, size, count):
    assert exemplar_equivalent(parameters, size) == count


def test_the_published_table_of_budgets(tables):
    names = tables["budget/columns"].tolist()
    for protocol, values, total in zip(
        tables["budget/protocol"], tables["budget/rows"].tolist(), tables["budget/total_MB"], strict=True
    ):
        row = dict(zip(names, values, strict=True))
        size = row["bytes_per_exemplar"]
        budget = Budget.spent(row["params_der"], row["exemplars_der"], size)
        assert budget.bytes / 2**20 == pytest.approx(total, abs=1e-9), protocol
        for method in ("der", "memo", "single"):
            assert budget.exemplars(row[f"params_{method}"], size) == row[f"exemplars_{method}"], (protocol, method)


def test_the_published_points_of_the_areas(tables):
    rows = dict(zip(tables["auc/point"].tolist(), tables["auc/rows"].tolist(), strict=True))
    _, der, memo, single, parameters = rows["cifar100/point5"]
    budget = Budget.spent(parameters, memo, CIFAR)
    assert (der, single) == (2000, 7431) and budget.exemplars(463504, CIFAR) == single


def test_sizes_of_parts_follow_from_the_table_of_parameters(tables):
    sizes = dict(
        zip(tables["params/name"].tolist(), tables["params/general_specialised_bufg_bufs"].tolist(), strict=True)
    )
    general, specialised = sizes["resnet32"][:2]
    ten_tasks = Budget.spent(10 * (general + specialised), 2000, CIFAR)
    assert ten_tasks.exemplars(general + 10 * specialised, CIFAR) == 3312


def test_the_strict_counting_adds_heads_statistics_caches_and_indices():
    backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    size = Footprint.of(backbone, [nn.Linear(4, 2)], cached=100)
    assert size == Footprint(parameters=24, heads=40, statistics=2 * 16 + 8, cached=100)
    assert size.bytes() == 96 and size.bytes("strict") == 96 + 40 + 40 + 100
    assert Budget(96 + 50).exemplars(size, 10) == 5
    assert Budget(276 + 50, "strict").exemplars(size, 10) == 2  # 10 bytes and 8 for the position
    spent = Budget.spent(size, 7, 10, "strict")
    assert spent.exemplars(size, 10) == 7 and Budget(spent.bytes - 1, "strict").exemplars(size, 10) == 6


def test_a_budget_that_exactly_holds_the_model_leaves_no_exemplar_and_a_smaller_one_is_refused():
    assert Budget(400).exemplars(100, 10) == 0
    with pytest.raises(ConfigError, match=r"399 bytes is smaller than the model, which takes 400 \(paper counting\)"):
        Budget(399).exemplars(100, 10)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Budget(0),
        lambda: Budget(10, "loose"),  # type: ignore[arg-type]
        lambda: Budget(10).exemplars(1, 0),
        lambda: exemplar_equivalent(-1, 10),
        lambda: exemplar_equivalent(1, 0),
        lambda: bytes_per_exemplar([]),
    ],
)
def test_what_can_not_be_counted_is_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_the_bytes_of_an_exemplar_are_those_of_its_raw_form():
    def examples(inputs):
        return LabelledExamples(
            inputs, torch.zeros(len(inputs), dtype=torch.long), [str(i) for i in range(len(inputs))]
        )

    assert bytes_per_exemplar([examples(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))]) == CIFAR
    assert bytes_per_exemplar([examples(torch.zeros(2, 5))]) == 20
    assert bytes_per_exemplar([examples(("abc", "é")), examples(("abcdef",))]) == 4  # 11 bytes, three texts


class TestAreas:
    def test_a_constant_accuracy_gives_a_rectangle_and_order_does_not_matter(self):
        assert budget_auc([7.6, 23.5, 12.4], [0.7, 0.7, 0.7]) == pytest.approx(0.7 * 15.9, abs=1e-12)
        assert budget_auc([3, 1, 2], [0.9, 0.1, 0.5]) == pytest.approx(budget_auc([1, 2, 3], [0.1, 0.5, 0.9]))

    def test_it_is_scipy_s_trapezoid(self):
        rng = np.random.default_rng(0)
        x, y = np.sort(rng.random(9)) * 20, rng.random(9)
        assert budget_auc(x, y) == pytest.approx(trapezoid(y, x), rel=1e-12)

    @pytest.mark.parametrize(
        ("memory", "accuracy"),
        [([1], [0.5]), ([1, 2], [0.5]), ([1, 1], [0.5, 0.6]), ([1, 2], [54.8, 72.2]), ([1, 2], [0.5, None])],
    )
    def test_bad_curves_are_refused(self, memory, accuracy):
        with pytest.raises(ValueError, match="megabytes|accuracy_fraction"):
            budget_auc(memory, accuracy)
