"""Relearning and rounding: what comes back of what was only hidden, on real networks."""

import pytest
import torch
from people import run

from clkit import api
from clkit.unlearning.robustness import quantised, relearn, rounded


def answers_loss(model, encoded):
    with torch.no_grad():
        return float(model.loss(encoded.batch(torch.arange(len(encoded)))))


@pytest.fixture
def opened(people_content, tmp_path):
    with api.open_run(run(people_content, tmp_path)) as trainer:
        trainer.model.module.eval()
        yield trainer, trainer.run.encodings.train(0)


def test_relearning_takes_the_steps_it_says_and_brings_the_records_back(opened):
    trainer, encoded = opened
    before = answers_loss(trainer.model, encoded)
    relearn(trainer.model, trainer.strategy.parameters(), encoded, steps=0, rate=0.01)
    assert answers_loss(trainer.model, encoded) == before
    relearn(trainer.model, trainer.strategy.parameters(), encoded, steps=20, rate=0.02)
    assert answers_loss(trainer.model, encoded) < before
    assert all(p.grad is None for p in trainer.strategy.parameters())


def test_rounding_covers_adapter_and_base_and_leaves_the_model_as_it_was(opened):
    trainer, encoded = opened
    module = trainer.model.module
    state = {k: v.clone() for k, v in module.state_dict().items()}
    before = answers_loss(trainer.model, encoded)
    gaps = []
    for bits in (16, 8, 2):
        with quantised(module, bits):
            gaps.append(abs(answers_loss(trainer.model, encoded) - before))
            layer = dict(module.named_modules())["base_model.model.model.layers.0.mlp.up_proj"]
            levels = [len(row.unique()) for row in layer.base_layer.weight]
            assert max(levels) <= 2**bits - 1, "merged first, so the adapter is rounded too"
            assert layer.merged
        assert not layer.merged
    assert gaps[0] < 1e-3 < gaps[2] and gaps[1] < gaps[2]
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert answers_loss(trainer.model, encoded) == before


def test_a_model_that_fails_within_is_restored_too(opened):
    module = opened[0].model.module
    state = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(RuntimeError, match="within"), quantised(module, 4):
        raise RuntimeError("within")
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_a_rounded_row_has_its_own_scale_and_the_error_is_at_most_half_a_level():
    weight = torch.randn(5, 64) * torch.tensor([1e-3, 1.0, 10.0, 1e3, 0.0])[:, None]
    for bits in (4, 8):
        level = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((rounded(weight, bits) - weight).abs() <= 0.5001 * level).all()


def test_the_transposed_layers_of_gpt2_are_rounded_by_output_too():
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": 0, "eos_token_id": 0}
    module = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8, **ends))
    state = {k: v.clone() for k, v in module.state_dict().items()}
    with quantised(module, 2):
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            key = f"transformer.h.0.{name}.weight"
            assert torch.equal(module.state_dict()[key], rounded(state[key].T, 2).T), name
        assert torch.equal(module.lm_head.weight, state["lm_head.weight"])
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
