"""Metrics as pure functions: numbers in, numbers out, nothing imported but numpy and scipy."""

from clkit.metrics.continual import DEFINITIONS, Definition, label, summarize
from clkit.metrics.text import exact_match, first_option, rouge_l, tolerant_match

__all__ = [
    "DEFINITIONS",
    "Definition",
    "exact_match",
    "first_option",
    "label",
    "rouge_l",
    "summarize",
    "tolerant_match",
]
