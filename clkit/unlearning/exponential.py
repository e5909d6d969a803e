"""The exponential mechanism on clipped logits: how one token is redrawn so that it says little about the text.

For any two inputs and any outcome the chances differ by at most ``e^epsilon``. So epsilon is **per redrawn token**: a
text of n of them costs n times as much, for neighbours of the same length; lengths and copied tokens are not hidden.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clkit.errors import ConfigError

# Clipping range of RoBERTa-base's logits in DP-MLM (Meisenbacher et al. 2024).
ROBERTA_RANGE = (-5.2093127, 20.304797887802124)


def temperature(epsilon: float, low: float = ROBERTA_RANGE[0], high: float = ROBERTA_RANGE[1]) -> float:
    """The softmax temperature at which a draw from clipped logits is epsilon-DP: ``2 (high - low) / eps``.

    >>> round(temperature(1.0), 4)
    51.0282
    """
    if not epsilon > 0 or not high > low:
        raise ConfigError(f"epsilon must be above 0 and high above low, got {epsilon}, [{low}, {high}]")
    return 2 * (high - low) / epsilon


def probabilities(
    logits: ArrayLike, epsilon: float, low: float = ROBERTA_RANGE[0], high: float = ROBERTA_RANGE[1]
) -> NDArray[np.float64]:
    """The chance of every token, over the **whole** vocabulary: a candidate list that depends on the text breaks it.

    Args:
        logits: (..., V).
        epsilon: per drawn token.
        low: logits below are raised to it.
        high: logits above are lowered to it.

    Returns:
        (..., V), each row adds up to 1.
    """
    scaled = np.clip(np.asarray(logits, dtype=np.float64), low, high) / temperature(epsilon, low, high)
    weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    found: NDArray[np.float64] = weights / weights.sum(axis=-1, keepdims=True)
    return found


def text_epsilon(epsilon: float, tokens: int) -> float:
    """What a text of that many redrawn tokens costs."""
    return epsilon * tokens


def best_chance(epsilon: float, vocabulary: int) -> float:
    """The most that the best token can be chosen, ``e^(eps/2) / (e^(eps/2) + V - 1)``: below it, a text is noise.

    >>> round(best_chance(25.0, 50265), 3)
    0.842
    """
    return float(1 / (1 + (vocabulary - 1) * np.exp(-epsilon / 2)))
