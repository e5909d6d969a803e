"""Comparing methods over seeds: intervals, paired differences, and which of many are not beaten in everything.

None where something is undefined: the spread of one value, the rank test of differences that are all zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_SAME = 1e-12  # relative: scores of a few decimals differ by rounding alone below it, as .62 - .6 and .52 - .5 do
_EXACT = 12  # differences up to which all 2**n signs are gone through where ties rule scipy's exact table out


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        n: how many values.
        mean: of them.
        sd: sample standard deviation (n - 1).
        low: lower end of the t interval of the mean.
        high: upper end.
    """

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Paired:
    """The difference of two methods on equal seeds, the first minus the second.

    Attributes:
        difference: its mean, with standard deviation and interval over seeds.
        wilcoxon_p: two-sided p-value of Wilcoxon's signed-rank test; differences that only rounding tells apart are
            ties. With n pairs it is at least 2 / 2**n, so five seeds or fewer can't bring it below 0.05.
    """

    difference: Estimate
    wilcoxon_p: float | None


def estimate(values: ArrayLike, level: float = 0.95) -> Estimate:
    """Mean, standard deviation and the interval of Student's t.

    Args:
        values: (N,) numbers, N >= 1.
        level: of the interval.

    Raises:
        ValueError: no values, or something that is not a finite number.

    >>> found = estimate([1.0, 2.0, 3.0])
    >>> found.mean, found.sd, round(found.low, 3), round(found.high, 3)
    (2.0, 1.0, -0.484, 4.484)
    """
    x = _finite(values, "values")
    mean = float(x.mean())
    if len(x) == 1:
        return Estimate(1, mean, None, None, None)
    from scipy import stats

    sd = float(x.std(ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1)) * sd / float(np.sqrt(len(x)))
    return Estimate(len(x), mean, sd, mean - half, mean + half)


def paired(first: ArrayLike, second: ArrayLike) -> Paired:
    """Compare two methods on equal seeds.

    Args:
        first: (N,) a value per seed.
        second: (N,) values of the same seeds in the same order.

    Raises:
        ValueError: unequal lengths, no values, or something that is not a finite number.

    >>> paired([0.2, 0.4, 0.6], [0.1, 0.2, 0.3]).wilcoxon_p
    0.25
    """
    a, b = _finite(first, "first"), _finite(second, "second")
    if len(a) != len(b):
        raise ValueError(f"`first` and `second` must have one value per seed each, got {len(a)} and {len(b)}")
    return Paired(estimate(a - b), _wilcoxon(_apart(a, b)))


def _apart(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """``a - b`` with what is equal but for rounding made equal, and 0 where it is nothing."""
    found = a - b
    blur = _SAME * np.maximum(np.abs(a), np.abs(b))
    found[np.abs(found) <= blur] = 0
    order = np.abs(found).argsort()
    sizes, blur = np.abs(found)[order], blur[order]
    for i in range(1, len(sizes)):
        if sizes[i] - sizes[i - 1] <= max(blur[i], blur[i - 1]):
            sizes[i] = sizes[i - 1]
    found[order] = np.copysign(sizes, found[order])
    return found


def _wilcoxon(differences: NDArray[np.float64]) -> float | None:
    nonzero = differences[differences != 0]
    if not len(nonzero):
        return None
    from scipy import stats

    tied = len(set(np.abs(nonzero).tolist())) < len(nonzero)
    method = stats.PermutationMethod(n_resamples=2**_EXACT + 1) if tied and len(nonzero) <= _EXACT else "auto"
    return float(stats.wilcoxon(nonzero, method=method).pvalue)


def front(points: ArrayLike, higher_is_better: Sequence[bool]) -> list[bool]:
    """Which points are on the Pareto front: no other point is as good in everything and better in something.

    Args:
        points: (N, D); a row with NaN is on no front and keeps nothing off it.
        higher_is_better: D directions.

    Raises:
        ValueError: the shapes do not fit.

    >>> front([[0.9, 5.0], [0.8, 3.0], [0.7, 4.0]], [True, False])
    [True, True, False]
    """
    x = np.array(points, dtype=np.float64)
    if x.size == 0:
        return []
    if x.ndim != 2 or x.shape[1] != len(higher_is_better):
        raise ValueError(f"`points` must have shape (N, {len(higher_is_better)}), got {x.shape}")
    x = x * np.where(np.asarray(higher_is_better), 1.0, -1.0)
    whole: NDArray[np.bool_] = np.asarray(~np.isnan(x).any(axis=1))
    known = x[whole]

    def beaten(row: NDArray[np.float64]) -> bool:
        return bool(((known >= row).all(axis=1) & (known > row).any(axis=1)).any())

    return [bool(whole[i]) and not beaten(x[i]) for i in range(len(x))]


def _finite(values: ArrayLike, name: str) -> NDArray[np.float64]:
    x = np.array(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"`{name}` must be a list of at least one finite number, got {x.tolist()}")
    return x
