"""Rewriting text token by token with differential privacy: another way to a protected base.

``dp_mlm`` redraws every word with a masked language model (after DP-MLM, ACL Findings 2024); ``dp_prompt`` lets a
causal language model paraphrase the text. Both draw from clipped logits by the exponential mechanism. The claim is
**per drawn token and per text**, without a delta: a text of n drawn tokens is ``n * epsilon`` locally private.
Nothing is claimed about a record or a person beyond that.
"""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clkit.errors import ConfigError
from clkit.models.routing import cache_of
from clkit.modes import evaluating
from clkit.rng import derive_seed
from clkit.unlearning.exponential import ROBERTA_RANGE, probabilities, text_epsilon

# Of the kinds of a text's characters (`_kinds`): a word, an apostrophe or a hyphen inside it included.
_WORD = re.compile("w+(?:-w+)*")
_TEMPLATE = "Document: {text}\nParaphrase of the document:"


@dataclass(frozen=True)
class Rewritten:
    """A rewritten text, how many tokens were drawn for it, and the most that can have been drawn."""

    text: str
    tokens: int
    most: int


@dataclass
class Claim:
    """What the rewriting of some texts is worth.

    Attributes:
        method: which.
        epsilon: per drawn token.
        tokens: drawn for each text; where the length was drawn too, the most that could have been.
        void: why nothing is claimed; None = it holds.
    """

    method: str
    epsilon: float
    tokens: list[int] = field(default_factory=list)
    void: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Epsilon per token and per text with the texts' lengths."""
        lengths = {"min": min(self.tokens), "median": float(np.median(self.tokens)), "max": max(self.tokens)}
        return {
            "method": self.method,
            "epsilon_per_token": None if self.void else self.epsilon,
            "texts": len(self.tokens),
            "tokens_per_text": lengths,
            "epsilon_per_text": None if self.void else {k: text_epsilon(self.epsilon, n) for k, n in lengths.items()},  # type: ignore[arg-type]
            "delta": 0,
            "compared_with": "a text of which the copied part (length, punctuation, white space) is the same"
            if self.method == "dp_mlm"
            else "any other text",
            "void": self.void,
        }

    def __str__(self) -> str:
        """One line to print."""
        if self.void:
            return f"{self.method}: no claim: {self.void}"
        found = self.to_json()
        n, e = found["tokens_per_text"], found["epsilon_per_text"]
        lengths = f"{n['min']} to {n['max']} tokens (median {n['median']:g})"
        costs = f"epsilon {e['min']:g} to {e['max']:g} per text (median {e['median']:g})"
        return f"{self.method}: epsilon {self.epsilon:g} per token; {found['texts']} texts of {lengths}, so {costs}"


class Rewriter(ABC):
    """Rewrites texts; every draw is new and independent, also for a word that was there before.

    Args:
        module: the language model.
        tokenizer: its tokenizer.
        epsilon: per drawn token.
        test_seed: makes draws repeatable and voids the claim; None = the operating system's entropy, kept nowhere.

    Raises:
        ConfigError: epsilon is not above 0.
    """

    name: str

    def __init__(self, module: nn.Module, tokenizer: Any, epsilon: float, *, test_seed: int | None = None) -> None:
        if not epsilon > 0:
            raise ConfigError(f"epsilon must be above 0, got {epsilon}")
        self.module, self.tokenizer, self.epsilon = module, tokenizer, epsilon
        entropy = None if test_seed is None else derive_seed(test_seed, "rewrite")
        self._numbers = np.random.Generator(np.random.PCG64DXSM(entropy))
        self.claim = Claim(self.name, epsilon, void=None if test_seed is None else "a fixed seed made it repeatable")
        # What is never drawn is left out by the tokenizer alone, whatever the text says.
        self._barred = sorted(set(tokenizer.all_special_ids))

    @abstractmethod
    def rewrite(self, text: str) -> Rewritten:
        """One text."""

    def rewrite_all(self, texts: Iterable[str]) -> list[str]:
        """Many texts; :attr:`claim` then covers them too."""
        found = []
        with evaluating(self.module), torch.no_grad():
            for text in texts:
                new = self.rewrite(text)
                self.claim.tokens.append(new.most)
                found.append(new.text)
        return found

    def _draw(self, logits: Tensor, low: float, high: float, keep: Sequence[int] = ()) -> list[int]:
        """One token for each row of logits (N, V)."""
        chances = probabilities(logits.detach().double().cpu().numpy(), self.epsilon, low, high)
        barred = [i for i in self._barred if i not in keep]
        chances[:, barred] = 0.0
        chances[:, len(self.tokenizer) :] = 0.0
        chances /= chances.sum(axis=1, keepdims=True)
        return [_pick(row, self._numbers.random()) for row in chances]


def _kinds(text: str) -> str:
    """A letter for each character: ``w`` is redrawn, ``-`` where it stands within a word, and the rest is copied.

    Redrawn is all but white space and punctuation: also symbols, vowel signs, and accents that are characters.
    """

    def kind(character: str) -> str:
        if character in "'’-":
            return "-"
        category = unicodedata.category(character)
        return " " if (category[0] in "PZ" and category != "Pc") or category == "Cc" else "w"

    return "".join(map(kind, text))


def _pick(chances: NDArray[np.float64], point: float) -> int:
    total = np.cumsum(chances)
    return int(min(np.searchsorted(total, point * total[-1], side="right"), np.flatnonzero(chances)[-1]))


class DpMlm(Rewriter):
    """Redraws every word of a text, numbers included, given the whole text with that word masked.

    Args:
        module: a masked language model.
        tokenizer: its tokenizer, with a mask token.
        epsilon: per word.
        low: logits are clipped to [low, high]; the range must not be taken from the texts.
        high: see ``low``.
        batch: words per forward pass.
        test_seed: see :class:`Rewriter`.

    Raises:
        ConfigError: the tokenizer has no mask token.
    """

    name = "dp_mlm"

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        epsilon: float,
        *,
        low: float = ROBERTA_RANGE[0],
        high: float = ROBERTA_RANGE[1],
        batch: int = 32,
        test_seed: int | None = None,
    ) -> None:
        super().__init__(module, tokenizer, epsilon, test_seed=test_seed)
        if tokenizer.mask_token_id is None:
            raise ConfigError("dp_mlm needs a masked language model: its tokenizer has no mask token")
        self._low, self._high, self._batch = low, high, batch

    def rewrite(self, text: str) -> Rewritten:
        """Every word redrawn; what is between words is copied."""
        words = list(_WORD.finditer(_kinds(text)))
        new: list[str] = []
        for start in range(0, len(words), self._batch):
            drawn = self._draw(self._logits(text, words[start : start + self._batch]), self._low, self._high)
            new += [self.tokenizer.decode([token]).strip() for token in drawn]
        pieces, end = [], 0
        for word, replacement in zip(words, new, strict=True):
            pieces += [text[end : word.start()], replacement]
            end = word.end()
        return Rewritten("".join([*pieces, text[end:]]), len(words), len(words))

    def _logits(self, text: str, words: Sequence[re.Match[str]]) -> Tensor:
        """(N, V) at the mask that stands for each word, the text itself being shown before."""
        mask = self.tokenizer.mask_token
        masked = [text[: w.start()] + mask + text[w.end() :] for w in words]
        room: int = self.tokenizer.model_max_length
        inputs = self.tokenizer([text] * len(masked), masked, padding=True, return_tensors="pt")
        if (width := inputs["input_ids"].shape[1]) > room:
            raise ConfigError(f"dp_mlm: a text and its copy take {width} tokens, at most {room} fit")
        inputs = inputs.to(next(self.module.parameters()).device)
        # The copy comes last, and so does its mask, should the text contain one.
        at = (inputs["input_ids"] == self.tokenizer.mask_token_id).int()
        places = at.shape[1] - 1 - at.flip(1).argmax(dim=1)
        scores: Tensor = self.module(**inputs).logits
        return scores[torch.arange(len(masked)), places]


class DpPrompt(Rewriter):
    """Lets a causal language model paraphrase a text, drawing every token, the end included.

    Logits are clipped to the range that the model gives after the instruction alone, with no text in it.

    Args:
        module: a causal language model.
        tokenizer: its tokenizer.
        epsilon: per token; what is drawn until the end counts, and ``max_new_tokens`` is the most.
        max_new_tokens: longest paraphrase.
        test_seed: see :class:`Rewriter`.
    """

    name = "dp_prompt"

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        epsilon: float,
        *,
        max_new_tokens: int = 64,
        test_seed: int | None = None,
    ) -> None:
        super().__init__(module, tokenizer, epsilon, test_seed=test_seed)
        self._most = max_new_tokens
        with evaluating(module), torch.no_grad():
            scores, _ = self._next(self._prompt(""), {})
        self.low, self.high = float(scores.min()), float(scores.max())

    def rewrite(self, text: str) -> Rewritten:
        """A paraphrase; its length is drawn, so the claim is for the longest there could have been."""
        end = self.tokenizer.eos_token_id
        drawn: list[int] = []
        known: dict[str, Any] = {}
        ids = self._prompt(text)
        while len(drawn) < self._most and end not in drawn:
            scores, known = self._next(ids[:, -1:] if known else ids, known)
            drawn += self._draw(scores, self.low, self.high, keep=(end,))
            ids = torch.cat([ids, ids.new_tensor([drawn[-1:]])], dim=1)
        words = self.tokenizer.decode([t for t in drawn if t != end], skip_special_tokens=True).strip()
        return Rewritten(words, len(drawn), self._most)

    def _prompt(self, text: str) -> Tensor:
        ids = self.tokenizer(_TEMPLATE.format(text=text), return_tensors="pt")["input_ids"]
        found: Tensor = ids.to(next(self.module.parameters()).device)
        return found

    def _next(self, ids: Tensor, known: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """(1, V) logits of the next token, and the keys and values of all so far under the model's name for them.

        ``known`` are those of what was before ``ids``, empty where that was nothing or the model keeps none.
        """
        found = self.module(input_ids=ids, use_cache=True, **known)
        name, cache = cache_of(found)
        return found.logits[:, -1], {} if cache is None else {name: cache}
