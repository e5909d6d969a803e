"""iCaRL: the class means serve, and distillation and herding are what LwF and the buffer do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from clkit import api, resolve
from clkit.errors import CapabilityError, ConfigError
from clkit.memory import class_mean
from clkit.models import load_classifier
from clkit.models.heads import NearestMeanHead
from clkit.tasks.base import LabelledExamples, Task, TaskSequence
from clkit.trainer import SequentialTrainer


def icarl(content, **options):
    return {**content, "strategy": {"name": "icarl", "replay": {"size": 20, "policy": "herding"}, **options}}


def test_the_means_of_the_exemplars_serve_and_are_exported(vision_content):
    result = api.run(resolve.validate(icarl(vision_content)))
    with api.open_run(result.run_dir) as trainer:
        strategy = trainer.strategy
        held = [ref for ref in strategy.buffer.refs if ref.label == 3]
        assert len(held) == 2
        encoded = trainer.run.encodings.train(held[0].task)
        features = trainer.model.module.eval().features(**encoded.batch(torch.tensor([r.index for r in held])).inputs)
        np.testing.assert_allclose(strategy.means.means[3], class_mean(features.detach()), atol=1e-6)
        with trainer.serving():
            assert isinstance(trainer.model.module.head, NearestMeanHead)
        assert isinstance(trainer.model.module.head, nn.Linear)
    assert isinstance(load_classifier(result.run_dir / "export").module.head, NearestMeanHead)


def test_with_the_linear_head_it_is_lwf_with_exemplars(vision_content, tmp_path):
    ours = api.run(resolve.validate(icarl(vision_content, serve="linear")))
    content = {**icarl(vision_content), "output_dir": str(tmp_path / "lwf")}
    content["strategy"] = {"name": "lwf", "replay": content["strategy"]["replay"]}
    np.testing.assert_array_equal(api.run(resolve.validate(content)).matrix, ours.matrix)


def test_means_without_exemplars_are_refused(vision_content):
    with pytest.raises(ConfigError, match="strategy.serve: nearest-mean needs exemplars"):
        resolve.validate(icarl(vision_content, replay={"size": 0}))


def test_a_module_without_features_is_refused():
    examples = LabelledExamples(torch.zeros(2, 4), torch.tensor([0, 1]), ["a", "b"])
    tasks = TaskSequence([Task("t", examples, examples, "classification", "accuracy", (0, 1))])
    with pytest.raises(CapabilityError, match="Strategy 'icarl' needs a classifier that clkit builds"):
        SequentialTrainer(nn.Linear(4, 2), "icarl").fit(tasks)
