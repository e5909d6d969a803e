"""Prompts and answers as tokens: templates, separators, where the answer starts, what is cut when it is too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clkit.errors import ModelError

_SENTINEL = "clkit0prompt0goes0here"
ANY_WORD = "the"
"""Almost every tokenizer has it with a space in front: a prompt must not depend on its answer's first letter."""


@dataclass(slots=True)
class Tokens:
    """A prompt and an answer, tokenised together.

    Attributes:
        ids: all tokens, without EOS.
        answer: index of the answer's first token.
        head: how many tokens come before the user's own text (BOS, the template's opening); never cut.
        tail: how many tokens stand between the user's text and the answer (the template's closing); never cut.
    """

    ids: list[int]
    answer: int
    head: int
    tail: int

    def prompt(self, room: int) -> list[int]:
        """The prompt in at most ``room`` tokens: the beginning of the user's text is cut, the template stays.

        ``room`` must be at least ``head + tail``.
        """
        excess = max(self.answer - room, 0)
        return self.ids[: self.head] + self.ids[self.head + excess : self.answer]


class PromptFormat:
    """How prompts are shown to a language model.

    Args:
        tokenizer: a fast transformers tokenizer.
        style: ``chat`` (the prompt is a user message in the chat template), ``plain`` (the prompt itself), or ``auto``
            (chat where the tokenizer has a template).

    Raises:
        ModelError: ``chat`` without a template, or a tokenizer without EOS.
    """

    def __init__(self, tokenizer: Any, style: str) -> None:
        if style == "chat" and not tokenizer.chat_template:
            raise ModelError(
                "`model.prompt` is 'chat', but the tokenizer has no chat template; take 'plain' or 'auto'."
            )
        if tokenizer.eos_token_id is None:
            raise ModelError("The tokenizer has no end-of-sequence token, so an answer would have no end.")
        self.tokenizer = tokenizer
        self.chat = style == "chat" or (style == "auto" and bool(tokenizer.chat_template))
        self.eos: int = tokenizer.eos_token_id
        self._bos: list[int] = [] if self.chat else self._leading_special_tokens()
        self._head, self._tail = self._template_parts() if self.chat else ("", "")
        # What comes before the user's own text, as tokens: BOS, or the template's opening.
        self.opening: list[int] = self._bos + list(tokenizer(self._head, add_special_tokens=False).input_ids)

    def _leading_special_tokens(self) -> list[int]:
        """What the tokenizer puts before plain text (BOS or nothing); a chat template writes its own."""
        bare = self.tokenizer("a", add_special_tokens=False).input_ids
        full = self.tokenizer("a").input_ids
        for k in range(len(full) - len(bare) + 1):
            if full[k : k + len(bare)] == bare:
                return list(full[:k])
        return []

    def _template_parts(self) -> tuple[str, str]:
        """The template's text before and after the user's message; empty where it changes the message."""
        before, found, after = self.render([_SENTINEL])[0].partition(_SENTINEL)
        return (before, after) if found else ("", "")

    def render(self, prompts: Sequence[str]) -> list[str]:
        """The text that comes before the answer, for each prompt."""
        if not self.chat:
            return list(prompts)
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return list(self.tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False))

    def separator(self, context: str, answer: str) -> str:
        """One space between a plain prompt and its answer, unless either brings white space."""
        spaced = not context or context[-1].isspace() or answer[:1].isspace()
        return "" if self.chat or spaced else " "

    def tokenise(self, contexts: Sequence[str], answers: Sequence[str]) -> list[Tokens]:
        """Tokenise each rendered context together with its answer, in one call.

        A token belongs to the answer when it ends after the answer's first character begins: a token that spans the
        separator and the answer (" Paris") does. So does a space that is a token of its own (in front of a digit) where
        a word would take it along: the prompt that a model is given ends before it, so it has to be learned. No token
        spans the end of a chat template and an answer that begins with white space: the template is always read whole.
        """
        if not contexts:
            return []
        joined = self._joined(contexts, answers)
        merged = [i for i, text in enumerate(joined) if self.chat and answers[i][:1].isspace() and text.is_merged]
        before = self._joined([contexts[i] for i in merged], [""] * len(merged)) if merged else []
        after = self._joined([""] * len(merged), [answers[i] for i in merged]) if merged else []
        for i, shown, said in zip(merged, before, after, strict=True):
            joined[i] = shown.followed_by(said)
        first = [text.answer for text in joined]
        apart = [i for i, text in enumerate(joined) if text.has_space_apart]
        before_a_word = self._joined([contexts[i] for i in apart], [ANY_WORD] * len(apart)) if apart else []
        for i, other in zip(apart, before_a_word, strict=True):
            first[i] = len(common_prefix([joined[i].ids[: first[i]], other.ids[: other.answer]]))
        result = []
        for context, text, answer in zip(contexts, joined, first, strict=True):
            head = int((text.ends[:answer] <= len(self._head)).sum()) if self._head else 0
            tail = int((text.begins[head:answer] >= len(context) - len(self._tail)).sum()) if self._tail else 0
            extra = len(self._bos)
            result.append(Tokens(self._bos + text.ids, answer + extra, head + extra, tail))
        return result

    def _joined(self, contexts: Sequence[str], answers: Sequence[str]) -> list[_Joined]:
        starts, texts = [], []
        for context, answer in zip(contexts, answers, strict=True):
            separator = self.separator(context, answer)
            starts.append(len(context) + len(separator))
            texts.append(context + separator + answer)
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        found = []
        for text, start, ids, offsets in zip(
            texts, starts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            begins, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
            found.append(_Joined(text, start, list(ids), begins, ends))
        return found


@dataclass(slots=True)
class _Joined:
    """A context with its answer, which starts at ``start``; its tokens, and where in the text they begin and end."""

    text: str
    start: int
    ids: list[int]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]

    @property
    def answer(self) -> int:
        """The first token that ends after the answer's first character begins."""
        # That one and all that follow: byte-level tokenizers may give several tokens one offset.
        return int(np.append(self.ends > self.start, True).argmax())

    @property
    def is_merged(self) -> bool:
        """Whether the answer's first token begins before the answer does."""
        return self.answer < len(self.ids) and int(self.begins[self.answer]) < self.start

    def followed_by(self, answer: _Joined) -> _Joined:
        """This text with another one behind it that is its answer; the tokens are those of each alone."""
        size = len(self.text)
        begins, ends = np.append(self.begins, answer.begins + size), np.append(self.ends, answer.ends + size)
        return _Joined(self.text + answer.text, size, self.ids + answer.ids, begins, ends)

    @property
    def has_space_apart(self) -> bool:
        """Whether a token before the answer is nothing but the space in front of it."""
        last = self.answer - 1
        spaced = last >= 0 and self.text[: self.start].endswith(" ")
        return spaced and not self.text[int(self.begins[last]) : self.start].strip()


def common_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all rows begin."""
    shared: list[int] = []
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        shared.append(tokens[0])
    return shared
