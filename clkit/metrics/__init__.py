"""Metrics as pure functions: numbers in, numbers out, nothing imported but numpy and scipy."""

from clkit.metrics.continual import DEFINITIONS, Definition, budget_auc, label, summarize
from clkit.metrics.text import exact_match, first_option, rouge_l, tolerant_match

__all__ = [
    "DEFINITIONS",
    "Definition",
    "budget_auc",
    "exact_match",
    "first_option",
    "label",
    "rouge_l",
    "summarize",
    "tolerant_match",
]
