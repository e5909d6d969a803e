"""One edit as token rows: the prompt in several contexts with its target, and prompts that it must not touch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clkit.errors import RequestError
from clkit.models.prompts import PromptFormat, Tokens
from clkit.models.routing import last_token

# A word that almost every tokenizer has with a space in front: that space is no part of the prompt.
_ANY_WORD = "the"


@dataclass(frozen=True)
class Rows:
    """Rows padded on the left; the first ``edits`` of them teach the target, the others are irrelevant.

    Attributes:
        input_ids: (R, T).
        attention_mask: (R, T), 1 on tokens.
        labels: (R, T), -100 where nothing is learned; a label stands at its own token.
        prompt: (R, T) bool, the tokens of the prompt.
        edits: how many rows teach the target.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    prompt: Tensor
    edits: int

    def to(self, device: torch.device) -> Rows:
        """The rows on ``device``."""
        ids, mask, labels, prompt = (
            t.to(device) for t in (self.input_ids, self.attention_mask, self.labels, self.prompt)
        )
        return Rows(ids, mask, labels, prompt, self.edits)

    @property
    def ends(self) -> Tensor:
        """(R,) position of the last token of each prompt."""
        return last_token(self.prompt, self.prompt.shape[1], len(self.prompt))

    @property
    def learned(self) -> Tensor:
        """(P,) positions whose next token is a target of some edit row."""
        return (self.labels[: self.edits, 1:] != -100).any(dim=0).nonzero().squeeze(1)


def build(
    form: PromptFormat,
    prompt: str,
    target: str,
    contexts: Sequence[str],
    irrelevant: Sequence[str],
    max_length: int,
    eos: bool,
) -> Rows:
    """Rows of one edit; labels by the offsets of prompt and target tokenised together.

    Edit rows and irrelevant rows are shown alike, with the chat template where the model has one: a template must not
    tell the router what an edit is.

    Args:
        form: how prompts are shown.
        prompt: of the edit.
        target: its new answer.
        contexts: texts put before the prompt, one row each; the prompt alone is the first row.
        irrelevant: prompts that the edit must not touch.
        max_length: tokens per row; the beginning of a longer prompt is cut.
        eos: teach the end of the answer too.

    Raises:
        RequestError: the target does not fit into ``max_length``.
    """
    shown = form.render([prompt, *(f"{context} {prompt}" for context in contexts)])
    tokens = form.tokenise(shown, [target] * len(shown))
    end = [form.eos] if eos else []
    rows: list[list[int]] = []
    prompts: list[int] = []
    for t in tokens:
        answer = [*t.ids[t.answer :], *end]
        rows.append(
            _cut(t, max_length - len(answer), f"the target '{target[:40]}' takes {len(answer)} tokens") + answer
        )
        prompts.append(len(rows[-1]) - len(answer))
    for ids in prompt_ids(form, irrelevant, max_length):
        rows.append(ids)
        prompts.append(len(ids))
    return _padded(rows, prompts, len(shown), form.tokenizer.pad_token_id)


def prompt_ids(form: PromptFormat, prompts: Sequence[str], max_length: int) -> list[list[int]]:
    """The tokens of each prompt as the model reads it before it answers; of an empty one EOS, as when it generates."""
    shown = form.render(prompts) if prompts else []
    tokens = form.tokenise(shown, [_ANY_WORD] * len(shown))
    return [_cut(t, max_length, "it has none of its own") or [form.eos] for t in tokens]


def _cut(tokens: Tokens, room: int, why: str) -> list[int]:
    if tokens.head + tokens.tail > room:
        raise RequestError(
            f"An edit does not fit the model: {why}, and the prompt has no room; raise model.max_length."
        )
    return tokens.prompt(room)


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (R, T) of rows of different lengths."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _padded(rows: list[list[int]], prompts: list[int], edits: int, pad: int) -> Rows:
    ids, mask = pad_left(rows, pad)
    place = torch.cumsum(mask, dim=1) - 1  # of a token within its row
    prompt = mask.bool() & (place < torch.tensor(prompts)[:, None])
    learn = mask.bool() & ~prompt
    learn[edits:] = False
    return Rows(ids, mask, torch.where(learn, ids, -100), prompt, edits)
