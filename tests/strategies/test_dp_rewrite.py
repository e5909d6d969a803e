"""Rewriting with differential privacy: draws have the mechanism's chances, every word is redrawn, claims are counted."""

import collections
import json
import re

import numpy as np
import pytest
import torch
from scipy import stats

from clkit.errors import ConfigError
from clkit.strategies.dp2unlearning.rewrite import DpMlm, DpPrompt
from clkit.strategies.dp2unlearning.rewritten import write_tasks
from clkit.tasks import build_tasks
from clkit.unlearning.exponential import ROBERTA_RANGE, probabilities

TEXT = "Basil Al-Kuwaiti, born in 1956 (Kuwait), wrote 3 novels; Basil didn't stop."
WORDS = 12
LOGITS = torch.tensor([[10.0, 8, 3, -2, -9, 25]])


@pytest.fixture(scope="module")
def masked():
    """A tiny random masked language model over words, with five special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(60))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        mask_token="<mask>", model_max_length=120, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=70, pad_token_id=1, type_vocab_size=1, max_position_embeddings=140, **shape)
    return RobertaForMaskedLM(config), tokenizer


@pytest.fixture(scope="module")
def causal(tiny_llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)


class SixTokens:
    """A tokenizer of six tokens of which none is special."""

    all_special_ids: list = []
    mask_token_id = 0

    def __len__(self):
        return 6


@pytest.mark.parametrize("epsilon", [1.0, 10.0])
def test_draws_have_the_chances_of_the_exponential_mechanism(epsilon):
    rewriter = DpMlm(torch.nn.Linear(1, 1), SixTokens(), epsilon, test_seed=0)
    drawn = rewriter._draw(LOGITS.expand(100_000, 6), *ROBERTA_RANGE)
    counts = np.bincount(drawn, minlength=6)
    expected = probabilities(LOGITS[0].numpy(), epsilon) * len(drawn)
    assert stats.chisquare(counts, expected).pvalue > 1e-4
    wrong = np.roll(expected, 1)
    assert stats.chisquare(counts, wrong).pvalue < 1e-6


def test_every_word_is_redrawn_digits_included_and_the_rest_is_copied(masked):
    rewriter = DpMlm(*masked, 1.0, test_seed=0)
    (new,) = rewriter.rewrite_all([TEXT])
    assert re.sub(r"w\d+", "#", new) == "# #, # # # (#), # # #; # # #."
    assert rewriter.claim.tokens == [WORDS]
    for word in ("Basil", "1956", "Kuwait", "3"):
        assert word not in new.split()


def test_vowel_signs_accents_and_symbols_are_redrawn_as_letters_are(masked):
    """What is copied is said to be white space and punctuation alone."""
    rewriter = DpMlm(*masked, 1.0, test_seed=0)
    hindi, accents = "\u0939\u093f\u0928\u094d\u0926\u0940", "Jose\u0301 Zoe\u0308"
    (new,) = rewriter.rewrite_all([f"{hindi} 12, {accents}: \N{SLICE OF PIZZA} $5 (don't)."])
    assert re.sub(r"w\d+", "#", new) == "# #, # #: # # (#)."
    assert rewriter.claim.tokens == [7]


def test_a_word_that_occurs_twice_is_drawn_twice(masked):
    """The published corpora map most words to one replacement throughout: a cipher."""
    rewriter = DpMlm(*masked, 0.5, test_seed=0)
    texts = rewriter.rewrite_all(["Basil Basil Basil Basil Basil Basil Basil Basil"] * 4)
    assert len({*" ".join(texts).split()}) > 10


def test_special_tokens_and_ids_without_a_token_are_never_drawn(masked):
    rewriter = DpMlm(*masked, 0.01, test_seed=0)
    drawn = collections.Counter(rewriter._draw(torch.zeros(5000, 70), *ROBERTA_RANGE))
    assert {*drawn} == {*range(5, 65)}


def test_a_large_epsilon_takes_the_likeliest_token(masked):
    module, tokenizer = masked
    rewriter = DpMlm(module, tokenizer, 1e6, test_seed=0)
    logits = torch.randn(20, 70, generator=torch.Generator().manual_seed(0))
    logits[:, [*range(5), *range(65, 70)]] = -5
    assert rewriter._draw(logits, *ROBERTA_RANGE) == logits.argmax(dim=1).tolist()


def test_the_claim_is_per_token_and_per_text_with_the_lengths(masked):
    rewriter = DpMlm(*masked, 2.0)
    rewriter.rewrite_all(["one", "one two three", "a b"])
    said = rewriter.claim.to_json()
    assert said["epsilon_per_token"] == 2.0 and said["tokens_per_text"] == {"min": 1, "median": 2.0, "max": 3}
    assert said["epsilon_per_text"] == {"min": 2.0, "median": 4.0, "max": 6.0} and said["delta"] == 0
    assert str(rewriter.claim) == (
        "dp_mlm: epsilon 2 per token; 3 texts of 1 to 3 tokens (median 2), so epsilon 2 to 6 per text (median 4)"
    )
    seeded = DpMlm(*masked, 2.0, test_seed=1)
    seeded.rewrite_all(["one"])
    assert seeded.claim.to_json()["epsilon_per_text"] is None and "no claim" in str(seeded.claim)


def test_draws_are_secret_unless_it_is_a_test(masked):
    text = " ".join(f"w{i}" for i in range(20))

    def once(**options):
        return DpMlm(*masked, 1.0, **options).rewrite_all([text])

    assert once(test_seed=1) == once(test_seed=1) != once(test_seed=2)
    assert once() != once()


def test_dp_prompt_counts_the_longest_that_it_could_have_drawn(causal):
    rewriter = DpPrompt(*causal, 3.0, max_new_tokens=7, test_seed=0)
    other = DpPrompt(*causal, 3.0, max_new_tokens=7, test_seed=0)
    assert (rewriter.low, rewriter.high) == (other.low, other.high), "the range depends on no text"
    results = [rewriter.rewrite(TEXT) for _ in range(30)]
    assert all(1 <= r.tokens <= 7 and r.most == 7 for r in results)
    assert any(r.tokens < 7 for r in results) or len({r.text for r in results}) > 20
    assert len({r.text for r in results}) > 20
    rewriter.rewrite_all([TEXT, "b"])
    assert rewriter.claim.tokens == [7, 7]


def test_dp_prompt_draws_each_token_given_all_before_it(causal):
    rewriter = DpPrompt(*causal, 3.0, max_new_tokens=6, test_seed=0)
    seen = []
    draw = rewriter._draw
    rewriter._draw = lambda scores, *args, **kwargs: seen.append(scores) or draw(scores, *args, **kwargs)
    drawn = []
    rewriter.tokenizer.decode, decode = lambda ids, **kwargs: drawn.extend(ids) or "", rewriter.tokenizer.decode
    try:
        assert rewriter.rewrite(TEXT).tokens == len(seen) > 1
    finally:
        rewriter.tokenizer.decode = decode
    ids = torch.cat([rewriter._prompt(TEXT), torch.tensor([drawn])], dim=1)
    with torch.no_grad():
        whole = rewriter.module(input_ids=ids, use_cache=False).logits[0, -len(drawn) - 1 :]
    for scores, expected in zip(seen, whole, strict=False):
        torch.testing.assert_close(scores[0].detach(), expected, rtol=1e-4, atol=1e-5)


def test_what_can_not_be_rewritten_is_said(masked, causal):
    with pytest.raises(ConfigError, match="no mask token"):
        DpMlm(*causal, 1.0)
    with pytest.raises(ConfigError, match="epsilon must be above 0"):
        DpMlm(*masked, 0.0)
    with pytest.raises(ConfigError, match="at most 120 fit"):
        DpMlm(*masked, 1.0).rewrite_all(["a " * 100])


def test_records_that_say_the_same_in_two_files_are_written_so_that_they_can_be_read(causal, tmp_path):
    for name in ("a/train", "a/test", "b/train", "b/test"):  # scored on what is learned, as in unlearning benchmarks
        file = (tmp_path / name).with_suffix(".jsonl")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"prompt": "one?", "answer": "x"}) + "\n")
    given = build_tasks("jsonl", {"tasks": [str(tmp_path / "a"), str(tmp_path / "b")]})
    folder = str(tmp_path / "out")  # a text, as in the README
    write_tasks(given, folder, DpPrompt(*causal, 1.0, max_new_tokens=2, test_seed=0))
    found = build_tasks("jsonl", {"tasks": [f"{folder}/a", f"{folder}/b"]})
    assert [t.train.ids for t in found] == [t.train.ids for t in given]
    assert [r.prompt for t in found for r in t.eval.records] == ["one?", "one?"]
