"""What noisy training costs in privacy: epsilon of one unit, of a group of units, and the noise for a wanted epsilon.

The mechanism is DP-SGD: ``steps`` times, every unit (a record, or all records of a subject) is drawn with probability
``sampling_rate``, the drawn units' clipped gradients are summed and Gaussian noise of ``noise_multiplier`` times the
clipping norm is added. Adjacent data sets differ by **adding or removing** one unit; replacing one is a group of two.
Every figure is an upper bound. The Gaussian (CLT) accountant is left out on purpose: it reports too little.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from clkit.errors import ConfigError, Problem

Accountant = Literal["prv", "rdp"]

# Grid of the privacy loss distribution of a group. The bound is safe at any grid. At sigma 1.04, q .004, 2500 steps and
# 1 to 20 units, 1e-3 is within 0.3 % of 1e-4, the library's default, which takes minutes; 1e-2 is up to 25 % too high.
# What is lost adds up over the steps: at sigma .95, q .25, 12 steps and 20 units 1e-2 is within 1e-6 of 1e-3, in an
# eighth of the time.
_GRID, _COARSE, _LOST = 1e-3, 1e-2, 0.1

# As Opacus does for one stage: how near to the wanted epsilon is near enough, and where it stops looking.
_NEAR, _MOST_NOISE = 0.01, 1e6


class Noisy(NamedTuple):
    """Noisy steps of one kind; what was spent is a list of them, and its order does not matter."""

    noise_multiplier: float
    sampling_rate: float
    steps: int


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
    return epsilon_of([Noisy(noise_multiplier, sampling_rate, steps)], delta, accountant)


def epsilon_of(spent: Sequence[Noisy], delta: float, accountant: Accountant = "prv") -> float:
    """Epsilon of one unit after all that was spent, as if it had been in the data of every step.

    Raises:
        ConfigError: a number is out of its range.
    """
    for noisy in spent:
        _check(*noisy, delta, accountant)
    taken = [noisy for noisy in spent if noisy.steps]
    if not taken:
        return 0.0
    if any(noisy.noise_multiplier == 0 for noisy in taken):
        return math.inf
    from opacus.accountants import create_accountant

    made: Any = create_accountant(accountant)
    made.history = [tuple(noisy) for noisy in taken]
    with _known_warnings():
        return float(made.get_epsilon(delta=delta))


def group_epsilon(noise_multiplier: float, sampling_rate: float, steps: int, delta: float, units: int) -> float:
    """Epsilon at ``delta`` of ``units`` units together: what a forget set of that size is protected by.

    In a step the group moves the sum by up to as many clipping norms as units of it were drawn, which is binomial: a
    mixture of Gaussians, whose privacy loss distribution is composed numerically (``dp-accounting``). Much tighter than
    :func:`naive_group`, and still hard: 20 units at one-unit epsilon 1 can have epsilon 35.

    Raises:
        ConfigError: an argument is out of its range, or ``dp-accounting`` is not installed.
    """
    return group_epsilon_of([Noisy(noise_multiplier, sampling_rate, steps)], delta, units)


def group_epsilon_of(spent: Sequence[Noisy], delta: float, units: int) -> float:
    """:func:`group_epsilon` after all that was spent.

    Raises:
        ConfigError: a number is out of its range, or ``dp-accounting`` is not installed.
    """
    for noisy in spent:
        _check(*noisy, delta, "prv")
    if units < 0:
        raise ConfigError(f"units: must be at least 0, got {units}")
    taken = tuple(noisy for noisy in spent if noisy.steps)
    if not taken or units == 0:
        return 0.0
    if any(noisy.noise_multiplier == 0 for noisy in taken):
        return math.inf
    grid = max(_GRID, min(_COARSE, _LOST / sum(noisy.steps for noisy in taken)))
    return _composed(taken, delta, units, grid)


@lru_cache(maxsize=64)  # a request asks for it when it is checked, planned and certified
def _composed(taken: tuple[Noisy, ...], delta: float, units: int, grid: float) -> float:
    try:
        from dp_accounting.pld import privacy_loss_distribution
    except ImportError as error:
        raise ConfigError("the group bound needs the package dp-accounting: pip install 'clkit[privacy]'") from error
    from scipy import stats

    drawn = range(units + 1)
    total: Any = None
    for sigma, rate, steps in taken:
        weights = stats.binom(units, rate).pmf(list(drawn))
        loss = privacy_loss_distribution.from_mixture_gaussian_mechanism(
            sigma, [float(n) for n in drawn], weights.tolist(), value_discretization_interval=grid
        ).self_compose(steps)
        total = loss if total is None else total.compose(loss)
    return float(total.get_epsilon_for_delta(delta))


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
        with _known_warnings():
            found = get_noise_multiplier(
                target_epsilon=target_epsilon,
                target_delta=delta,
                sample_rate=sampling_rate,
                steps=steps,
                accountant=accountant,
            )
        return float(found)
    except ValueError as error:
        other = "; the accountant prv is tighter" if accountant == "rdp" else ""
        raise ConfigError(
            f"target_epsilon: by the accountant {accountant} no noise reaches {target_epsilon} at delta {delta} over "
            f"{steps} steps at sampling rate {sampling_rate}. Raise target_epsilon or delta{other}."
        ) from error


def sigma_for(
    target_epsilon: float, stages: Sequence[tuple[float, int]], delta: float, accountant: Accountant = "prv"
) -> float:
    """As :func:`find_sigma` for several stages, each with its sampling rate and steps, under one noise multiplier."""
    stages = [stage for stage in stages if stage[1]]
    alone = [find_sigma(target_epsilon, rate, steps, delta, accountant) for rate, steps in stages]
    if len(alone) < 2:
        return alone[0] if alone else find_sigma(target_epsilon, 1.0, 0, delta, accountant)

    def spent(sigma: float) -> float:
        return epsilon_of([Noisy(sigma, rate, steps) for rate, steps in stages], delta, accountant)

    # Each stage needs its own; all together need at most as if the variances of the noise were shared out.
    low, high = max(alone), math.sqrt(sum(sigma**2 for sigma in alone))
    while spent(high) > target_epsilon:
        low, high = high, 2 * high
        if high > _MOST_NOISE:
            raise ConfigError(f"target_epsilon: by the accountant {accountant} no noise reaches {target_epsilon}")
    while target_epsilon - spent(high) > _NEAR and high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > target_epsilon else (low, middle)
    return high


@contextlib.contextmanager
def _known_warnings() -> Iterator[None]:
    """Without two warnings of Opacus' accountants that change nothing here.

    At sampling rate 1 the loss has no lower end, and log(0) = -inf is the one that is meant (prvs.py). RDP says where a
    larger order would be tighter (rdp.py); what it gives is an upper bound all the same, and prv is the tight one.
    """
    with np.errstate(divide="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the (largest|smallest) alpha", UserWarning)
        yield


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
