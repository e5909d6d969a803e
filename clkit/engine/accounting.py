"""What noisy training costs in privacy: epsilon of one unit, of a group of units, and the noise for a wanted epsilon.

The mechanism is DP-SGD: ``steps`` times, every unit (a record, or all records of a subject) is drawn with probability
``sampling_rate``, the drawn units' clipped gradients are summed and Gaussian noise of ``noise_multiplier`` times the
clipping norm is added. Adjacent data sets differ by **adding or removing** one unit; replacing one is a group of two.
Every figure is an upper bound. The Gaussian (CLT) accountant is left out on purpose: it reports too little.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from clkit.errors import ConfigError, Problem

Accountant = Literal["prv", "rdp"]

# Grid of the privacy loss distribution of a group. The bound is safe at any grid. At sigma 1.04, q .004, 2500 steps and
# 1 to 20 units, 1e-3 is within 0.3 % of 1e-4, the library's default, which takes minutes; 1e-2 is up to 25 % too high.
_GRID = 1e-3


class Group(NamedTuple):
    """A group guarantee; ``delta`` None = above 1, which guarantees nothing."""

    epsilon: float
    delta: float | None


def epsilon(
    noise_multiplier: float, sampling_rate: float, steps: int, delta: float, accountant: Accountant = "prv"
) -> float:
    """Epsilon of one unit at ``delta``, through Opacus.

    Args:
        noise_multiplier: standard deviation of the noise over the clipping norm; 0 = no guarantee (infinity).
        sampling_rate: chance that a unit is drawn in a step.
        steps: noisy steps, empty ones and repeated ones included.
        delta: far below one over the number of units.
        accountant: ``prv`` (Gopi et al. 2021; at most 0.01 too high) or ``rdp`` (Mironov 2017; looser, and fast).

    Raises:
        ConfigError: an argument is out of its range.
    """
    _check(noise_multiplier, sampling_rate, steps, delta, accountant)
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    from opacus.accountants import create_accountant

    made: Any = create_accountant(accountant)
    made.history = [(noise_multiplier, sampling_rate, steps)]
    return float(made.get_epsilon(delta=delta))


def group_epsilon(noise_multiplier: float, sampling_rate: float, steps: int, delta: float, units: int) -> float:
    """Epsilon at ``delta`` of ``units`` units together: what a forget set of that size is protected by.

    In a step the group moves the sum by up to as many clipping norms as units of it were drawn, which is binomial: a
    mixture of Gaussians, whose privacy loss distribution is composed numerically (``dp-accounting``). Much tighter than
    :func:`naive_group`, and still hard: 20 units at one-unit epsilon 1 can have epsilon 35.

    Raises:
        ConfigError: an argument is out of its range, or ``dp-accounting`` is not installed.
    """
    _check(noise_multiplier, sampling_rate, steps, delta, "prv")
    if units < 0:
        raise ConfigError(f"units: must be at least 0, got {units}")
    if steps == 0 or units == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    try:
        from dp_accounting.pld import privacy_loss_distribution
    except ImportError as error:
        raise ConfigError("the group bound needs the package dp-accounting: pip install 'clkit[privacy]'") from error
    from scipy import stats

    drawn = range(units + 1)
    weights = stats.binom(units, sampling_rate).pmf(list(drawn))
    loss = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        noise_multiplier, [float(n) for n in drawn], weights.tolist(), value_discretization_interval=_GRID
    )
    return float(loss.self_compose(steps).get_epsilon_for_delta(delta))


def naive_group(epsilon: float, delta: float, units: int) -> Group:
    """The textbook bound from one unit's guarantee alone: ``k eps`` and ``delta (e^(k eps) - 1) / (e^eps - 1)``.

    >>> naive_group(0.0, 1e-5, 2), naive_group(1.0, 1e-5, 20)
    (Group(epsilon=0.0, delta=2e-05), Group(epsilon=20.0, delta=None))
    """
    if units < 1:
        return Group(0.0, 0.0)
    if epsilon == 0:
        factor = float(units)
    elif units * epsilon > 700:
        factor = math.inf
    else:
        factor = math.expm1(units * epsilon) / math.expm1(epsilon)
    total = 0.0 if delta == 0 else delta * factor
    return Group(units * epsilon, total if total < 1 else None)


def find_sigma(
    target_epsilon: float, sampling_rate: float, steps: int, delta: float, accountant: Accountant = "prv"
) -> float:
    """A noise multiplier whose one-unit epsilon is at most ``target_epsilon``, and less than 0.01 below it.

    Raises:
        ConfigError: an argument is out of its range, or no noise is enough by this accountant.
    """
    _check(1.0, sampling_rate, steps, delta, accountant)
    if not target_epsilon > 0 or steps == 0:
        raise ConfigError(f"target_epsilon must be above 0 with steps of at least 1, got {target_epsilon} and {steps}")
    from opacus.accountants.utils import get_noise_multiplier

    try:
        return float(
            get_noise_multiplier(
                target_epsilon=target_epsilon,
                target_delta=delta,
                sample_rate=sampling_rate,
                steps=steps,
                accountant=accountant,
            )
        )
    except ValueError as error:
        other = "; the accountant prv is tighter" if accountant == "rdp" else ""
        raise ConfigError(
            f"target_epsilon: by the accountant {accountant} no noise reaches {target_epsilon} at delta {delta} over "
            f"{steps} steps at sampling rate {sampling_rate}. Raise target_epsilon or delta{other}."
        ) from error


def _check(noise_multiplier: float, sampling_rate: float, steps: int, delta: float, accountant: str) -> None:
    problems = []
    if not noise_multiplier >= 0 or math.isinf(noise_multiplier):
        problems.append(Problem("noise_multiplier", f"must be at least 0, got {noise_multiplier}"))
    if not 0 < sampling_rate <= 1:
        problems.append(Problem("sampling_rate", f"must be in (0, 1], got {sampling_rate}"))
    if steps < 0:
        problems.append(Problem("steps", f"must be at least 0, got {steps}"))
    if not 0 < delta < 1:
        problems.append(Problem("delta", f"must be in (0, 1), got {delta}: DP-SGD has no guarantee without a delta"))
    if accountant not in ("prv", "rdp"):
        problems.append(Problem("accountant", f"must be prv or rdp, got '{accountant}'"))
    if problems:
        raise ConfigError.collect("The privacy accounting can't be done:", problems)
