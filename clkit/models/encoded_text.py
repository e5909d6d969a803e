"""Text records as tokens: training batches, and prompts and options for scoring."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clkit.errors import DataError, Problem
from clkit.models.prompts import ANY_WORD, PromptFormat, Tokens, common_prefix
from clkit.tasks.base import EditRecord, TextRecord
from clkit.tasks.batch import Batch, Encoded


class EncodedText(Encoded):
    """Text records of a language model.

    Args:
        records: text records, or edit records (answer = ``target_new``).
        form: how prompts are shown.
        max_length: tokens per example, EOS included.

    Attributes:
        answer_lengths: LongTensor (N,), tokens of each reference answer without EOS.

    Raises:
        DataError: an answer (with the template around its prompt) does not fit; every such record is listed.
    """

    def __init__(self, records: Sequence[TextRecord | EditRecord], form: PromptFormat, max_length: int) -> None:
        self.records = tuple(records)
        self.ids = [r.id for r in self.records]
        self.form = form
        self.max_length = max_length
        contexts = form.render([r.prompt for r in self.records])
        tokens = form.tokenise(contexts, [self.answer(i) for i in range(len(self.records))])
        problems = []
        rows: list[NDArray[np.int32]] = []
        for record, t in zip(self.records, tokens, strict=True):
            answer = [*t.ids[t.answer :], form.eos]
            if t.head + t.tail + len(answer) > max_length:
                frame = f" beside {t.head + t.tail} of the template" if t.head + t.tail else ""
                text = f"the answer takes {len(answer)} tokens{frame}, `model.max_length` is {max_length}"
                problems.append(Problem(f"record '{record.id}'", text))
                continue
            rows.append(np.asarray(t.prompt(max_length - len(answer)) + answer, dtype=np.int32))
        if problems:
            raise DataError.collect("Answers are too long for the model (a prompt is cut, an answer never):", problems)
        answers = torch.tensor([len(t.ids) - t.answer for t in tokens], dtype=torch.int64)
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self._flat = torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32))
        self._lengths = torch.from_numpy(self.lengths)
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._first = self._lengths - answers - 1
        self.answer_lengths = answers

    def answer(self, i: int) -> str:
        """The reference answer of record ``i``."""
        record = self.records[i]
        return record.target_new if isinstance(record, EditRecord) else record.answer

    def batch(self, indices: Tensor) -> Batch:
        """Right-padded ``input_ids`` and ``attention_mask`` (B, T), and labels with -100 on prompt and padding."""
        lengths, first = self._lengths[indices], self._first[indices]
        columns = torch.arange(int(lengths.max()) if len(indices) else 0)
        real = columns < lengths[:, None]
        places = torch.where(real, self._starts[indices][:, None] + columns, 0)
        pad = self.form.tokenizer.pad_token_id
        ids = torch.where(real, self._flat[places], pad).long()
        labels = torch.where(real & (columns >= first[:, None]), ids, -100)
        targets = int((lengths - first.clamp(min=1)).sum())
        return Batch({"input_ids": ids, "attention_mask": real.long()}, labels, targets, indices, self)

    def prompt_ids(self, i: int) -> list[int]:
        """The tokens that are given to the model to answer record ``i``.

        Cut so that the longest of its options, or else its answer, fits behind it.
        """
        return [int(t) for t in self._scoring[0][i]]

    def option_ids(self, i: int) -> list[list[int]]:
        """The tokens of each option of record ``i`` as they follow ``prompt_ids(i)``; no EOS, empty without options."""
        return [[int(t) for t in option] for option in self._scoring[1][i]]

    @cached_property
    def _scoring(self) -> tuple[list[NDArray[np.int32]], list[list[NDArray[np.int32]]]]:
        """Prompts and options of all records; not made for training data.

        The prompt is what its tokenisations with the answer, with every option and with some word have in common: where
        one of them takes the prompt's last space into its own first token, the others carry that space too. So all
        options share one prompt, and each has exactly the tokens that it has in training.
        """
        contexts = self.form.render([r.prompt for r in self.records])
        answers = [(ANY_WORD, self.answer(i), *(getattr(r, "options", None) or ())) for i, r in enumerate(self.records)]
        flat = self.form.tokenise(
            [c for c, choices in zip(contexts, answers, strict=True) for _ in choices],
            [choice for choices in answers for choice in choices],
        )
        prompts, options, problems = [], [], []
        place = 0
        for i, choices in enumerate(answers):
            ways = flat[place : place + len(choices)]
            place += len(choices)
            first, shared = ways[0], common_prefix([w.ids[: w.answer] for w in ways])
            answer, *following = [w.ids[len(shared) :] for w in ways[1:]]
            longest = max(len(f) for f in following or [answer]) + 1
            room = self.max_length - longest
            if first.head + first.tail > room:
                text = f"its longest option takes {longest} tokens, `model.max_length` is {self.max_length}"
                problems.append(Problem(f"record '{self.ids[i]}'", text))
                continue
            cut = Tokens(shared, len(shared), min(first.head, len(shared)), first.tail).prompt(room)
            prompts.append(np.asarray(cut, dtype=np.int32))
            options.append([np.asarray(f, dtype=np.int32) for f in following])
        if problems:
            raise DataError.collect("Options are too long for the model:", problems)
        return prompts, options
