"""One private step against what it should be: gradients by autograd, clipping and noise in closed form."""

import copy
import json

import pytest
import torch
from privately import assert_near, batch_of, clipped_sum, example_gradients, moved, norms, plain, private, trained

from clkit.engine.clipping import Clipper, choose_way
from clkit.errors import CapabilityError

ROWS = [0, 3, 5, 6]
FULL = {"lora": {"r": 0}}


@pytest.fixture
def varied(text_content, tmp_path):
    """Records of different lengths by three people with four, three and one records."""
    rows = [
        {"prompt": f"say {i}", "answer": "ab " * (1 + i % 4), "subject": "xyz"[(i > 3) + (i > 6)]} for i in range(8)
    ]
    folder = tmp_path / "varied"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "test.jsonl").write_text(json.dumps({"prompt": "ask", "answer": "b"}) + "\n")
    return {**text_content, "tasks": {"source": "jsonl", "tasks": [str(folder)]}}


@pytest.fixture
def digits_content(tmp_path):
    return {
        "output_dir": str(tmp_path / "run"),
        "model": {"name": "mlp", "hidden": [8]},
        "tasks": {"source": "digits", "train_limit": 12, "eval_limit": 6},
        "train": {"batch_size": 4},
    }


@pytest.mark.parametrize(
    ("model", "way"),
    [({}, "hooks"), ({}, "loop"), ({}, "ghost"), (FULL, "hooks"), (FULL, "ghost"), (FULL, "loop")],
    ids=lambda v: str(v),
)
def test_without_noise_and_clipping_it_is_the_mean_of_the_examples_own_losses(model, way, varied):
    expected = clipped_sum(example_gradients(plain(varied, model), ROWS), 1e9)
    ours = moved(private(varied, model=model, per_unit=way), ROWS)
    assert_near(ours, {n: g / 4 for n, g in expected.items()})
    assert any(g.abs().max() > 1e-3 for g in ours.values())


@pytest.mark.parametrize("way", ["hooks", "ghost", "loop"])
def test_each_example_is_clipped_by_its_own_norm(way, varied):
    gradients = example_gradients(plain(varied, FULL), ROWS)
    clip = sorted(norms(gradients))[2] * 0.999  # two above, two below
    trainer = private(varied, model=FULL, per_unit=way, train={"clip": clip})
    expected = clipped_sum(gradients, clip)
    assert_near(moved(trainer, ROWS), {n: g / 4 for n, g in expected.items()})


def test_clipping_agrees_with_per_sample_gradients_of_torch_func(digits_content):
    trainer = plain(digits_content)
    module, batch = trainer.model.module, batch_of(trainer, ROWS)
    weights = {n: p.detach() for n, p in module.named_parameters()}

    def loss(weights, x, y):
        scores = torch.func.functional_call(module, weights, (x[None],))
        return torch.nn.functional.cross_entropy(scores, y[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, batch.inputs["x"], batch.labels)
    square = sum((g.flatten(1) ** 2).sum(dim=1) for g in each.values())
    clip = float(square.sqrt().median())
    factors = (clip / (square.sqrt() + 1e-6)).clamp(max=1)
    assert (factors < 1).any() and (factors == 1).any()
    expected = {n: torch.einsum("b,b...->...", factors, g) / 4 for n, g in each.items()}
    trainer = private(digits_content, train={"clip": clip})
    assert_near(moved(trainer, ROWS), expected)


@pytest.mark.parametrize("micro_batch", [0, 1, 2, 3])
@pytest.mark.parametrize("way", ["hooks", "loop"])
def test_a_subjects_records_are_clipped_as_one_however_the_batch_is_cut(way, micro_batch, varied):
    rows = list(range(8))
    gradients = example_gradients(plain(varied), rows)
    subjects = [{n: sum(gradients[i][n] for i in members) for n in gradients[0]} for members in ((0, 1, 2, 3), (4, 5, 6), (7,))]  # fmt: skip
    clip = sorted(norms(subjects))[1] * 0.9
    trainer = private(varied, unit="subject", per_unit=way, train={"clip": clip, "micro_batch": micro_batch})
    expected = clipped_sum(subjects, clip)
    assert_near(moved(trainer, rows), {n: g / 4 for n, g in expected.items()})
    by_record = clipped_sum(gradients, clip)
    assert not all(torch.allclose(expected[n], by_record[n]) for n in expected), "clipping records is something else"


@pytest.mark.parametrize("way", ["hooks", "ghost", "loop"])
def test_micro_batches_give_what_one_batch_gives(way, varied):
    rows = [0, 1, 2, 5, 7]
    whole, cut = (
        moved(private(varied, model=FULL, per_unit=way, train={"clip": 0.5, "micro_batch": size}), rows)
        for size in (0, 2)
    )
    assert_near(whole, cut)


@pytest.mark.parametrize("modules", [["all-linear"], ["1.self_attn.v_proj", "1.mlp.up_proj"]])
def test_parameters_own_gradients_are_left_out_from_the_second_batch_on_and_nothing_else_changes(modules, varied):
    lora = {"r": 2, "target_modules": modules}
    ours, loop = (private(varied, {"clip": 0.1}, {"lora": lora}, per_unit=way) for way in ("hooks", "loop"))
    for rows in ([0, 1], [2, 0, 3], [1]):
        assert_near(moved(ours, rows), moved(loop, rows))
    clipper = ours.engine._clipper
    with torch.enable_grad():
        losses = ours.strategy.example_losses(batch_of(ours, [0, 1]))
    (leaf,) = clipper._entry._leaves
    clipper.expect([0, 1])
    seen = []
    handles = [p.register_hook(seen.append) for p in trained(ours).values()]
    clipper.add(losses, [0, 1])
    assert not seen and leaf.grad is not None, "no parameter got a gradient of its own"
    assert all(total is not None for total in clipper.take())
    for handle in handles:
        handle.remove()


@pytest.mark.filterwarnings("error:Full backward hook")
@pytest.mark.parametrize("way", ["hooks", "ghost"])
def test_a_first_layer_whose_input_needs_no_gradient_is_clipped_without_a_warning(way, varied):
    assert moved(private(varied, {"clip": 0.1}, per_unit=way), [0, 1])


def test_an_examples_gradient_does_not_depend_on_the_lengths_of_others(varied):
    """The reference implementation's mean over all tokens of a batch fails here."""
    trainer = plain(varied)
    (alone,) = example_gradients(trainer, [0])
    for other in (1, 3):
        batch = batch_of(trainer, [0, other])
        loss = trainer.strategy.example_losses(batch)[0]
        found = torch.autograd.grad(loss, list(trained(trainer).values()))
        assert_near(dict(zip(alone, found, strict=True)), alone)


def test_noise_has_sigma_times_clip_over_the_expected_batch(digits_content):
    trainer = private(digits_content, noise_multiplier=2.0, train={"clip": 0.5}, model={"hidden": [500]})
    noise = torch.cat([g.flatten() for g in moved(trainer, []).values()])
    assert len(noise) > 30_000
    assert float(noise.std()) == pytest.approx(2.0 * 0.5 / 4, rel=0.02) and abs(float(noise.mean())) < 0.01
    gradient = clipped_sum(example_gradients(plain(digits_content, {"hidden": [500]}), ROWS), 0.5)
    trainer = private(digits_content, noise_multiplier=2.0, train={"clip": 0.5}, model={"hidden": [500]})
    rest = torch.cat([(g - gradient[n] / 4).flatten() for n, g in moved(trainer, ROWS).items()])
    assert float(rest.std()) == pytest.approx(2.0 * 0.5 / 4, rel=0.02)


def test_an_empty_batch_moves_the_weights_by_noise_alone_and_is_counted(varied):
    trainer = private(varied, noise_multiplier=1.0, train={"clip": 1.0})
    assert all((g != 0).all() for g in moved(trainer, []).values())
    assert trainer.engine.facts["spent"] == [[1.0, 0.5, 1]]
    moved(trainer, ROWS)
    assert trainer.engine.facts["spent"] == [[1.0, 0.5, 2]]


def test_units_are_drawn_independently_at_the_planned_rate(varied):
    trainer = private(varied, train={"steps": 2000, "batch_size": 2})
    drawn = torch.zeros(2000, 8)
    for step, batch in enumerate(trainer.loader):
        drawn[step, batch.indices] = 1
    assert (drawn.mean(dim=0) - 0.25).abs().max() < 0.04, "each at the rate"
    sizes = drawn.sum(dim=1)
    assert float(sizes.var()) == pytest.approx(8 * 0.25 * 0.75, rel=0.1), "the batch size is binomial"
    assert (sizes == 0).float().mean() == pytest.approx(0.75**8, abs=0.025), "and can be zero"
    repeated = (drawn[1:] * drawn[:-1]).mean()
    assert float(repeated) == pytest.approx(0.25**2, abs=0.01), "steps know nothing of each other"


def test_a_subject_is_drawn_with_all_its_records(varied):
    trainer = private(varied, unit="subject", train={"steps": 300, "batch_size": 4})
    members = [{0, 1, 2, 3}, {4, 5, 6}, {7}]
    counts = [0, 0, 0]
    for batch in trainer.loader:
        for i, records in enumerate(members):
            assert records & {*batch.indices.tolist()} in (records, set())
            counts[i] += records <= {*batch.indices.tolist()}
    assert all(abs(c / 300 - 0.5) < 0.1 for c in counts)


def test_the_generator_is_secret_unless_it_is_a_test(varied):
    def step(**engine):
        trainer = private(varied, noise_multiplier=1.0, train={"clip": 1.0}, **engine)
        return torch.cat([g.flatten() for g in moved(trainer, []).values()])

    assert torch.equal(step(test_seed=7), step(test_seed=7))
    assert not torch.equal(step(test_seed=7), step(test_seed=8))
    assert not torch.allclose(step(test_seed=None), step(test_seed=None)), "the run's own seed is the same"


def test_the_way_follows_from_the_model(varied):
    assert private(varied).engine.facts["per_unit"] == "hooks"
    assert private(varied, model=FULL).engine.facts["per_unit"] == "ghost"
    checkpointed = private(varied, model={"gradient_checkpointing": True})
    assert checkpointed.engine.facts["per_unit"] == "loop"
    assert "recomputed" in checkpointed.engine.facts["because"]
    expected = clipped_sum(example_gradients(checkpointed, ROWS), 1e9)
    assert_near(moved(checkpointed, ROWS), {n: g / 4 for n, g in expected.items()})
    with pytest.raises(CapabilityError, match="hooks does not work here"):
        private(varied, model={"gradient_checkpointing": True}, per_unit="hooks")
    with pytest.raises(CapabilityError, match="ghost does not work here, because a subject's records"):
        private(varied, unit="subject", per_unit="ghost")


@pytest.mark.parametrize("what", ["gpt2", "tied llama"])
def test_models_that_opacus_can_not_clip_go_through_the_loop(what):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"vocab_size": 40, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    if what == "gpt2":
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        module = GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=2, **drop, **small))
    else:
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        module = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **shape, **small))
    parameters = list(module.parameters())
    way, why = choose_way(module, parameters, asked="auto", grouped=False, autocast=False, rows=2**20)
    assert way == "loop" and ("positions" if what == "gpt2" else "tied") in why
    ids = torch.randint(2, 40, (3, 8))
    clipper = Clipper(module, parameters, 0.1, way)
    clipper.expect([0, 1, 2])
    each = []
    for i in range(3):
        loss = module(input_ids=ids[i : i + 1], labels=ids[i : i + 1]).loss[None]
        clipper.add(loss, [i])
        loss = module(input_ids=ids[i : i + 1], labels=ids[i : i + 1]).loss
        each.append(dict(enumerate(torch.autograd.grad(loss, parameters))))
    assert_near(dict(enumerate(clipper.take())), clipped_sum(each, 0.1))


@pytest.mark.parametrize("way", ["hooks", "ghost"])
def test_a_layer_that_gets_all_tokens_as_rows_of_one_matrix_is_refused(way):
    class Merged(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x.reshape(-1, 4)).view(x.shape)

    module = Merged().train()
    clipper = Clipper(module, list(module.parameters()), 0.1, way)
    clipper.expect([0, 1, 2])
    with pytest.raises(CapabilityError, match="engine.per_unit=loop"):
        clipper.add(module(torch.ones(3, 5, 4)).square().mean((1, 2)), [0, 1, 2])
    clipper.close()


def test_ghost_clipping_of_a_layer_that_runs_twice_is_refused_with_what_to_do():
    layer = torch.nn.Linear(4, 4)
    clipper = Clipper(torch.nn.Sequential(layer, layer), list(layer.parameters()), 0.1, "ghost")
    clipper.expect([0, 1])
    with pytest.raises(CapabilityError, match="used more than once.*engine.per_unit=loop"), clipper.watching():
        layer(layer(torch.ones(2, 4)))
    with pytest.raises(NotImplementedError, match="another"), clipper.watching():
        raise NotImplementedError("another")
    clipper.close()


def test_an_adapter_on_opts_feed_forward_layers_is_clipped_by_records_or_refused():
    import peft
    from transformers import OPTConfig, OPTForCausalLM

    shape = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 1}
    config = OPTConfig(vocab_size=40, num_attention_heads=2, max_position_embeddings=32, dropout=0.0, **shape)
    lora = peft.LoraConfig(r=2, target_modules=["fc1", "fc2"], init_lora_weights=False)
    module = peft.get_peft_model(OPTForCausalLM(config), lora).train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    row = torch.arange(3, 12)[None]

    def clipped(way):
        clipper = Clipper(module, parameters, 1e-3, way)
        clipper.expect([0])
        try:
            clipper.add(module(input_ids=row, labels=row).loss[None], [0])
            return torch.cat([g.flatten() for g in clipper.take()]).norm()
        finally:
            clipper.close()

    with pytest.raises(CapabilityError, match="engine.per_unit=loop"):
        clipped("hooks")
    assert clipped("loop") <= 1e-3


def test_a_batch_that_did_not_come_whole_is_never_used(varied):
    trainer = private(varied)
    engine, batch = trainer.engine, batch_of(trainer, ROWS)
    first, _ = (trainer.loader._source.batch(batch.indices[rows]) for rows in engine.rows(batch, 2))
    engine.backward(sum(engine.losses(trainer.strategy, first).values()))
    with pytest.raises(RuntimeError, match="2 rows of the batch are missing"):
        engine.unscale()


def test_the_module_is_left_as_it_was(varied):
    trainer = private(varied)
    keys = list(trainer.model.module.state_dict())
    moved(trainer, ROWS)
    trainer.engine.finish()
    assert list(trainer.model.module.state_dict()) == keys
    assert not any(hasattr(p, "grad_sample") for p in trainer.model.module.parameters())
    copy.deepcopy(trainer.model.module)
