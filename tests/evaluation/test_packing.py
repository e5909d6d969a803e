"""All options of a prompt in one sequence give what one row per option gives."""

import itertools
import logging
import random

import pytest
import torch
from tiny_lm import tiny_module

from clkit.evaluation import packing
from clkit.evaluation.packing import PACKABLE, packed_logliks, rowwise_logliks, why_not_packed
from clkit.models.routing import marked_prompt


def records():
    """Six ragged prompts, option counts 1..5 and option lengths 1..9; some options share their beginning."""
    rng = random.Random(0)

    def some(n: int) -> list[int]:
        return [rng.randrange(2, 60) for _ in range(n)]

    prompts = [some(rng.randint(1, 20)) for _ in range(6)]
    options = [[some(rng.randint(1, 9)) for _ in range(1 + i % 5)] for i in range(6)]
    options[3].append([*options[3][0], 7])
    return prompts, options


def flat(values):
    return list(itertools.chain.from_iterable(values))


def each_alone(module, prompts, options):
    """One option at a time, full logits, no padding, no cache: the definition."""
    found = []
    for prompt, opts in zip(prompts, options, strict=True):
        row = []
        for option in opts:
            logits = module(input_ids=torch.tensor([prompt + option])).logits[0].float().log_softmax(-1)
            row.append(sum(float(logits[len(prompt) - 1 + k, token]) for k, token in enumerate(option)))
        found.append(row)
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2"])
def test_packed_options_equal_each_option_alone(model_type, attention):
    module = tiny_module(model_type, attention)
    assert why_not_packed(module, 30) is None
    with torch.inference_mode():
        want = each_alone(module, *records())
        assert flat(packed_logliks(module, *records())) == pytest.approx(flat(want), abs=1e-5)
        assert flat(rowwise_logliks(module, *records())) == pytest.approx(flat(want), abs=1e-5)
    assert max(flat(want)) - min(flat(want)) > 1, "the options differ by far more than the tolerance"


@pytest.mark.parametrize("model_type", sorted(PACKABLE))
def test_every_model_type_that_is_packed_is_right_to_be(model_type):
    module = tiny_module(model_type, "eager" if model_type == "gemma2" else "sdpa", vocabulary=64)
    with torch.inference_mode():
        want = rowwise_logliks(module, *records())
        assert flat(packed_logliks(module, *records())) == pytest.approx(flat(want), abs=1e-4)


def test_an_option_sees_neither_the_other_options_nor_their_positions():
    module = tiny_module()
    prompts = [[20, 21, 22, 23]]
    with torch.inference_mode():
        alone = packed_logliks(module, prompts, [[[5, 6, 7]]])[0][0]
        for others in ([[9] * 8], [[8, 3], [4]], [[5, 6, 7]]):
            assert packed_logliks(module, prompts, [[*others, [5, 6, 7]]])[0][-1] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize(("logliks", "copies"), [(packed_logliks, 1), (rowwise_logliks, 2)])
def test_what_routes_by_the_prompt_is_told_which_tokens_are_the_prompt(logliks, copies):
    module, seen = tiny_module(), []
    module.model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append(marked_prompt()))
    module.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    prompts = [[20, 21, 22], [30]]
    with torch.inference_mode():
        logliks(module, prompts, [[[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]])
    ids, mask = seen
    assert [row[m].tolist() for row, m in zip(ids, mask, strict=True)] == [p for p in prompts for _ in range(copies)]
    assert marked_prompt() is None


def test_the_mask_and_the_positions_both_matter(monkeypatch):
    # Without either the equality above would have to fail: the tiny model is not blind to them.
    module = tiny_module()
    prompts, options = [[3, 4, 5]], [[[6, 7, 8], [9, 10, 11]]]

    def run(**changes):
        original = module.forward
        monkeypatch.setattr(module, "forward", lambda **inputs: original(**inputs | changes))
        with torch.inference_mode():
            found = packed_logliks(module, prompts, options)[0]
        monkeypatch.setattr(module, "forward", original)
        return found

    right = run()
    no_mask = run(attention_mask=torch.ones(1, 7, dtype=torch.long))
    no_positions = run(position_ids=torch.arange(7)[None])
    assert right[0] == pytest.approx(no_mask[0], abs=1e-5) and abs(right[1] - no_mask[1]) > 1e-2
    assert right[0] == pytest.approx(no_positions[0], abs=1e-5) and abs(right[1] - no_positions[1]) > 1e-2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's, not ours
def test_packing_works_below_a_peft_adapter():
    from peft import LoraConfig, get_peft_model

    module = get_peft_model(tiny_module(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    assert why_not_packed(module, 30) is None
    with torch.inference_mode():
        want = each_alone(module, *records())
        assert flat(packed_logliks(module, *records())) == pytest.approx(flat(want), abs=1e-5)
        assert flat(rowwise_logliks(module, *records())) == pytest.approx(flat(want), abs=1e-5)


def test_bfloat16_packs_within_its_precision():
    module = tiny_module().bfloat16()
    with torch.inference_mode():
        packed, rows = flat(packed_logliks(module, *records())), flat(rowwise_logliks(module, *records()))
    assert packed == pytest.approx(rows, rel=0.05, abs=0.3)
    assert len({round(v, 3) for v in packed}) > 10, "sums are float32, not rounded to bfloat16"


def test_a_float32_model_packs_under_autocast():
    module = tiny_module()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        packed = flat(packed_logliks(module, *records()))
    with torch.inference_mode():
        assert packed == pytest.approx(flat(packed_logliks(module, *records())), rel=0.05, abs=0.3)


class TestWhenPackingWouldBeWrong:
    def test_a_window_shorter_than_the_sequences_is_refused_and_a_longer_one_is_not(self):
        module = tiny_module("mistral", sliding_window=8)
        assert "window of 8" in str(why_not_packed(module, 9))
        assert why_not_packed(module, 8) is None

    def test_an_unknown_architecture_is_refused_and_one_row_per_option_still_works(self):
        class Bigrams(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.table = torch.nn.Embedding(64, 64)

            def forward(self, input_ids, attention_mask):
                return type("Out", (), {"logits": self.table(input_ids)})

        module = Bigrams()
        assert "Bigrams" in str(why_not_packed(module, 9))
        prompts, options = records()
        table = module.table.weight.detach().log_softmax(-1)
        want = [
            [sum(float(table[a, b]) for a, b in itertools.pairwise([prompt[-1], *option])) for option in opts]
            for prompt, opts in zip(prompts, options, strict=True)
        ]
        with torch.no_grad():
            assert flat(rowwise_logliks(module, prompts, options)) == pytest.approx(flat(want), abs=1e-5)

    def test_attention_that_takes_no_mask_is_refused(self):
        module = tiny_module()
        module.config._attn_implementation = "flash_attention_2"
        assert "flash_attention_2" in str(why_not_packed(module, 9))

    def test_it_is_said_once_per_reason(self, caplog):
        packing.say_not_packed.cache_clear()
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                packing.say_not_packed("of a reason")
        assert [record.getMessage() for record in caplog.records] == [
            "The prompt is computed anew for every option, not once for all: of a reason."
        ]
