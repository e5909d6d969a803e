"""WISE on every architecture: the layer is found, nothing changes before an edit, gradients are those of a full pass."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from wise_models import ARCHITECTURES, edited, logits, quick, record, tiny

from clkit.editing.losses import target_loss
from clkit.editing.prefix import position_ids
from clkit.editing.rows import build
from clkit.errors import CapabilityError, ConfigError
from clkit.models.location import locate
from clkit.strategies.wise.core import Wise
from clkit.strategies.wise.losses import margin_loss
from clkit.strategies.wise.optimise import Objective, Others
from clkit.strategies.wise.side_memory import SideMemory

TEXT = "Town of 1?"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_empty_memory_changes_nothing_and_scores_nothing(name):
    model = tiny(name)
    before = logits(model, TEXT)
    wise = Wise(model, quick())
    wise.layer.put([SideMemory([(0, ["a"])], wise._zeros(), -1.0)])
    assert torch.equal(logits(model, TEXT), before)
    assert wise.router.last[0].scores == {"shard-0": 0.0} and wise.router.last[0].memory == "shard-0"


def full_pass(wise, rows, matrix, settings):
    """Loss of one edit by a plain forward pass of the whole model, all logits, all layers."""
    read = {}
    ends = torch.tensor([int(p.nonzero().max()) for p in rows.prompt])[:, None]
    changed = torch.arange(rows.prompt.shape[1]) >= (ends if wise.router.answer_only else 0)

    def add(module, args, out):
        read["x"] = args[0]
        return out + F.linear(args[0], matrix) * changed.expand(out.shape[:2])[..., None]

    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
    if "position_ids" in wise.reader._takes:
        inputs["position_ids"] = position_ids(rows.attention_mask)
    hook = wise.location.projection.register_forward_hook(add)
    with wise.router.switched_off():
        scores = wise.model.module(**inputs, use_cache=False).logits
    hook.remove()
    sizes = F.linear(read["x"], matrix).norm(dim=-1)
    means = torch.stack([s[p][-1] for s, p in zip(sizes, rows.prompt, strict=True)]) / settings.unit
    answer = target_loss(scores[: rows.edits, :-1], rows.labels[: rows.edits, 1:])
    return answer, margin_loss(means[: rows.edits], means[rows.edits :], settings.alpha, settings.beta, settings.gamma)


# By name also layers that give something else than the hidden state: GPT-2's c_fc is what the published code edits.
NAMED = [("llama", "1.mlp.up_proj"), ("gpt2", "1.mlp.c_fc"), ("llama", "1.self_attn.v_proj")]


@pytest.mark.parametrize("reach", ["answer", "sequence"])
@pytest.mark.parametrize(("name", "layer"), [*itertools.product(ARCHITECTURES, ["0", "1", "-1"]), *NAMED])
def test_the_cached_prefix_has_the_gradients_of_a_full_pass(name, layer, reach):
    wise, edit = Wise(tiny(name), quick(layer=layer, reach=reach)), record(1)
    rows = wise._rows(edit)
    whole = build(wise.model.form, edit.prompt, edit.target_new, wise._contexts, [edit.locality_prompt], 200, eos=True)
    others = Others(wise._stacked([]), wise._stacked([edit.locality_prompt]))
    with wise.router.switched_off():
        prefix = wise.reader.prefix(rows, rows.ends if reach == "answer" else None)
        assert (prefix.start > 0) == (reach == "answer")
        settings = wise._settings(prefix.activations, prefix.base, rows)
        matrix = 0.01 * torch.randn(wise.location.shape, generator=torch.Generator().manual_seed(0))
        matrix.requires_grad_()
        ours = Objective(prefix, rows, wise.router, settings, others=others)(matrix)[:2]
        theirs = full_pass(wise, whole, matrix, settings)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    (mine,), (full,) = torch.autograd.grad(sum(ours), matrix), torch.autograd.grad(sum(theirs), matrix)
    assert float(full.abs().max()) > 0.05
    assert float((mine - full).abs().max()) < 1e-6 * max(1.0, float(full.abs().max()))


def test_only_what_is_above_the_edited_layer_runs_while_an_edit_is_learned():
    wise = Wise(tiny(num_hidden_layers=4), quick(layer="2", steps=5, stop_loss=0.0))
    counts = [0] * 4
    for i, block in enumerate(wise.location.blocks):
        block.self_attn.register_forward_pre_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
    heads = []
    wise.location.lm.lm_head.register_forward_hook(lambda m, args, out: heads.append(tuple(out.shape[:2])))
    wise._contexts = ["a", "bb"]
    wise.learn(record(0))
    once = 2 + 4  # the rows, before and after their prompts' end; alone the prompt, its irrelevant one and two built-in
    assert counts[:3] == [once, once, once + 1]  # the edited block also to see that it adds directly
    assert counts[3] == 5 + once + 1
    assert heads == [(3, len("T0x") + 1)] * 5  # only edit rows, only where a target or the end is predicted


def test_a_block_that_scales_what_its_projection_gives_is_run_as_a_whole():
    model = tiny("granite", residual_multiplier=1.02)
    wise, plain = Wise(model, quick()), Wise(tiny("granite", residual_multiplier=1.0), quick())
    for made, direct in ((wise, False), (plain, True)):
        made.learn(record(0))
        assert made.reader._direct is direct


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_scaling(dtype):
    model = tiny()
    model.module.to(dtype)
    wise = Wise(model, quick())
    wise.learn(record(0))
    assert wise.reader._direct is True


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "phi"])
def test_learning_lowers_the_loss_and_leaves_the_model_alone(name):
    model = tiny(name)
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    flags = {k: p.requires_grad for k, p in model.module.named_parameters()}
    plain = logits(model, TEXT)
    wise = Wise(model, quick(steps=25))
    outcome = wise.learn(record(1))
    assert sum(outcome.losses[-1]) < 0.9 * sum(outcome.losses[0])
    assert all(torch.equal(model.module.state_dict()[k], v) for k, v in before.items())
    assert any("side_memories.0.matrix" in k for k in model.module.state_dict())
    wise.remove()
    assert {k: v.shape for k, v in model.module.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert {k: p.requires_grad for k, p in model.module.named_parameters()} == flags
    assert all(p.grad is None for p in model.module.parameters())
    assert torch.equal(logits(model, TEXT), plain)
    assert "generate" not in model.module.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_a_lora_adapter_counts_as_part_of_the_base():
    from peft import LoraConfig, get_peft_model

    model = tiny()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapter = LoraConfig(r=2, target_modules=["down_proj", "q_proj"], init_lora_weights=False)
        model.module = get_peft_model(model.module, adapter).eval()
    before = logits(model, TEXT)
    wise = edited(1, model)
    assert type(wise.location.projection).__module__.startswith("peft")
    with wise.unedited():
        assert torch.equal(logits(model, TEXT), before)
    (memory,) = wise.layer.all()
    with wise.router.forced(memory.name):
        assert not torch.equal(logits(model, TEXT), before)
    wise.remove()
    assert torch.equal(logits(model, TEXT), before)


class Packed(torch.nn.Module):
    """Stands for a quantised layer: int8 codes of another shape, a scale per row, no float matrix.

    The codes are a parameter (bitsandbytes), a buffer (GPTQ, AWQ), or no tensor that torch knows of (torch's own int8).
    """

    def __init__(self, linear, kept):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (linear.weight.detach() / scale).round().to(torch.int8)
        if kept == "parameter":
            self.weight = torch.nn.Parameter(codes.reshape(-1, 1), requires_grad=False)
        elif kept == "buffer":
            self.register_buffer("weight", codes.reshape(-1, 1))
        self.packed = [codes, scale]

    def forward(self, x):
        codes, scale = self.packed
        return F.linear(x, codes * scale)


@pytest.mark.parametrize("kept", ["parameter", "buffer", "hidden"])
def test_a_quantised_base_learns_and_is_left_alone(kept):
    model = tiny()
    mlp = model.module.model.layers[1].mlp
    mlp.down_proj = Packed(mlp.down_proj, kept)
    before = logits(model, TEXT)
    wise = Wise(model, quick(steps=25))
    outcome = wise.learn(record(1))
    assert sum(outcome.losses[-1]) < 0.9 * sum(outcome.losses[0])
    wise.remove()
    assert torch.equal(logits(model, TEXT), before)


def test_a_half_precision_model_keeps_the_memory_in_float32():
    model = tiny()
    wise = edited(2, model)
    exact = [m.matrix.clone() for m in wise.layer.all()]
    model.module.to(torch.bfloat16)
    assert model.module.lm_head.weight.dtype == torch.bfloat16
    for memory, matrix in zip(wise.layer.all(), exact, strict=True):
        assert memory.matrix.dtype == torch.float32 and torch.equal(memory.matrix, matrix)
    assert logits(model, TEXT).dtype == torch.bfloat16
    wise.learn(record(7))


def test_the_memories_move_with_the_model():
    wise = edited(1)
    wise.model.module.to("meta")
    assert wise.layer.all()[0].matrix.device.type == "meta"


@pytest.mark.parametrize(
    ("where", "name", "block"),
    [
        ("auto", "layers.2.mlp.down_proj", 2),
        ("0", "layers.0.mlp.down_proj", 0),
        ("-2", "layers.1.mlp.down_proj", 1),
        ("layers.1.mlp.up_proj", "layers.1.mlp.up_proj", 1),
        ("model.layers[1].mlp.down_proj.weight", "layers.1.mlp.down_proj", 1),
    ],
)
def test_the_layer_is_found(where, name, block):
    found = locate(tiny().module, where, 0.85)
    assert (found.name, found.block) == (name, block)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("3", "got 3, expected a block from 0 to 2"),
        ("layers.1.mlp.down_prj", "no linear layer of the model. Did you mean 'layers.1.mlp.down_proj'"),
        ("mlp.down_proj", "names 3 modules"),
    ],
)
def test_a_layer_that_is_not_there_is_an_error(where, message):
    with pytest.raises(ConfigError, match=message):
        locate(tiny().module, where, 0.85)


def test_a_layer_that_reads_no_rows_is_refused():
    model = tiny("opt", word_embed_proj_dim=32, ffn_dim=48)
    with pytest.raises(CapabilityError, match="'layers.1.fc2' reads .* set strategy.layer to another layer"):
        edited(1, model, layer="1.fc2")


def test_models_without_blocks_or_without_a_plain_matrix_are_refused():
    with pytest.raises(CapabilityError, match="no list of decoder blocks"):
        locate(torch.nn.Linear(2, 2), "auto", 0.85)
    with pytest.raises(CapabilityError, match="strategy.compat reads the edited matrix"):
        Wise(tiny("gptj"), quick(compat=True))
