"""The path between two adapters: its ends, the identity between its two spaces, directories in and out."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import clkit
from clkit import api, resolve
from clkit.analysis import check_adapter, deltas, interpolate, save_adapter
from clkit.errors import ConfigError, ModelError

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
WEIGHTS = "adapter_model.safetensors"
ROOT = Path(__file__).parents[2]


def adapter(seed, rank=3, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return {
        A: torch.randn(rank, 7, generator=draw, dtype=dtype),
        B: torch.randn(5, rank, generator=draw, dtype=dtype),
    }


def delta(tensors):
    return tensors[B] @ tensors[A]


def written(folder, tensors, **config):
    """An adapter directory."""
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": tensors[A].shape[0], "lora_alpha": 6, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("weight", "end"), [(0.0, 1), (1.0, 2)])
def test_the_ends_of_the_path_are_the_two_adapters(weight, end):
    expected = adapter(end)
    factor = clkit.analysis.interpolate(adapter(1), adapter(2), weight)
    assert all(torch.equal(factor[name], expected[name]) for name in expected)
    joined = interpolate(adapter(1), adapter(2), weight, space="delta")
    assert torch.allclose(delta(joined), delta(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.8, -0.5, 1.5])
def test_delta_space_is_linear_and_differs_from_factor_space_by_the_known_product(weight):
    a, b = adapter(1), adapter(2)
    factor, joined = (interpolate(a, b, weight, space=space) for space in ("factor", "delta"))
    assert torch.allclose(delta(joined), (1 - weight) * delta(a) + weight * delta(b), rtol=0, atol=1e-12)
    product = weight * (1 - weight) * (b[B] - a[B]) @ (b[A] - a[A])
    assert product.abs().max() > 0.1
    assert torch.allclose(delta(joined) - delta(factor), product, rtol=0, atol=1e-12)


def test_delta_space_joins_adapters_of_different_rank_and_scale(tmp_path):
    first = written(tmp_path / "a", adapter(1, rank=3, dtype=torch.float32), lora_alpha=6)
    second = written(tmp_path / "b", adapter(2, rank=2, dtype=torch.float32), lora_alpha=10)
    save_adapter(interpolate(first, second, 0.25, "delta"), tmp_path / "c", like=first)
    ours, ends = (dict(deltas(tmp_path / "c")), [dict(deltas(d)) for d in (first, second)])
    assert torch.allclose(ours[MODULE], 0.75 * ends[0][MODULE] + 0.25 * ends[1][MODULE], atol=1e-5)
    assert torch.allclose(ends[1][MODULE], 5 * delta(adapter(2, rank=2, dtype=torch.float32)), atol=1e-5)
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 10.0)
    with pytest.raises(ModelError, match=r"is \(3, 7\) and \(2, 7\).*space='delta' joins"):
        interpolate(first, second, 0.5)
    scaled = written(tmp_path / "d", adapter(3, dtype=torch.float32), lora_alpha=60)
    with pytest.raises(ModelError, match="different scales"):
        interpolate(first, scaled, 0.5)


def test_bare_tensors_take_the_scale_of_the_directory_they_are_joined_with(tmp_path):
    first = written(tmp_path / "a", adapter(1), lora_alpha=6)
    joined = interpolate(first, adapter(2), 0.5, "delta")
    assert torch.allclose(delta(joined), 0.5 * delta(adapter(1)) + 0.5 * delta(adapter(2)), atol=1e-12)


def test_adapters_that_do_not_belong_together_are_refused(tmp_path):
    plain = written(tmp_path / "plain", adapter(1), base_model_name_or_path="one")
    with pytest.raises(ModelError, match="different models: 'one' and 'two'"):
        interpolate(plain, written(tmp_path / "other", adapter(1), base_model_name_or_path="two"), 0.5)
    with pytest.raises(ModelError, match="in one of them only"):
        interpolate(adapter(1), {k.replace("q_proj", "v_proj"): v for k, v in adapter(1).items()}, 0.5)
    with pytest.raises(ModelError, match=r"is \(3, 7\) and \(3, 8\)"):
        interpolate(adapter(1), {**adapter(1), A: torch.zeros(3, 8)}, 0.5, "delta")
    with pytest.raises(ModelError, match="no readable PEFT adapter"):
        interpolate(plain, tmp_path / "nowhere", 0.5)
    with pytest.raises(ModelError, match="peft_type is IA3"):
        interpolate(plain, written(tmp_path / "ia3", adapter(1), peft_type="IA3"), 0.5)
    with pytest.raises(ModelError, match="it holds .*lora_magnitude_vector"):
        interpolate({**adapter(1), f"{MODULE}.lora_magnitude_vector": torch.ones(5)}, adapter(1), 0.5)
    with pytest.raises(ModelError, match="no lora_B beside it"):
        interpolate({A: torch.zeros(3, 7)}, {A: torch.zeros(3, 7)}, 0.5)
    with pytest.raises(ModelError, match="alpha_pattern"):
        interpolate(written(tmp_path / "many", adapter(1), alpha_pattern={"q": 1}), plain, 0.5)
    with pytest.raises(ConfigError, match="expected factor or delta"):
        interpolate(adapter(1), adapter(2), 0.5, space="weights")
    with pytest.raises(ModelError, match=r"ranks \[2, 3\]"):
        save_adapter({A: torch.zeros(3, 7), "x.lora_A.weight": torch.zeros(2, 7)}, tmp_path / "out", like=plain)


def test_an_adapter_is_not_written_like_one_of_other_modules(tmp_path):
    plain = written(tmp_path / "plain", adapter(1))
    elsewhere = {name.replace("q_proj", "v_proj"): value for name, value in adapter(1).items()}
    with pytest.raises(ModelError, match=r"plain: adapts other modules than the tensors given \(4 names.*q_proj"):
        save_adapter(elsewhere, tmp_path / "out", like=plain)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["plain", "wrapped", "gpt2"])
def test_an_adapter_of_another_model_is_refused_before_it_is_loaded(kind, tiny_llama, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    target = "c_attn" if kind == "gpt2" else "q_proj"

    def model():
        if kind == "gpt2":
            return GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=32, n_layer=2, n_head=4, n_positions=16))
        return AutoModelForCausalLM.from_pretrained(tiny_llama)

    made = get_peft_model(model(), LoraConfig(r=2, target_modules=[target], fan_in_fan_out=kind == "gpt2"))
    made.save_pretrained(tmp_path / "own")
    module = made if kind == "wrapped" else model()
    check_adapter(tmp_path / "own", module)
    own = load_file(tmp_path / "own" / "adapter_model.safetensors")
    check_adapter(own, module)
    narrow = {name: value[:, :-1] if "lora_A" in name else value for name, value in own.items()}
    with pytest.raises(ModelError, match=rf"adapter of another model: '.*{target}' is .* here, and the adapter's is"):
        check_adapter(narrow, module)
    deeper = {name.replace(".1.", ".7."): value for name, value in own.items()}
    with pytest.raises(ModelError, match=rf"adapter of another model: this one has no linear layer '.*7.*{target}'"):
        check_adapter(deeper, module)


def test_whole_weights_beside_the_adapter_are_interpolated_linearly():
    head = "base_model.model.score.weight"
    mixed = interpolate({**adapter(1), head: torch.zeros(2)}, {**adapter(2), head: torch.ones(2)}, 0.25, "delta")
    assert torch.equal(mixed[head], torch.full((2,), 0.25))


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("mode_connectivity", ROOT / "experiments" / "mode_connectivity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_scores_the_path_between_two_runs(text_content, tmp_path, script, capsys):
    content = {**text_content, "train": {**text_content["train"], "epochs": 3}}
    files = content["tasks"]["tasks"]
    results = []
    for name, count in (("old", 2), ("both", 3)):
        chosen = {**content["tasks"], "tasks": files[:count]}
        results.append(api.run(resolve.validate({**content, "tasks": chosen, "output_dir": str(tmp_path / name)})))
    out = tmp_path / "tables" / "path"
    ends = [str(r.run_dir / "export") for r in results]
    assert script.main([*ends, "--points", "3", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert [(r["space"], float(r["weight"])) for r in rows] == [
        (s, w) for s in ("factor", "delta") for w in (0, 0.5, 1)
    ]
    for row, matrix_row in ((rows[0], results[0].matrix[-1]), (rows[2], results[1].matrix[-1])):
        names = list(row)[5:]
        assert [float(row[n]) for n in names[: len(matrix_row)]] == pytest.approx(list(matrix_row))
        assert float(row["old"]) == pytest.approx((float(row[names[0]]) + float(row[names[1]])) / 2)
        assert float(row["new"]) == float(row[names[2]])
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert script.main([ends[0], str(tmp_path), "--config", str(tmp_path / "both" / "config.yaml")]) == 2
    assert "no readable PEFT adapter" in capsys.readouterr().err
    assert script.main([*ends, "--new", "3"]) == 2
    capsys.readouterr()
    wrong = {name: torch.cat([value, value], dim=1) for name, value in load_file(f"{ends[0]}/{WEIGHTS}").items()}
    (tmp_path / "wrong").mkdir()
    save_file(wrong, tmp_path / "wrong" / WEIGHTS)
    (tmp_path / "wrong" / "adapter_config.json").write_text(Path(ends[0], "adapter_config.json").read_text())
    assert script.main([str(tmp_path / "wrong"), ends[1]]) == 2
    assert "wrong: an adapter of another model: 'model.layers.0.self_attn.q_proj' is (32, 32) here" in (
        capsys.readouterr().err
    )


def test_the_script_knows_perplexity_and_tasks_that_are_called_like_its_columns(text_content, tmp_path, script, capsys):
    for path in map(Path, files := text_content["tasks"]["tasks"]):
        path.rename(path.with_stem({"red": "all", "blue": "old", "green": "new"}[path.stem]))
    renamed = [str(Path(file).with_stem(name)) for file, name in zip(files, ("all", "old", "new"), strict=True)]
    tasks = {**text_content["tasks"], "tasks": renamed}
    run = api.run(resolve.validate({**text_content, "tasks": {**tasks, "metric": "perplexity"}}))
    worse = {name: 50 * value for name, value in load_file(run.run_dir / "export" / WEIGHTS).items()}
    save_adapter(worse, tmp_path / "worse", like=run.run_dir / "export")
    config = ["--config", str(run.run_dir / "config.yaml"), "--out", str(tmp_path / "path")]
    assert script.main([str(run.run_dir / "export"), str(tmp_path / "worse"), "--points", "2", *config]) == 0
    first, last, *_ = csv.DictReader((tmp_path / "path.csv").open())
    own = [float(first[f"task {name}"]) for name in ("all", "old", "new")]
    assert own == pytest.approx(list(run.matrix[-1]))
    assert float(first["old"]) == pytest.approx((own[0] + own[1]) / 2)
    assert float(first["all"]) == pytest.approx(sum(own) / 3) and float(first["all"]) < float(last["all"])
    assert f"best mean over all tasks: {float(first['all']):.3f} at 0.0 in factor space" in capsys.readouterr().out
