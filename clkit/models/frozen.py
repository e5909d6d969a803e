"""Features of a frozen backbone: computed once for each example, kept in the cache, then read instead of the inputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clkit.cache import RowCache, Rows, row_names, tensors_digest
from clkit.evaluation.base import evaluation_mode
from clkit.models.encoded_examples import EncodedLabelled
from clkit.tasks.batch import Batch, Encoded

if TYPE_CHECKING:
    from clkit.models.classifier import Classifier

_BATCH = 64  # examples in a forward pass
_NAMES = ("_name_or_path", "transformers_version", "architectures", "dtype")  # of a configuration; they decide nothing


class EncodedFeatures(EncodedLabelled):
    """Examples as feature vectors.

    Args:
        features: (N, D).
        names: what :func:`clkit.cache.row_names` calls each example.
        source: the examples that they were computed from.
    """

    def __init__(self, features: Tensor, names: Sequence[bytes], source: EncodedLabelled) -> None:
        self.ids = source.ids
        self.labels = source.labels
        self.features = features
        self.names = names
        self.source = source

    def batch(self, indices: Tensor) -> Batch:
        """Inputs ``features`` (B, D) and labels (B,)."""
        features = self.features.index_select(0, indices)
        return Batch({"features": features}, self.labels.index_select(0, indices), len(indices), indices, self)


def feature_recipe(model: Classifier) -> dict[str, str]:
    """What features depend on besides the input: weights, architecture, precision and kind of device."""
    backbone = model.module.backbone
    # Models with the same modules and weights may differ in it: in the size that images are brought to, for example.
    config = getattr(backbone, "config", None)
    options = {} if config is None else {k: v for k, v in config.to_dict().items() if k not in _NAMES}
    tensors = {**backbone.state_dict(), "scale": model.module.scale, "shift": model.module.shift}
    return {
        "weights": tensors_digest(tensors),
        "architecture": f"{backbone} pooling={getattr(backbone, 'pooling', '')}",
        "config": json.dumps(options, sort_keys=True, default=str),
        "precision": f"{model.autocast_dtype or torch.float32}",
        "torch": f"{torch.__version__} {model.device.type}",
    }


def frozen_features(model: Classifier, encoded: EncodedLabelled, cache: RowCache) -> EncodedFeatures:
    """Run the backbone over all examples, in evaluation mode, or find its features in the cache."""

    def features(batch: Batch) -> Tensor:
        return model.module.features(**batch.inputs)

    def compute(rows: Tensor) -> Rows:
        flat = over_batches(model, encoded, rows, features)
        return Rows(flat, torch.ones(len(flat), dtype=torch.long))

    if not len(encoded):
        return EncodedFeatures(torch.empty(0, model.module.backbone.out_features), [], encoded)
    names = row_names(encoded)
    rows = cache.rows({"what": "features", **model.feature_recipe}, names, compute)
    return EncodedFeatures(rows.flat, names, encoded)


def over_batches(model: Classifier, encoded: Encoded, rows: Tensor, run: Callable[[Batch], Tensor]) -> Tensor:
    """What ``run`` gives for the examples at ``rows``, one row each, in their order, on the CPU.

    Examples of similar length go into one batch.
    """
    order = np.arange(len(rows))
    if encoded.lengths is not None:
        order = np.argsort(encoded.lengths[rows.numpy()], kind="stable")
    out: Tensor | None = None
    with evaluation_mode(model):
        for part in torch.split(torch.from_numpy(order), _BATCH):
            value = run(encoded.batch(rows[part]).to(model.device)).cpu()
            if out is None:
                out = value.new_empty(len(rows), *value.shape[1:])
            out[part] = value
    if out is None:
        raise ValueError("no rows to compute")
    return out.clone()  # out of inference mode
