"""Gradient difference: up on what is forgotten, down on what is retained."""

from __future__ import annotations

from .base import RetainConfig
from .gradient_ascent import GradientAscent
from .request import Approximate


class GradientDifference(GradientAscent):
    """Gradient ascent with the cross entropy of as many retained rows beside it (Liu et al. 2022)."""

    config_class = RetainConfig
    retains = True


class GradientDifferenceMethod(Approximate):
    """Serves requests so."""

    name = "gradient_difference"
    what = "the deployed model, trained to a higher loss on the forgotten records and a lower one on retained ones"
    strategy = GradientDifference
