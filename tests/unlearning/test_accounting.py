"""Privacy accounting against the reference table, the closed form of the Gaussian mechanism, and between bounds."""

import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from clkit.engine.accounting import epsilon, find_sigma, group_epsilon, naive_group
from clkit.errors import ConfigError

# sampling rate, sigma, steps, delta, RDP, PRV: Opacus 1.6 (methods sheet, section 7).
TABLE = [
    (256 / 60000, 1.1, 14062, 1e-5, 2.5966, 2.3917),
    (0.01, 1.0, 1000, 1e-5, 2.1014, 1.8384),
    (0.01, 4.0, 10000, 1e-5, 1.0355, 0.9569),
    (0.004, 0.5, 2500, 1e-5, 10.8146, 9.2047),
    (0.004, 0.7, 2500, 1e-5, 3.4835, 2.8178),
    (0.004, 1.0, 2500, 1e-5, 1.3131, 1.0689),
    (0.004, 2.0, 2500, 1e-5, 0.4120, 0.3829),
    (0.004, 1.0, 2500, 1e-12, 3.0547, 2.5440),
    (16 / 3600, 1.0, 2250, 1e-5, 1.3782, 1.1368),
    (0.1, 1.0, 100, 1e-5, 7.8993, 7.0571),
    (1.0, 1.0, 1, 1e-5, 4.7285, 4.3874),
]


@pytest.mark.parametrize(("rate", "sigma", "steps", "delta", "rdp", "prv"), TABLE)
def test_epsilon_is_that_of_the_reference_table_by_both_accountants(rate, sigma, steps, delta, rdp, prv):
    assert epsilon(sigma, rate, steps, delta, "rdp") == pytest.approx(rdp, abs=2e-4)
    assert epsilon(sigma, rate, steps, delta) == pytest.approx(prv, abs=2e-4)


@pytest.mark.filterwarnings("error")
def test_accountants_say_nothing_that_a_user_could_only_wonder_at():
    assert epsilon(1.0, 1.0, 1, 1e-5) > 4.377, "log(0) at sampling rate 1"
    assert find_sigma(8.0, 1.0, 1, 1e-5, "rdp") > 0, "the largest order, on the way to the noise"


def exact(sigma: float, delta: float) -> float:
    """Epsilon of one Gaussian mechanism of sensitivity 1 (Balle & Wang 2018)."""

    def excess(e: float) -> float:
        return norm.cdf(0.5 / sigma - e * sigma) - math.exp(e) * norm.cdf(-0.5 / sigma - e * sigma) - delta

    return brentq(excess, 0, 50)


def test_without_sampling_all_bounds_lie_just_above_the_closed_form():
    truth = exact(1.0, 1e-5)
    assert truth == pytest.approx(4.37718, abs=5e-6)
    assert truth <= epsilon(1.0, 1.0, 1, 1e-5) <= truth + 0.011
    assert truth <= epsilon(10.0, 1.0, 100, 1e-5) <= truth + 0.011, "100 steps at sigma 10 are one at sigma 1"
    truth = exact(10 / 3 / math.sqrt(10), 1e-5)
    assert truth <= group_epsilon(10.0, 1.0, 10, 1e-5, 3) <= truth * 1.02, "ten steps, three times as far"


# sigma, units, epsilon at q = .004, 2500 steps, delta 1e-5 (methods sheet, 1.6; made on a coarser grid, so some of its
# entries are a good deal above), and how much lower ours may be.
GROUPS = [
    (1.0352, 1, 0.993, 0.005), (1.0352, 2, 2.13, 0.005), (1.0352, 5, 6.15, 0.02),
    (4.0, 1, 0.178, 0.005), (4.0, 2, 0.357, 0.005), (4.0, 20, 4.61, 0.03), (4.0, 40, 10.4, 0.01),
    (20.0, 20, 1.07, 0.35), (20.0, 40, 1.77, 0.15),
]  # fmt: skip


def test_the_group_bound_is_that_of_the_reference_table_or_tighter_and_grows_with_the_group():
    found = {(sigma, k): group_epsilon(sigma, 0.004, 2500, 1e-5, k) for sigma, k, *_ in GROUPS}
    for sigma, k, reference, below in GROUPS:
        assert reference * (1 - below) <= found[sigma, k] <= reference * 1.005, (sigma, k)
    for sigma in (1.0352, 4.0, 20.0):
        row = [found[key] for key in sorted(found) if key[0] == sigma]
        assert row == sorted(row)
    assert found[1.0352, 1] == pytest.approx(epsilon(1.0352, 0.004, 2500, 1e-5), abs=0.02)


def test_a_finer_grid_lowers_the_group_bound_by_little(monkeypatch):
    ours = group_epsilon(20.0, 0.004, 2500, 1e-5, 20)
    monkeypatch.setattr("clkit.engine.accounting._GRID", 2.5e-4)
    assert 0 <= ours - group_epsilon(20.0, 0.004, 2500, 1e-5, 20) <= 0.02 * ours


@pytest.mark.slow
def test_an_author_of_twenty_rows_at_one_row_epsilon_1_is_hardly_protected():
    assert group_epsilon(1.0352, 0.004, 2500, 1e-5, 20) == pytest.approx(34.7, rel=0.005)


def test_the_tight_group_bound_beats_the_naive_one():
    assert naive_group(1.0, 1e-5, 20).delta is None, "twenty rows at epsilon 1: the naive bound says nothing"
    two = naive_group(epsilon(4.0, 0.004, 2500, 1e-6), 1e-6, 2)
    assert group_epsilon(4.0, 0.004, 2500, two.delta, 2) <= two.epsilon


def test_the_naive_bound_is_its_formula_also_at_its_edges():
    assert naive_group(0.5, 1e-6, 3).delta == pytest.approx(1e-6 * (1 + math.exp(0.5) + math.exp(1.0)))
    assert naive_group(0.0, 1e-6, 3) == (0, 3e-6)
    assert naive_group(900.0, 1e-6, 3) == (2700, None) and naive_group(900.0, 0.0, 3) == (2700, 0)
    assert naive_group(1.0, 1e-6, 0) == (0, 0)


@pytest.mark.parametrize(
    ("target", "delta", "rdp"),
    [(0.5, 1e-12, 3.2031), (1, 1e-12, 1.7578), (10, 1e-11, 0.6253), (1, 1e-5, 1.1426), (8, 1e-5, 0.5454)],
)
def test_sigma_for_a_wanted_epsilon_is_the_reference_one(target, delta, rdp):
    found = find_sigma(target, 0.004, 2500, delta, "rdp")
    assert found == pytest.approx(rdp, abs=1e-4)
    assert target - 0.011 <= epsilon(found, 0.004, 2500, delta, "rdp") <= target


def test_sigma_by_prv_is_the_reference_one_and_smaller_than_by_rdp():
    assert find_sigma(1, 0.004, 2500, 1e-5) == pytest.approx(1.0352, abs=1e-4)


def test_an_epsilon_that_no_noise_reaches_is_an_error_that_says_what_to_do():
    with pytest.raises(ConfigError, match=r"no noise reaches 0\.1 at delta 1e-12.*prv is tighter"):
        find_sigma(0.1, 0.004, 2500, 1e-12, "rdp")


def test_no_noise_is_no_guarantee_and_no_step_costs_nothing():
    assert epsilon(0, 0.1, 10, 1e-5) == group_epsilon(0, 0.1, 10, 1e-5, 2) == math.inf
    assert epsilon(1, 0.1, 0, 1e-5) == group_epsilon(1, 0.1, 0, 1e-5, 2) == group_epsilon(1, 0.1, 9, 1e-5, 0) == 0


def test_all_wrong_arguments_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        epsilon(-1, 1.5, -2, 0, "gdp")  # type: ignore[arg-type]
    assert [p.where for p in caught.value.problems] == [
        "noise_multiplier", "sampling_rate", "steps", "delta", "accountant",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="units"):
        group_epsilon(1, 0.1, 1, 1e-5, -1)
    with pytest.raises(ConfigError, match="above 0"):
        find_sigma(0, 0.1, 1, 1e-5)
