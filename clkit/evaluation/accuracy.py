"""Accuracy of a classifier: how often the largest logit is the right class's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clkit.evaluation.base import Detail, Scorer, Scoring


class Accuracy(Scorer):
    """Share of examples whose largest logit is the right class's, in [0, 1].

    Over all classes; where the task is known at test (``restrict_to``) over its classes only.
    """

    name = "accuracy"
    kinds = frozenset({"classification"})

    def score(self, scoring: Scoring, indices: Sequence[int]) -> list[Detail]:
        """One forward pass."""
        batch = scoring.encoded.batch(torch.tensor(indices)).to(scoring.model.device)
        logits = scoring.model.logits(batch)
        if scoring.restrict_to is not None:
            allowed = torch.tensor(sorted(scoring.restrict_to), device=logits.device)
            predicted = allowed[logits[:, allowed].argmax(dim=1)]
        else:
            predicted = logits.argmax(dim=1)
        pairs = zip(batch.ids, predicted.tolist(), batch.labels.tolist(), strict=True)
        return [Detail(i, float(p == y), prediction=str(p), gold=str(y)) for i, p, y in pairs]
