"""Perplexity of the answers given their prompts; lower is better."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from clkit.evaluation.base import Detail, Scorer, Scoring, weighted_mean

# Positions whose logits are turned to float32 at once; with 150,000 tokens in the vocabulary this is 600 MB.
_CHUNK = 1024


class Perplexity(Scorer):
    """exp(sum of the negative log-likelihoods / number of tokens) over all tokens that training learns from.

    These are the answer's tokens with the end-of-text token after it, given the prompt. The value of one example is its
    mean negative log-likelihood in nats, its weight its number of tokens: long answers count more. Log-probabilities
    are computed in float32.
    """

    name = "perplexity"
    higher_is_better = False
    kinds = frozenset({"text"})

    def score(self, scoring: Scoring, indices: Sequence[int]) -> list[Detail]:
        """One forward pass."""
        model = scoring.model
        batch = scoring.encoded.batch(torch.tensor(indices)).to(model.device)
        logits, targets = model.logits(batch), model.targets(batch)
        rows, columns = torch.nonzero(targets != -100, as_tuple=True)
        losses = [
            F.cross_entropy(logits[r, c].float(), targets[r, c], reduction="none")
            for r, c in zip(torch.split(rows, _CHUNK), torch.split(columns, _CHUNK), strict=True)
        ]
        sums = torch.zeros(len(targets), dtype=torch.float64)
        sums.index_add_(0, rows.cpu(), torch.cat(losses).double().cpu())
        counts = torch.bincount(rows, minlength=len(targets)).tolist()
        return [
            Detail(i, value=total / max(1, n), weight=float(n))
            for i, total, n in zip(batch.ids, sums.tolist(), counts, strict=True)
        ]

    def aggregate(self, details: Sequence[Detail]) -> float:
        """exp of the mean over tokens; infinite where that is too large for a float."""
        try:
            return math.exp(weighted_mean(details))
        except OverflowError:
            return math.inf
