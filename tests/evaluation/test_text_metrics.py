"""Option log-likelihood, generation and perplexity of a tiny language model, against direct computation."""

import math
from dataclasses import replace

import pytest
import torch
from byte_level import byte_tokenizer
from tiny_lm import text_task, tiny_module

from clkit.config import EvalConfig
from clkit.errors import CapabilityError, DataError
from clkit.evaluation import options as options_module
from clkit.evaluation.base import evaluate
from clkit.evaluation.options import gold_option
from clkit.models.causal_lm import CausalLM
from clkit.tasks.base import TextExamples, TextRecord


@pytest.fixture(scope="module")
def lm():
    return CausalLM("tiny", tiny_module(), byte_tokenizer())


def run(lm, task, metric, **options):
    return evaluate(lm, task, lm.encode(task.eval), metric=metric, options=EvalConfig(**options))


def record(**fields) -> TextRecord:
    return TextRecord(**{"prompt": "p", "answer": "a", "id": "r"} | fields)


def with_records(task, *records):
    return replace(task, eval=TextExamples(records))


@torch.inference_mode()
def option_scores(lm, encoded, i, per_token):
    prompt = encoded.prompt_ids(i)
    found = []
    for option in encoded.option_ids(i):
        logits = lm.module(input_ids=torch.tensor([prompt + option])).logits[0].log_softmax(-1)
        values = [float(logits[len(prompt) - 1 + k, token]) for k, token in enumerate(option)]
        found.append(sum(values) / (len(values) if per_token else 1))
    return found


class TestOptions:
    @pytest.mark.parametrize(("metric", "per_token"), [("option-loglik", True), ("option-loglik-raw", False)])
    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    def test_the_likeliest_option_is_predicted(self, lm, metric, per_token, batch_size):
        task = text_task(metric, 12)
        encoded, score = lm.encode(task.eval), run(lm, task, metric, batch_size=batch_size)
        right = 0
        for i, (r, detail) in enumerate(zip(task.eval.records, score.details, strict=True)):
            scores = option_scores(lm, encoded, i, per_token)
            assert detail.prediction == r.options[scores.index(max(scores))]
            assert detail.gold == r.answer and detail.value == float(detail.prediction == r.answer)
            right += detail.prediction == r.answer
        assert score.value == pytest.approx(right / 12)

    def test_raw_and_normalised_scores_differ_where_lengths_do(self, lm):
        task = text_task("option-loglik", 12)
        raw, mean = run(lm, task, "option-loglik-raw"), run(lm, task, "option-loglik")
        assert [d.prediction for d in raw.details] != [d.prediction for d in mean.details]

    def test_a_model_that_can_not_be_packed_gets_the_same_score(self, lm, monkeypatch):
        task = text_task("option-loglik", 12)
        packed = run(lm, task, "option-loglik")
        monkeypatch.setattr(options_module, "why_not_packed", lambda module, longest: "this is a test")
        monkeypatch.setattr(options_module, "packed_logliks", None)
        rows = run(lm, task, "option-loglik", max_batch_tokens=256)
        assert rows.details == packed.details

    def test_of_equal_options_the_first_wins(self, lm):
        task = with_records(text_task("option-loglik"), record(answer="b", options=("a", "a", "b"), label="a"))
        detail = run(lm, task, "option-loglik").details[0]
        assert detail.gold == "b" and detail.prediction in ("a", "b")
        same = with_records(task, record(answer="a", options=("a", "a")))
        assert run(lm, same, "option-loglik").value == 1.0

    def test_the_right_option_is_the_answer_or_the_label_or_the_answers_first_line(self):
        assert gold_option(record(answer="b", label="a", options=("a", "b"))) == 1
        assert gold_option(record(answer="B\nBecause.", label="A", options=("A", "B"))) == 0
        assert gold_option(record(answer=" B\nBecause.", options=("A", "B"))) == 1
        assert gold_option(record(answer="c", options=("A", "B"))) is None
        assert gold_option(record()) is None

    def test_records_without_a_right_option_are_listed_all_at_once(self, lm):
        task = with_records(
            text_task("option-loglik"),
            record(id="none"),
            record(id="wrong", options=("x", "y")),
            record(options=("a",)),
        )
        with pytest.raises(DataError, match=r"record 'none': it has no `options`[\s\S]*record 'wrong'") as caught:
            run(lm, task, "option-loglik")
        assert len(caught.value.problems) == 2


class TestGeneration:
    def test_answers_are_judged_against_their_references(self, lm):
        task = text_task("exact-match", 5)
        said = lm.generate(lm.encode(task.eval), range(5), 6)
        records = [replace(r, answer=said[i] if i % 2 else "zz") for i, r in enumerate(task.eval.records)]
        score = run(lm, with_records(task, *records), "exact-match", max_new_tokens=6, batch_size=2)
        assert [d.value for d in score.details] == [float(i % 2) for i in range(5)]
        assert [d.prediction for d in score.details] == said
        assert [d.gold for d in score.details] == [r.answer for r in records]

    def test_answers_keep_their_spaces_whatever_the_tokenizer_says_of_cleaning_up(self, monkeypatch):
        tokenizer = byte_tokenizer()
        # Of byte-pair tokenizers newer versions of transformers want it said twice.
        tokenizer.clean_up_tokenization_spaces = True
        tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
        lm = CausalLM("tiny", tiny_module(), tokenizer)
        written = torch.tensor([tokenizer("print ( x , y ) .").input_ids])
        monkeypatch.setattr(lm.module, "generate", lambda input_ids, **_: torch.cat([input_ids, written], dim=1))
        task = with_records(text_task("exact-match"), record(answer="print ( x , y ) ."))
        assert run(lm, task, "exact-match").value == 1

    def test_answers_that_are_cut_before_their_reference_ends_are_told_once(self, lm, caplog):
        task = with_records(text_task("exact-match"), record(), record(id="2", answer="b" * 40))
        for limit in (40, 39, 39):
            run(lm, task, "exact-match", max_new_tokens=limit)
        said = [r.getMessage() for r in caplog.records if "max_new_tokens" in r.getMessage()]
        assert len(said) == 1 and said[0].startswith("Task 'colours': 1 of 2 answers are longer than")
        assert "(39)" in said[0] and "set it to 40" in said[0]

    def test_rouge_has_f1_as_value_and_precision_and_recall_beside_it(self, lm, monkeypatch):
        monkeypatch.setattr(CausalLM, "generate", lambda *_: ["the cat sat"])
        task = with_records(text_task("rouge-l"), record(answer="the cat sat on mats"))
        score = run(lm, task, "rouge-l")
        assert score.details[0].extra == {"precision": 1.0, "recall": 0.6}
        assert score.value == pytest.approx(0.75)

    def test_tolerant_match_chooses_among_options_where_there_are_some(self, lm, monkeypatch):
        says = {"p1": "It is Rome, not Paris.", "p2": "It is Rome, not Paris.", "p3": "the answer is (B)"}
        monkeypatch.setattr(CausalLM, "generate", lambda _, e, idx, n: [says[e.records[i].prompt] for i in idx])
        score = run(
            lm,
            with_records(
                text_task("tolerant-match"),
                record(id="1", prompt="p1", answer="Paris"),
                record(id="2", prompt="p2", answer="Paris", options=("Paris", "Rome")),
                record(id="3", prompt="p3", answer="B\nBecause it is.", options=("A", "B")),
            ),
            "tolerant-match",
        )
        assert [d.value for d in score.details] == [1.0, 0.0, 1.0]
        assert score.details[2].gold == "B"

    def test_a_tolerant_match_needs_a_right_option(self, lm):
        with pytest.raises(DataError, match="none of its options"):
            run(lm, with_records(text_task("tolerant-match"), record(options=("x",))), "tolerant-match")

    def test_a_model_that_writes_no_text_is_refused(self, lm):
        class Mute:
            name, module = "mute", lm.module

        task = text_task("exact-match")
        with pytest.raises(CapabilityError, match="'mute' writes no text"):
            evaluate(Mute(), task, lm.encode(task.eval), metric="exact-match")


class TestPerplexity:
    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_it_is_exp_of_the_mean_negative_log_likelihood_over_all_answer_tokens(self, lm, batch_size, monkeypatch):
        monkeypatch.setattr("clkit.evaluation.perplexity._CHUNK", 5)
        task = text_task("perplexity", 9)
        encoded = lm.encode(task.eval)
        total, tokens = 0.0, 0
        with torch.inference_mode():
            for i in range(9):
                batch = encoded.batch(torch.tensor([i]))
                logits = lm.module(**batch.inputs).logits[0].log_softmax(-1)
                for at, label in enumerate(batch.labels[0].tolist()):
                    if label != -100:
                        total, tokens = total - float(logits[at - 1, label]), tokens + 1
        score = run(lm, task, "perplexity", batch_size=batch_size)
        assert score.value == pytest.approx(math.exp(total / tokens), rel=1e-5)
        assert sum(d.weight for d in score.details) == tokens and not score.higher_is_better

    def test_padding_of_a_batch_changes_nothing(self, lm):
        task = text_task("perplexity", 9)
        one, many = run(lm, task, "perplexity", batch_size=1), run(lm, task, "perplexity", batch_size=9)
        assert [d.value for d in one.details] == pytest.approx([d.value for d in many.details], rel=1e-5)

    def test_an_astronomic_perplexity_is_infinite(self):
        lm = CausalLM("wild", tiny_module(), byte_tokenizer())
        lm.module.lm_head.weight.data *= 1e5
        assert run(lm, text_task("perplexity"), "perplexity").value == math.inf
