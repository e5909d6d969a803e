"""The output layer in pieces: same loss and gradients, less memory, and only where it is the whole story."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from clkit.models.pieces import OutputLayer, summed_cross_entropy

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 24, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 3, 4, 29])
def test_loss_and_gradient_equal_plain_autograd(rows):
    draw = torch.Generator().manual_seed(0)
    head = nn.Linear(6, 11, bias=True, dtype=torch.float64)
    states = torch.randn(rows, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (rows,), generator=draw)
    targets[0] = -100
    plain = nn.functional.cross_entropy(head(states).float(), targets, ignore_index=-100, reduction="sum")
    (expected,) = torch.autograd.grad(3 * plain, states)
    found = summed_cross_entropy(head, states, targets)
    (gradient,) = torch.autograd.grad(3 * found, states)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)
    assert gradient[0].abs().max() == 0  # no target, no gradient


def test_logits_are_never_there_as_a_whole():
    seen = []
    head = nn.Linear(4, 9)
    summed_cross_entropy(
        lambda x: seen.append(len(x)) or head(x), torch.randn(20, 4, requires_grad=True), torch.zeros(20, dtype=int)
    ).backward()
    assert seen == [5, 5, 5, 5]
    assert head.weight.grad is None


def llama(**changes):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes})).requires_grad_(False)


@pytest.mark.parametrize("tied", [True, False])
def test_apart_shows_what_goes_into_the_layer_and_puts_it_back(tied):
    model = llama(tie_word_embeddings=tied)
    output = OutputLayer.of(model)
    ids = torch.tensor([[1, 2, 3]])
    whole = model(input_ids=ids).logits
    with output.apart():
        below = model(input_ids=ids).logits
    assert below.shape == (1, 3, 16)
    assert torch.equal(output.head(below), whole)
    assert torch.equal(model(input_ids=ids).logits, whole)


def test_a_model_that_reads_the_weight_of_its_output_layer_goes_on_reading_it():
    sizes = {"state_size": 4, "num_hidden_layers": 1, "vocab_size": 50, "hidden_size": 16}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).requires_grad_(False).eval()
    output = OutputLayer.of(model)
    ids = torch.tensor([[1, 2, 3]])
    whole = model(input_ids=ids).logits
    with output.apart():
        below = model(input_ids=ids).logits
    assert below.shape == (1, 3, 16) and torch.equal(output.head(below), whole)


def test_a_trained_layer_is_left_alone():
    model = llama(tie_word_embeddings=False)
    model.lm_head.requires_grad_(True)
    assert OutputLayer.of(model) is None


def test_a_model_that_caps_its_logits_is_left_alone():
    capped = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, final_logit_softcapping=0.05))
    assert OutputLayer.of(capped.requires_grad_(False)) is None
