"""Prompts and answers as tokens: where the answer starts, what is learned, what is cut, what options look like."""

from __future__ import annotations

import pytest
import torch

from clkit.errors import DataError, ModelError
from clkit.models.encoded_text import EncodedText
from clkit.models.prompts import PromptFormat
from clkit.tasks.base import EditRecord, TextRecord
from clkit.tasks.batch import count_targets

BOS, EOS = 0, 1


def encode(tokenizer, *pairs, style="plain", max_length=64, options=None) -> EncodedText:
    records = [TextRecord(p, a, id=f"r{i}", options=options) for i, (p, a) in enumerate(pairs)]
    return EncodedText(records, PromptFormat(tokenizer, style), max_length)


def split(encoded: EncodedText, row: int = 0) -> tuple[list[int], list[int]]:
    """Prompt tokens and learned tokens of one example."""
    batch = encoded.batch(torch.tensor([row]))
    ids, labels = batch.inputs["input_ids"][0], batch.labels[0]
    return ids[labels == -100].tolist(), ids[labels != -100].tolist()


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("The capital of France is", "Paris", "The capital of France is Paris"),
        ("The capital of France is ", "Paris", "The capital of France is Paris"),
        ("The capital of France is", " Paris", "The capital of France is Paris"),
        ("Answer:\n", "Paris", "Answer:\nParis"),
        ("é ñ 日本", "はい é", "é ñ 日本 はい é"),
        ("a", "1 2", "a 1 2"),
    ],
)
def test_plain_text_is_joined_with_one_space_and_only_the_answer_is_learned(tokenizer, prompt, answer, text):
    given, learned = split(encode(tokenizer, (prompt, answer)))
    assert given[0] == BOS and BOS not in given[1:]
    assert learned[-1] == EOS
    assert tokenizer.decode(given[1:] + learned[:-1]) == text
    assert tokenizer.decode(learned[:-1]).strip() == answer.strip()
    assert given[1:] + learned[:-1] == tokenizer(text, add_special_tokens=False).input_ids


def test_a_chat_prompt_is_a_user_message_and_has_one_bos(tokenizer):
    given, learned = split(encode(tokenizer, ("Who?", "Me"), style="chat"))
    assert tokenizer.decode(given) == "<s><user>Who?<end>\n<bot>"
    assert tokenizer.decode(learned) == "Me<end>"
    assert PromptFormat(tokenizer, "auto").chat


def test_the_end_token_is_learned_although_it_pads_too(tokenizer):
    assert tokenizer.pad_token_id == EOS
    encoded = encode(tokenizer, ("a", "b"), ("The capital of France is", "Paris and Rome"))
    batch = encoded.batch(torch.tensor([0, 1]))
    short = int(encoded.lengths[0])
    assert batch.labels[0, short - 1] == EOS and batch.inputs["attention_mask"][0, short - 1] == 1
    assert (batch.inputs["input_ids"][0, short:] == EOS).all()
    assert (batch.labels[0, short:] == -100).all() and (batch.inputs["attention_mask"][0, short:] == 0).all()
    assert batch.num_targets == count_targets(batch.labels)


def test_a_batch_has_the_rows_it_was_asked_for(tokenizer):
    pairs = [(f"question {i}", "b " * (i + 1)) for i in range(5)]
    encoded = encode(tokenizer, *pairs)
    batch = encoded.batch(torch.tensor([4, 0, 4]))
    assert batch.ids == ["r4", "r0", "r4"]
    for row, i in enumerate([4, 0, 4]):
        alone = encoded.batch(torch.tensor([i]))
        n = int(encoded.lengths[i])
        assert torch.equal(batch.inputs["input_ids"][row, :n], alone.inputs["input_ids"][0])
        assert torch.equal(batch.labels[row, :n], alone.labels[0])
    assert batch.inputs["input_ids"].shape[1] == encoded.lengths.max()


def test_an_empty_prompt_gives_a_first_token_that_nothing_predicts(tokenizer):
    record = TextRecord("", "a b c", id="r")
    form = PromptFormat(tokenizer, "plain")
    form._bos = []  # a tokenizer without BOS
    batch = EncodedText([record], form, 32).batch(torch.tensor([0]))
    assert batch.num_targets == count_targets(batch.labels) == batch.labels.shape[1] - 1


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_a_long_prompt_loses_its_beginning_but_neither_template_nor_answer(tokenizer, style):
    words = " ".join(str(i % 5 + 1) for i in range(60))
    encoded = encode(tokenizer, (words + " last", "Paris"), style=style, max_length=24)
    given, learned = split(encoded)
    assert len(given) + len(learned) == 24
    assert tokenizer.decode(learned).strip() == "Paris<end>"
    text = tokenizer.decode(given)
    start, end = ("<s><user>", "last<end>\n<bot>") if style == "chat" else ("<s>", "last")
    assert text.startswith(start) and text.endswith(end)
    assert encoded.prompt_ids(0) == given


def test_answers_that_do_not_fit_are_listed_together(tokenizer):
    long = "1 2 3 4 5 " * 5
    with pytest.raises(DataError) as caught:
        encode(tokenizer, ("a", long), ("a", "b"), ("a", long), max_length=16)
    assert [p.where for p in caught.value.problems] == ["record 'r0'", "record 'r2'"]
    assert "`model.max_length` is 16" in caught.value.problems[0].what


def test_the_generation_prompt_is_the_training_prompt_and_does_not_depend_on_the_answer(tokenizer):
    for style in ("plain", "chat"):
        pairs = [("The capital of France is", a) for a in ("Paris", "Rome", "9")]
        encoded = encode(tokenizer, *pairs, style=style)
        prompts = [encoded.prompt_ids(i) for i in range(3)]
        assert prompts[0] == prompts[1] == prompts[2]
        for i in range(3):
            assert split(encoded, i)[0] == prompts[0]


@pytest.mark.parametrize("prompt", ["The capital of France is", "The capital of France is "])
def test_a_space_that_does_not_melt_into_its_answer_is_learned(tokenizer, prompt):
    encoded = encode(tokenizer, (prompt, "9 a"), (prompt, "Paris"))
    given, learned = split(encoded, 0)
    assert tokenizer.convert_ids_to_tokens(learned)[:2] == ["Ġ", "9"]  # as SmolLM2's cuts every number
    assert given == split(encoded, 1)[0] == encoded.prompt_ids(0)
    batch = encoded.batch(torch.arange(2))
    assert batch.num_targets == int((batch.labels != -100).sum())


def test_an_answer_s_white_space_does_not_melt_into_the_end_of_a_chat_template():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "ĊĠ"]
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(known)}, [("Ċ", "Ċ"), ("Ċ", "Ġ")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    template = "{% for m in messages %}user\n{{ m['content'] }}\n{% endfor %}{{ 'bot\n' }}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<end>", pad_token="<end>", chat_template=template
    )
    encoded = encode(tokenizer, *(("a?", answer) for answer in ("b", "\nb", " b", "\n\n b")), style="chat")
    for i, learned in enumerate((["b"], ["Ċ", "b"], ["Ġ", "b"], ["ĊĊ", "Ġ", "b"])):
        prompt, answer = split(encoded, i)
        assert prompt == encoded.prompt_ids(i) == tokenizer("user\na?\nbot\n").input_ids
        assert tokenizer.convert_ids_to_tokens(answer) == [*learned, "<end>"]


def test_a_trailing_space_is_left_to_the_answer(tokenizer):
    with_space = encode(tokenizer, ("France is ", "Paris")).prompt_ids(0)
    assert with_space == encode(tokenizer, ("France is", "Paris")).prompt_ids(0)
    assert tokenizer.decode(with_space[1:]) == "France is"


@pytest.mark.parametrize("style", ["plain", "chat"])
@pytest.mark.parametrize("prompt", ["The capital of France is", "Answer: ", "Answer:\n"])
def test_prompt_and_option_together_are_the_tokens_of_training(tokenizer, style, prompt):
    options = ("Paris", "Rome and it is old", "5", "é")
    encoded = encode(tokenizer, *[(prompt, o) for o in options], style=style, options=options)
    for i in range(len(options)):
        given, learned = split(encoded, i)
        assert encoded.prompt_ids(0) + encoded.option_ids(0)[i] == given + learned[:-1]


def test_an_option_that_melts_into_the_prompt_takes_its_last_token_along(tokenizer):
    import copy

    from tokenizers import Tokenizer, models

    melting = copy.deepcopy(tokenizer)
    vocab = {"<s>": 0, "<end>": 1, "x": 2, "y": 3, "xy": 4, "z": 5, "t": 6, "h": 7, "e": 8}
    melting._tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("x", "y")]))
    form = PromptFormat(tokenizer, "plain")
    form.tokenizer, form._bos = melting, []
    form.separator = lambda context, answer: ""  # type: ignore[method-assign]
    encoded = EncodedText([TextRecord("zx", "z", id="r", options=("y", "z"))], form, 16)
    assert encoded.prompt_ids(0) == [5]
    assert encoded.option_ids(0) == [[4], [2, 5]]


def test_a_prompt_is_cut_for_the_longest_option(tokenizer):
    options = ("a", "1 2 3 4 5 1 2 3")
    encoded = encode(tokenizer, ("c d " * 20, "a"), options=options, max_length=24)
    longest = max(len(o) for o in encoded.option_ids(0))
    assert len(encoded.prompt_ids(0)) + longest + 1 == 24
    with pytest.raises(DataError, match="Options are too long"):
        encode(tokenizer, ("c", "a"), options=("a", "1 2 3 4 5 " * 9), max_length=24).prompt_ids(0)


def test_records_without_options_have_none(tokenizer):
    assert encode(tokenizer, ("a", "b")).option_ids(0) == []


def test_edits_are_answered_by_their_target(tokenizer):
    record = EditRecord("The capital of France is", "Rome", id="e")
    encoded = EncodedText([record], PromptFormat(tokenizer, "plain"), 32)
    assert encoded.answer(0) == "Rome"
    assert tokenizer.decode(split(encoded)[1]) == " Rome<end>"


def test_no_records_make_an_empty_set(tokenizer):
    encoded = encode(tokenizer)
    assert len(encoded) == 0 and encoded.lengths.shape == (0,)


def test_chat_without_a_template_and_a_tokenizer_without_end_are_refused(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        PromptFormat(bare, "chat")
    assert not PromptFormat(bare, "auto").chat
    bare.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence"):
        PromptFormat(bare, "plain")


def test_a_template_that_changes_the_message_still_works(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}<user>{{ m['content'] | upper }}<bot>{% endfor %}"
    encoded = encode(other, ("who", "me"), style="chat")
    assert other.decode(split(encoded)[0]) == "<user>WHO<bot>"
