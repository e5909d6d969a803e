"""The model card of an export: README.md with the method, the tasks, what was measured, and the limits."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from clkit.metrics.continual import DEFINITIONS

if TYPE_CHECKING:
    from clkit.config import RunConfig
    from clkit.result import RunResult

_LIMITS = (
    "Scores are of the evaluation examples of these tasks only; nothing else was measured.",
    "One run with one seed: the scatter from seed to seed is not known from it.",
    "What the base model had learned before, right or wrong, is still in it. Its licence and its limits hold here too.",
    "No test of safety, bias, privacy or robustness was run.",
)


def card(result: RunResult, config: RunConfig, snippet: str, model: str, base: str | None = None) -> str:
    """The text of README.md, with the front matter that the Hugging Face hub reads.

    Args:
        result: what was measured, also of a run that is not finished.
        config: the run's configuration.
        snippet: how to load what lies beside the card.
        model: what the trained model is called; the configuration does not know one that was made in Python.
        base: where the base model is; named in the front matter when it is a hub id.
    """
    adapter = "PeftModel" in snippet
    lines = ["---", f"library_name: {'peft' if adapter else 'transformers' if 'transformers' in snippet else 'clkit'}"]
    if base is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        lines += [f"base_model: {base}"]
    lines += ["tags:", "- clkit", "- continual-learning", f"- {config.strategy.name}", "---", ""]
    seen = [name for name, row in zip(result.tasks, result.matrix, strict=True) if (row == row).any()]
    lines += [
        f"# {result.name}",
        "",
        f"`{model}`, trained by [clkit](https://pypi.org/project/clkit/) with the strategy "
        f"`{config.strategy.name}` on {len(result.tasks)} tasks one after another (seed {config.seed}).",
        "",
        "Tasks, in the order of learning: " + ", ".join(f"`{t}`" for t in result.tasks) + ".",
    ]
    if result.holdout:
        lines += ["", "Scored, never trained on: " + ", ".join(f"`{t}`" for t in result.holdout) + "."]
    if len(seen) < len(result.tasks) and seen != result.tasks[-1:]:
        lines += ["", f"**Not finished**: {len(seen)} of {len(result.tasks)} tasks are learned and scored."]
    lines += ["", "## How to load it", "", "```python", snippet.strip(), "```", ""]
    if "AutoTokenizer" in snippet:
        plain = config.model.prompt == "plain"
        shown = (
            "as they are, without a chat template" if plain else "through the tokenizer's chat template, if it has one"
        )
        lines += [f"It learned from prompts shown {shown}: ask it in the same way.", ""]
    lines += ["## Scores", ""]
    lines += [*_matrix(result), "", *_metrics(result)]
    lines += ["", "## Limits", "", *(f"- {line}" for line in _LIMITS), ""]
    return "\n".join(lines)


def _matrix(result: RunResult) -> list[str]:
    names = [*result.tasks, *result.holdout]
    heads = [f"{_cell(n)} ({m})" for n, m in zip(names, result.task_metrics, strict=True)]
    rows = [("before training", result.initial.tolist())]
    rows += [(f"after {_cell(t)}", row) for t, row in zip(result.tasks, result.matrix.tolist(), strict=True)]
    shown = [(title, row) for title, row in rows if any(v == v for v in row)]
    return [
        "| trained so far | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(heads),
        *(f"| {title} | " + " | ".join("" if v != v else f"{v:.4f}" for v in row) + " |" for title, row in shown),
    ]


def _metrics(result: RunResult) -> list[str]:
    defined: dict[str, Any] = {k: result.metrics[k] for k in DEFINITIONS if result.metrics.get(k) is not None}
    if not defined:
        return []
    return [
        "| metric | value | better | formula |",
        "|---|---:|---|---|",
        *(f"| {k} | {v:.4f} | {result.scores.direction(k)} | `{DEFINITIONS[k].formula}` |" for k, v in defined.items()),
        "",
        "`R[k,i]`: score of task i after learning task k; T: number of tasks.",
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
