"""The baselines do what their names say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from clkit import api, resolve
from clkit.modes import evaluating, swapped
from clkit.strategies.lwf import distillation


@pytest.fixture
def digits(tmp_path):
    return {
        "output_dir": str(tmp_path / "run"),
        "model": {"name": "mlp", "hidden": [64], "lora": {"r": 0}},
        "tasks": {"source": "digits"},
        "train": {"epochs": 6, "batch_size": 32, "optimizer": "sgd", "learning_rate": 0.05},
    }


def run(content, tmp_path, strategy, name=None):
    where = str(tmp_path / (name or (strategy if isinstance(strategy, str) else strategy["name"])))
    return api.run(resolve.validate({**content, "strategy": strategy, "output_dir": where}))


def test_on_real_digits_naive_forgets_all_and_rehearsal_little_and_joint_bounds_both(digits, tmp_path):
    naive = run(digits, tmp_path, "naive").metrics
    replay = run(digits, tmp_path, {"name": "replay", "replay": {"size": 100}}).metrics
    joint = run(digits, tmp_path, "joint").metrics
    cumulative = run(digits, tmp_path, "cumulative").metrics
    assert naive["forgetting"] > 0.9 and naive["learning_accuracy"] > 0.95
    assert replay["forgetting"] < 0.3
    assert naive["average_accuracy"] < replay["average_accuracy"] < joint["average_accuracy"] + 0.02
    assert cumulative["average_accuracy"] > 0.9
    assert joint["bwt"] is None and joint["forgetting"] is None


def test_a_buffer_under_naive_is_replay(digits, tmp_path):
    replay = run(digits, tmp_path, {"name": "replay", "replay": {"size": 50}})
    under = run(digits, tmp_path, {"name": "naive", "replay": {"size": 50}})
    np.testing.assert_array_equal(replay.matrix, under.matrix)


def test_distillation_with_weight_zero_is_naive(digits, tmp_path):
    naive = run(digits, tmp_path, "naive")
    lwf = run(digits, tmp_path, {"name": "lwf", "weight": 0.0})
    np.testing.assert_array_equal(lwf.matrix, naive.matrix)


def test_distillation_keeps_more_when_the_task_is_known_at_test(digits, tmp_path):
    digits["tasks"]["scenario"], digits["seed"] = "task", 1  # an order of tasks in which naive forgets much
    naive = run(digits, tmp_path, "naive").metrics
    lwf = run(digits, tmp_path, {"name": "lwf", "weight": 5.0}).metrics
    assert lwf["forgetting"] < 0.5 * naive["forgetting"]
    assert lwf["average_accuracy"] > naive["average_accuracy"]
    assert naive["average_accuracy"] > 0.5, "a known task leaves two classes to choose from"


def test_distillation_is_the_kl_divergence_and_zero_for_equal_logits():
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = torch.softmax(teacher / 2, -1), torch.softmax(student / 2, -1)
    expected = (p * (p / q).log()).sum() * 4
    assert float(distillation(student, teacher, 2.0)) == pytest.approx(float(expected), rel=1e-5)
    assert float(distillation(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-6)


def test_swapped_tensors_serve_within_and_leave_no_trace():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, other = torch.randn(4, 3), {"0.weight": torch.zeros(3, 3), "1.running_mean": torch.ones(3)}
    with evaluating(net), torch.no_grad(), swapped(net, other):
        assert torch.allclose(net[0](x), net[0].bias.expand(4, 3))
        assert torch.equal(net[1].running_mean, torch.ones(3))
    assert net.training and net[1].training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_teacher_before_the_student_changes_no_gradient():
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    net(x).sum().backward()
    expected = net.weight.grad.clone()
    net.zero_grad()
    with torch.no_grad(), swapped(net, {"weight": torch.zeros(2, 3)}):
        net(x)
    net(x).sum().backward()
    assert torch.equal(net.weight.grad, expected)


def test_swapped_tensors_are_what_is_computed_with_inside_one_autocast_too():
    net, x = nn.Linear(3, 2, bias=False), torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = net(x)
        with torch.no_grad(), swapped(net, {"weight": torch.zeros(2, 3)}):
            assert not net(x).any()
        again = net(x)
    assert first.abs().min() > 0 and torch.equal(again, first)


def test_a_sentence_encoder_with_a_head_learns_classes_of_text(tmp_path, tiny_llama):
    import json

    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path / "bert"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = tmp_path / "words.jsonl"
    words = ("alpha", "bravo", "charlie", "delta")
    rows = [{"prompt": f"{w} {i}", "answer": w} for i in range(20) for w in words]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    content = {
        "model": {"name": str(folder), "lora": {"r": 0}},
        "tasks": {
            "source": "jsonl",
            "kind": "classification",
            "scenario": "class",
            "tasks": [str(file)],
            "classes_per_task": 2,
        },
        "train": {"epochs": 8, "batch_size": 8, "learning_rate": 0.003},
    }
    result = run(content, tmp_path, {"name": "replay", "replay": {"size": 20}})
    assert result.matrix.shape == (2, 2) and result.metrics["learning_accuracy"] == 1.0
