"""The running average without consistency: training is replay, the average serves, options are checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stepping import trainer_for

from clkit import api, resolve
from clkit.errors import ConfigError

OPTIONS = {"interpolation": 0.6, "replay": {"size": 8}}


def run(content, tmp_path, name, **options):
    where = str(tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}")
    strategy = {"name": name, "replay": {"size": 8}, **options}
    return api.run(resolve.validate({**content, "strategy": strategy, "output_dir": where}))


def adapter(result):
    return load_file(result.run_dir / "export" / "adapter_model.safetensors")


def test_the_trained_adapter_is_that_of_replay_to_the_last_bit(text_content, tmp_path):
    ours = run(text_content, tmp_path, "ema", serve="fast")
    replay = run(text_content, tmp_path, "replay")
    np.testing.assert_array_equal(ours.matrix, replay.matrix)
    theirs = adapter(replay)
    assert all(torch.equal(value, theirs[name]) for name, value in adapter(ours).items())


def test_it_is_ilora_without_consistency_and_serves_the_average(text_content, tmp_path):
    ours = run(text_content, tmp_path, "ema", interpolation=0.6)
    ilora = run(text_content, tmp_path, "ilora", interpolation=0.6, gamma=0.0)
    np.testing.assert_array_equal(ours.matrix, ilora.matrix)
    theirs, fast = adapter(ilora), adapter(run(text_content, tmp_path, "ema", serve="fast"))
    for name, value in adapter(ours).items():
        assert torch.equal(value, theirs[name])
        assert not torch.equal(value, fast[name])


def test_the_average_is_the_closed_form_over_the_steps_of_a_run(text_content):
    trainer, tasks = trainer_for(text_content, "ema", **OPTIONS)
    trainer.prepare(tasks)
    weights = {n: p for n, p in trainer.model.module.named_parameters() if p.requires_grad}
    path, plain = [{n: p.detach().double() for n, p in weights.items()}], trainer.strategy.after_step

    def after_step():
        plain()
        path.append({n: p.detach().double() for n, p in weights.items()})

    trainer.strategy.after_step = after_step
    trainer._learn(tasks[0])
    steps = len(path) - 1
    assert steps > 2
    for name, value in trainer.strategy.slow.items():
        terms = [0.4 * 0.6 ** (steps - k) * path[k][name] for k in range(1, steps + 1)]
        expected = 0.6**steps * path[0][name] + sum(terms)
        assert torch.allclose(value.double(), expected, rtol=1e-5, atol=1e-7)


def test_what_can_not_work_is_refused_before_training(text_content):
    with pytest.raises(ConfigError, match=r"strategy.replay.size: out of range .got 0"):
        resolve.validate({**text_content, "strategy": {"name": "ema", "replay": {"size": 0}}})
    with pytest.raises(ConfigError, match=r"strategy.interpolation"):
        resolve.validate({**text_content, "strategy": {"name": "ema", "interpolation": 1.5}})
    with pytest.raises(ConfigError, match=r"strategy.*gamma"):
        resolve.validate({**text_content, "strategy": {"name": "ema", "gamma": 1.0}})
    trainer, tasks = trainer_for(text_content, "ema", replay={"size": 3})
    with pytest.raises(ConfigError, match=r"strategy.replay.size: got 3, expected at least 4"):
        trainer.prepare(tasks)
