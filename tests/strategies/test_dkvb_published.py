"""The bottleneck against numbers computed with the published implementation (tests skip where those are absent)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clkit.strategies.dkvb.bottleneck import Bottleneck
from clkit.strategies.dkvb.config import DKVBConfig
from clkit.strategies.dkvb.index import nearest, project
from clkit.strategies.dkvb.keys import KeyAverages, lloyd

C, K, WIDTH, D, CLASSES = 3, 8, 4, 12, 5


@pytest.fixture
def golden(data_root):
    file = data_root.parent / "golden" / "dkvb" / "bottleneck.npz"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    with np.load(file) as data:
        return {name: torch.from_numpy(np.asarray(data[name])) for name in data.files}


@pytest.fixture
def toy(data_root):
    file = data_root.parent / "golden" / "dkvb" / "toy2d.npz"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    with np.load(file) as data:
        return {name: torch.from_numpy(np.asarray(data[name])) for name in data.files}


def bottleneck(golden, values=None, classes=CLASSES, **options):
    """Ours with the reference's projection and keys."""
    sizes = {"heads": C, "pairs": K, "key_dim": WIDTH, "value_dim": CLASSES}
    head = Bottleneck(DKVBConfig(**sizes, **options), D, classes, seed=0)
    head.projection.copy_(golden["proj/R"])
    head.place(golden["keys"])
    if values is not None:
        head.values.data.copy_(values)
    return head


def close(ours, theirs, atol=1e-6, rtol=0.0):
    torch.testing.assert_close(ours.detach().double(), theirs.double(), atol=atol, rtol=rtol)


def smoothed_loss(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


# --- heads --------------------------------------------------------------------------------------------------------------
def test_projections_have_columns_of_norm_one_and_give_the_published_queries(golden):
    ours = Bottleneck(DKVBConfig(heads=C, pairs=K, key_dim=14), D, 2, seed=0).projection
    close(ours.norm(dim=1), torch.ones(C, 14))
    raw = golden["proj/raw"]
    close(raw / raw.norm(dim=1, keepdim=True), golden["proj/R"])
    close(project(golden["proj/x"], golden["proj/R"], C), golden["proj/q"])
    tokens = golden["proj/x_tokens"]
    queries = project(tokens.flatten(0, 1), golden["proj/R"], C).view(*tokens.shape[:2], C, WIDTH)
    close(queries.transpose(1, 2), golden["proj/q_tokens"])


def test_chunks_are_consecutive_slices(golden):
    close(project(golden["chunk/x"], None, C), golden["chunk/q"])


# --- keys ---------------------------------------------------------------------------------------------------------------
def trajectory(golden, name, averages, batches):
    """Follow one run of the reference step by step."""
    theta = float(golden[f"ema/{name}/theta"])
    for step, x in enumerate(batches):
        queries = project(x, golden["proj/R"], C)
        index = averages.step(queries, 0.95)
        assert torch.equal(index, golden[f"ema/{name}/idx"][step])
        hits = F.one_hot(index, K).sum(0)
        assert torch.equal(hits, golden[f"ema/{name}/hits"][step])
        if theta:
            dead = averages.overwrite_dead(queries, theta, golden[f"ema/{name}/rand"][step].clamp(min=0))
            assert torch.equal(dead, golden[f"ema/{name}/dead"][step])
        close(averages.masses, golden[f"ema/{name}/N"][step], atol=2e-6)
        close(averages.sums, golden[f"ema/{name}/m"][step], atol=5e-8, rtol=5e-5)
        close(averages.keys, golden[f"ema/{name}/keys"][step], atol=5e-8, rtol=5e-5)


@pytest.mark.parametrize("name", ["plain", "expire"])
def test_the_moving_average_follows_the_published_one(golden, name):
    start = golden["ema/keys0"]
    trajectory(golden, name, KeyAverages(start.clone(), start.clone(), torch.zeros(C, K)), golden["ema/x"])


def test_the_moving_average_follows_the_published_one_from_a_settled_state(golden):
    start = KeyAverages(*(golden[f"ema/warm/start_{n}"].clone() for n in ("keys", "m", "N")))
    trajectory(golden, "warm", start, golden["ema/warm/x"])


def test_every_token_is_a_query_of_the_moving_average(golden):
    start = golden["ema/keys0"]
    averages = KeyAverages(start.clone(), start.clone(), torch.zeros(C, K))
    tokens = golden["ema_tokens/x"].transpose(1, 2).flatten(0, 1)  # (b, d, 2) -> (2 b, d)
    averages.step(project(tokens, golden["proj/R"], C), 0.95)
    close(averages.masses, golden["ema_tokens/N"], atol=2e-6)
    close(averages.sums, golden["ema_tokens/m"], atol=5e-8, rtol=5e-5)
    close(averages.keys, golden["ema_tokens/keys"], atol=5e-8, rtol=5e-5)


def test_k_means_finds_the_published_means(golden):
    samples = golden["kmeans/samples"].transpose(0, 1)  # (N, C, k)
    rows = golden["kmeans/start_rows"]
    start = samples[rows, torch.arange(C).unsqueeze(1)]
    means, sizes = lloyd(samples, start, int(golden["kmeans/iters"]))
    close(means, golden["kmeans/means"])
    assert torch.equal(sizes, golden["kmeans/bins"])


# --- lookups ------------------------------------------------------------------------------------------------------------
def test_lookups_choose_and_read_the_published_pairs(golden):
    head = bottleneck(golden, golden["lookup/values"])
    pairs = head.lookup(golden["lookup/x"])
    assert torch.equal(pairs.long(), golden["lookup/idx"])
    queries = head.queries(golden["lookup/x"])
    chosen = head.keys[torch.arange(C), pairs.long()]
    close(-(queries - chosen).square().sum(2), golden["lookup/neg_sq_dist"], atol=1e-5)
    close(head.values[torch.arange(C), pairs.long()], golden["lookup/values_read"])
    close(head(pairs), golden["lookup/logits"])


def test_a_temperature_draws_keys_by_the_noise_given(golden):
    queries = project(golden["lookup/x"], golden["proj/R"], C)
    tau = float(golden["gumbel/tau"])
    drawn = nearest(queries, golden["keys"], noise=golden["gumbel/noise"], temperature=tau).squeeze(2)
    assert torch.equal(drawn.long(), golden["gumbel/idx"])
    assert not torch.equal(drawn.long(), golden["lookup/idx"])


def test_the_usage_mask_excludes_what_training_has_not_read(golden):
    head = bottleneck(golden, golden["lookup/values"])
    assert torch.equal(head.lookup(golden["lookup/x"], masked=True).long(), golden["mask_empty/idx"])
    close(head(head.lookup(golden["lookup/x"], masked=True)), golden["mask_empty/logits"])
    head.record(head.lookup(golden["mask/x_train"]))
    assert torch.equal(head.usage, golden["mask/counter"].long())
    assert (head.usage == 0).double().mean().item() == pytest.approx(float(golden["mask/unused_fraction"]))
    pairs = head.lookup(golden["lookup/x"], masked=True)
    assert torch.equal(pairs.long(), golden["mask/idx"])
    assert not torch.equal(pairs.long(), golden["lookup/idx"])
    close(head(pairs), golden["mask/logits"])
    assert torch.equal(head.usage, golden["mask/counter"].long())


# --- gradients and training ---------------------------------------------------------------------------------------------
def test_gradient_and_counters_of_one_batch(golden):
    head = bottleneck(golden, golden["lookup/values"])
    pairs = head.lookup(golden["grad/x"])
    assert torch.equal(pairs.long(), golden["grad/idx"])
    head.record(pairs)
    assert torch.equal(head.usage, golden["grad/counter"].long())
    logits = head(pairs)
    close(logits, golden["grad/logits"])
    loss = smoothed_loss(logits, golden["grad/y"])
    close(loss, golden["grad/loss"])
    loss.backward()
    close(head.values.grad, golden["grad/values_grad"])
    assert head.keys.grad is None and head.projection.grad is None


def test_the_three_nearest_keys_are_summed_and_all_counted(golden):
    head = bottleneck(golden, golden["lookup/values"], top_k=3)
    pairs = head.lookup(golden["topk3/x"])
    index = pairs.long().view(-1, C, 3)
    theirs = golden["topk3/idx"]
    assert torch.equal(index, theirs)
    head.record(pairs)
    assert torch.equal(head.usage, golden["topk3/counter"].long())
    logits = head(pairs)
    close(logits, golden["topk3/logits"])
    loss = smoothed_loss(logits, golden["topk3/y"])
    close(loss, golden["topk3/loss"])
    loss.backward()
    close(head.values.grad, golden["topk3/values_grad"])


def test_tokens_are_averaged(golden):
    head = bottleneck(golden, golden["lookup/values"], tokens=True)
    x = golden["tokens/x"].transpose(1, 2)  # (B, 2, d)
    logits = head(head.lookup(x.flatten(0, 1)).view(*x.shape[:2], C))
    close(logits, golden["tokens/logits"])
    loss = smoothed_loss(logits, golden["tokens/y"])
    close(loss, golden["tokens/loss"])
    loss.backward()
    close(head.values.grad, golden["tokens/values_grad"])


@pytest.mark.parametrize(("name", "kind"), [("linear_probe", "linear"), ("lp_no_bias", "linear"), ("mlp_128", "mlp")])
def test_decoders_behind_the_values(golden, name, kind):
    head = bottleneck(golden, golden["lookup/values"], classes=10, decoder=kind)
    given = [v for k, v in sorted(golden.items()) if k.startswith(f"decoder/{name}/param")]
    linear = [m for m in head.decoder if isinstance(m, nn.Linear)]
    for i, layer in enumerate(linear):
        layer.weight.data.copy_(given.pop(0))
        if name == "lp_no_bias":
            layer.bias.data.zero_()
        else:
            layer.bias.data.copy_(given.pop(0))
        assert not layer.weight.requires_grad, i
    logits = head(head.lookup(golden["grad/x"]))
    close(logits, golden[f"decoder/{name}/logits"])
    loss = smoothed_loss(logits, golden[f"decoder/{name}/y"])
    close(loss, golden[f"decoder/{name}/loss"])
    loss.backward()
    close(head.values.grad, golden[f"decoder/{name}/values_grad"])


@pytest.mark.parametrize(("name", "top_k"), [("train", 1), ("train_topk3", 3)])
def test_ten_steps_of_training(golden, name, top_k):
    head = bottleneck(golden, top_k=top_k)
    optimizer = torch.optim.SGD([head.values], lr=0.3)
    close(head.values, golden[f"{name}/values"][0])
    for step, (x, y) in enumerate(zip(golden["train/x"], golden["train/y"], strict=True)):
        pairs = head.lookup(x)
        head.record(pairs)
        logits = head(pairs)
        loss = smoothed_loss(logits, y)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_([head.values], 1.0)
        optimizer.step()
        close(logits, golden[f"{name}/logits"][step])
        close(loss, golden[f"{name}/loss"][step])
        close(norm, golden[f"{name}/grad_norm"][step])
        close(head.values, golden[f"{name}/values"][step + 1])
        assert torch.equal(head.usage, golden[f"{name}/counter"][step].long())
    pairs = head.lookup(golden["lookup/x"], masked=True)
    assert torch.equal(pairs.long().view(golden[f"{name}/eval_idx"].shape), golden[f"{name}/eval_idx"])
    close(head(pairs), golden[f"{name}/eval_logits"])


# --- the paper's figure -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "heads", "pairs"), [("chunk_1x400", 1, 400), ("randproj_20x20", 20, 20)])
def test_the_two_dimensional_figure_step_by_step(toy, name, heads, pairs):
    part = {k.removeprefix(f"toy/{name}/"): v for k, v in toy.items() if k.startswith(f"toy/{name}/")}
    split = "chunk" if heads == 1 else "random"
    head = Bottleneck(DKVBConfig(heads=heads, pairs=pairs, key_dim=2, split=split), 2, 8, seed=0)
    if heads > 1:
        head.projection.copy_(part["R"])
    head.place(part["keys"])
    head.values.data.copy_(part["values0"])
    optimizer = torch.optim.Adam([head.values], lr=1e-3)
    for stage, (x, y) in enumerate(zip(part["x_train"], part["y_train"], strict=True)):
        pairs_ = head.lookup(x)
        for _ in range(1000):
            head.record(pairs_)
            optimizer.zero_grad()
            F.cross_entropy(head(pairs_), y).backward()
            optimizer.step()
        close(head.values, part["values_after"][stage], atol=1e-4)
        assert torch.equal(head.usage, part["counter_after"][stage].long())
    predicted = head(head.lookup(toy["toy/x_test"], masked=True)).argmax(1)
    assert torch.equal(predicted, part["test_pred_final"].long())
    assert (predicted == toy["toy/y_test"]).float().mean() > 0.95
    axis = torch.linspace(0, 1, 100)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=2).flatten(0, 1)
    assert torch.equal(head(head.lookup(grid, masked=True)).argmax(1), part["grid_pred_final"].long().flatten())
