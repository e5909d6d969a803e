"""The sum of past updates: in which layers it goes into the weight, in which it stays a branch, and what it equals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clkit.config import LoraConfig
from clkit.models.lora import attach_lora
from clkit.models.lora_sum import PastUpdates, adapted_layers


def tiny_lm(tiny_llama, dtype=torch.float32, targets=("all-linear",), change=None):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
    if change is not None:
        change(base)
    lora = LoraConfig(r=4, alpha=6.0, target_modules=list(targets))
    return attach_lora(base, lora, torch.Generator().manual_seed(0)).eval()


def fill(layers, seed, size=0.05):
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        layer.B.data = torch.randn(layer.B.shape, generator=generator) * size


def finish_task(layers, past):
    past.add({name: layer.update() for name, layer in layers.items()})
    for layer in layers.values():
        layer.reset(torch.Generator().manual_seed(1))


IDS = torch.arange(2, 18).view(2, 8)


def test_a_chain_of_tasks_equals_merging_bit_for_bit_and_the_base_tensors_are_not_written(tiny_llama):
    module, merged = tiny_lm(tiny_llama), tiny_lm(tiny_llama)
    layers = adapted_layers(module)
    past = PastUpdates(module, layers)
    own = {name: layer.base.weight.data for name, layer in layers.items()}
    before = {name: weight.clone() for name, weight in own.items()}
    fill(layers, 3)
    fill(adapted_layers(merged), 3)
    with torch.no_grad():
        served = module(IDS).logits
        finish_task(layers, past)
        assert torch.allclose(module(IDS).logits, served, atol=1e-5)
        wanted = merged.merge_and_unload()(IDS).logits
        assert torch.allclose(module(IDS).logits, wanted, rtol=0, atol=1e-6)
    assert all(torch.equal(own[name], before[name]) for name in own)


@torch.no_grad()
def test_a_bfloat16_base_keeps_small_updates_that_merging_would_lose(tiny_llama):
    module = tiny_lm(tiny_llama, torch.bfloat16)
    layers = adapted_layers(module)
    past = PastUpdates(module, layers)
    before = {name: layer.base.weight.clone() for name, layer in layers.items()}
    wanted = {name: torch.zeros(layer.shape) for name, layer in layers.items()}
    for seed in range(3):
        fill(layers, seed, size=3e-5)
        for name, layer in layers.items():
            wanted[name] += layer.scaling * layer.B @ layer.A
        finish_task(layers, past)
    for name, layer in layers.items():
        assert torch.equal(layer.base.weight, before[name])
        layer.base.weight.data.zero_()  # to read the branch alone: subtracting outputs would round it away
        ours = layer.base(torch.eye(layer.shape[1], dtype=torch.bfloat16)).float().T
        layer.base.weight.data.copy_(before[name])
        assert torch.allclose(ours, wanted[name], rtol=1e-2, atol=1e-2 * float(wanted[name].abs().max()))
        lost = (before[name] + wanted[name].bfloat16()).float() - before[name].float()
        assert (lost - wanted[name]).norm() > 10 * (ours - wanted[name]).norm()


class Quantised(nn.Linear):
    """Stands for a quantised layer: weights in int8, dequantised in the forward pass."""

    def __init__(self, like):
        super().__init__(like.in_features, like.out_features, bias=False)
        scale = like.weight.abs().max() / 127
        self.register_buffer("scale", scale.detach())
        self.weight = nn.Parameter((like.weight / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def quantise(base):
    for layer in base.model.layers:
        layer.mlp.up_proj = Quantised(layer.mlp.up_proj)


def tie(base):
    base.model.layers[1].self_attn.o_proj.weight = base.model.layers[0].self_attn.o_proj.weight


@torch.no_grad()
@pytest.mark.parametrize(("change", "target"), [(quantise, "up_proj"), (tie, "o_proj")])
def test_quantised_and_tied_layers_are_left_alone_and_compute_with_the_sum(tiny_llama, change, target):
    module = tiny_lm(tiny_llama, targets=(target,), change=change)
    layers = adapted_layers(module)
    past = PastUpdates(module, layers)
    before = {name: layer.base.weight.clone() for name, layer in layers.items()}
    for seed in (1, 2):
        fill(layers, seed)
        served = module(IDS).logits
        finish_task(layers, past)
        assert torch.allclose(module(IDS).logits, served, atol=1e-5)
    assert all(torch.equal(layer.base.weight, before[name]) for name, layer in layers.items())


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"rank_pattern": {"layers.1.*q_proj": 3}, "use_rslora": True},
    ],
)
def test_the_one_adapter_loads_as_the_sum_whatever_the_ranks_and_scales_of_its_layers(tiny_llama, tmp_path, options):
    from peft import LoraConfig as PeftConfig
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    config = PeftConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    module = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config, adapter_name="mine").eval()
    module.add_adapter("another", PeftConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    declared = module.peft_config["mine"].to_dict()
    layers = adapted_layers(module)
    past = PastUpdates(module, layers)
    for seed in (1, 2):
        fill(layers, seed, size=0.5)
        finish_task(layers, past)
    with past.one_adapter(module):
        module.save_pretrained(tmp_path, selected_adapters=["mine"], save_embedding_layers=False)
    assert module.peft_config["mine"].to_dict() == declared
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    untouched = base(IDS).logits
    loaded = PeftModel.from_pretrained(base, tmp_path / "mine").eval()
    assert torch.allclose(loaded(IDS).logits, module(IDS).logits, atol=1e-5)
    assert not torch.allclose(loaded(IDS).logits, untouched, atol=1e-2)
