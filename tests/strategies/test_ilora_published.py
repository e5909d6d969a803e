"""I-LoRA against numbers computed with the published implementation (tests skip where those are absent)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from clkit.config import RunConfig, TrainConfig
from clkit.engine.local import LocalEngine
from clkit.memory import make_buffer
from clkit.memory.reservoir import reservoir_slot
from clkit.metrics.continual import summarize
from clkit.models.causal_lm import CausalLM
from clkit.rng import Streams
from clkit.strategies.ilora.consistency import squared_gap
from clkit.strategies.ilora.strategy import ILoRA, ILoRAConfig, ema_weight, interpolate_
from clkit.strategy import RunContext
from clkit.tasks.batch import Batch, Encoded, count_targets


@pytest.fixture
def golden(data_root):
    def load(name):
        file = data_root.parent / "golden" / "ilora" / f"{name}.npz"
        if not file.is_file():
            pytest.skip(f"{file} is not there")
        return dict(np.load(file))

    return load


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-6)])
@pytest.mark.parametrize("kind", ["hinge", "mse"])
def test_consistency_on_given_hidden_states(golden, precision, tolerance, kind):
    data = {k.removeprefix(f"{precision}/"): v for k, v in golden("ilora").items() if k.startswith(precision)}
    plastic, stable = torch.tensor(data["plastic"], requires_grad=True), torch.tensor(data["stable"])
    layers = [
        squared_gap(f.flatten(0, 1), s.flatten(0, 1), kind == "hinge") for f, s in zip(plastic, stable, strict=True)
    ]
    value = torch.stack(layers).sum() / plastic.numel()
    (gradient,) = torch.autograd.grad(value, plastic)
    assert float(value.detach()) == pytest.approx(float(data[f"{kind}_value"]), abs=tolerance)
    assert torch.allclose(gradient, torch.tensor(data[f"{kind}_grad_plastic"]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("interpolation", [0.25, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("ramp", [False, True])
def test_the_average_along_a_given_path(golden, interpolation, ramp):
    data = golden("ilora")
    key = f"ema/{'ramp' if ramp else 'fixed'}_{interpolation:g}"
    slow = {"w": torch.tensor(data["ema/slow0"])}
    for step, value in enumerate(data["ema/fast"], start=1):
        weight = ema_weight(step, interpolation, ramp)
        interpolate_(slow, {"w": nn.Parameter(torch.tensor(value))}, weight)
        np.testing.assert_allclose(slow["w"], data[f"{key}/slow"][step - 1], rtol=0, atol=1e-12)
        if ramp:
            assert weight == pytest.approx(data[f"{key}/alpha"][step - 1], abs=1e-15)


def test_the_ramp_from_step_0(golden):
    data = golden("ilora")
    for interpolation, expected in zip(data["ema/lambdas"], data["ema/ramp_first_steps"], strict=True):
        np.testing.assert_allclose([ema_weight(k, float(interpolation), True) for k in range(12)], expected, atol=1e-15)


@pytest.mark.parametrize("case", ["a", "b"])
def test_the_reservoir_takes_the_published_slots_for_the_published_draws(golden, case):
    data = {k.removeprefix(f"reservoir/{case}/"): v for k, v in golden("ilora").items()}
    draws, size, content = np.random.RandomState(int(data["numpy_seed"])), int(data["size"]), {}
    for n, expected in enumerate(data["slots"]):
        # Our slot is floor(draw * (n + 1)); the middle of the published integer's interval stands for its draw.
        draw = (draws.randint(0, n + 1) + 0.5) / (n + 1) if n >= size else 0.0
        slot = reservoir_slot(n, size, draw)
        assert (-1 if slot is None else slot) == expected
        if slot is not None:
            content[slot] = n
    assert [content[i] for i in range(size)] == data["content"].tolist()


def test_every_record_is_kept_with_the_same_probability():
    count, size, rounds = 40, 8, 1500
    kept, generator = np.zeros(count), torch.Generator().manual_seed(5)
    for _ in range(rounds):
        buffer = make_buffer("reservoir", size)
        buffer.add([buffer.ref(0, i, 0, str(i)) for i in range(count)], generator)
        kept[[ref.index for ref in buffer.refs]] += 1
    # Inclusions of one round are negatively correlated, which only makes the statistic smaller by (1 - size / count).
    statistic = ((kept - rounds * size / count) ** 2 / (rounds * size / count)).sum() / (1 - size / count)
    assert 0.001 < stats.chi2.sf(statistic, count - 1) < 0.999


class Given(Encoded):
    """Stands for the source of a batch that was not cut from any data."""

    ids = ()

    def batch(self, indices: Tensor) -> Batch:
        raise NotImplementedError


def published_llama(data):
    """The golden tiny LLaMA in float64 with its fast adapter, and the joint batch of new and replayed rows."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**json.loads(str(data["llama_config"])), tie_word_embeddings=False)
    llama = LlamaForCausalLM(config).double()
    weights = {k.removeprefix("llama/"): torch.tensor(v) for k, v in data.items() if k.startswith("llama/")}
    llama.load_state_dict(weights)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    module = get_peft_model(llama, lora).double().eval()
    parts = [(torch.tensor(data[f"{p}/input_ids"]), torch.tensor(data[f"{p}/labels"])) for p in ("batch", "replay")]
    ids, labels = (torch.cat([p[i] for p in parts]) for i in (0, 1))
    replayed = torch.arange(len(ids)) >= len(parts[0][0])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return module, Batch(inputs, labels, count_targets(labels), torch.arange(len(ids)), Given(), replayed)


def name_in(data, prefix, parameter):
    """The golden name of a peft parameter."""
    inner = parameter.removeprefix("base_model.model.").removesuffix(".default.weight")
    return torch.tensor(data[f"{prefix}/{inner}"])


class NoTokenizer:
    """Nothing is tokenised here."""

    pad_token_id = 0
    eos_token_id = 1
    chat_template = None


@pytest.fixture
def started(golden, monkeypatch):
    data = golden("tiny_llama_step")
    module, batch = published_llama(data)
    monkeypatch.setattr("clkit.models.causal_lm.PromptFormat", lambda tokenizer, form: None)
    model = CausalLM("golden", module, NoTokenizer())
    strategy = ILoRA(ILoRAConfig(compat=True))
    config = RunConfig(train=TrainConfig(batch_size=3))
    engine = LocalEngine(config.engine.config)
    strategy.setup(RunContext(model, None, engine, config, Streams(0), None))
    for name, p in strategy._fast.items():
        p.data = name_in(data, "fast", name).double()
        strategy.slow[name] = name_in(data, "slow", name).double()
    return data, strategy, batch


def test_loss_and_gradients_of_the_tiny_llama(started):
    data, strategy, batch = started
    terms = strategy.loss(batch)
    expected = {
        "cross_entropy": data["loss/ce_current"] / 2,
        "replay": data["loss/ce_replay"] / 2,
        "consistency": data["loss/consistency_hinge"],
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert float(terms[name].detach()) == pytest.approx(float(value), abs=5e-6), name
    total = torch.stack(list(terms.values())).sum()
    assert float(total.detach()) == pytest.approx(float(data["loss/total"]), abs=5e-6)
    total.backward()
    for name, p in strategy._fast.items():
        ours, theirs = p.grad, name_in(data, "grad", name)
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


def test_the_two_sided_distance_and_the_first_task_on_the_tiny_llama(started):
    data, strategy, batch = started
    strategy.config.consistency = "mse"
    assert float(strategy.loss(batch)["consistency"].detach()) == pytest.approx(
        float(data["loss/consistency_mse"]), abs=5e-6
    )
    batch.replayed = None
    first = batch.rows(torch.arange(len(batch)) < 3)
    terms = strategy.loss(first)
    assert terms.keys() == {"cross_entropy"}
    assert float(terms["cross_entropy"].detach()) == pytest.approx(float(data["loss/ce_current"]), abs=5e-6)


@pytest.mark.parametrize("score", ["exact_match", "rougeL"])
@pytest.mark.parametrize("run", ["order1_olora", "long_olora"])
def test_published_score_matrices_give_their_summary(golden, run, score):
    data = {k.removeprefix(f"{run}/{score}"): v for k, v in golden("score_matrices").items()}
    metrics = summarize(data[""])
    ours = {
        "_MFN": "average_accuracy",
        "_MFT": "learning_accuracy",
        "_MAA": "average_incremental_accuracy",
        "_BWT_over_T": "bwt_over_T",
        "_BWT_over_T_minus_1": "bwt",
        "_forgetting": "forgetting",
    }
    assert [metrics[name] for name in ours.values()] == pytest.approx([float(data[k]) for k in ours], abs=1e-9)
