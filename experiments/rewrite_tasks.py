"""Rewrite the training texts of a configuration's tasks with differential privacy: data for a protected base.

    python experiments/rewrite_tasks.py my.yaml rewritten --epsilon 100
    python experiments/rewrite_tasks.py my.yaml rewritten --method dp_mlm --model FacebookAI/roberta-base --epsilon 25

Writes a folder per task below OUT, with the claim and the files' hashes beside them, and prints the claim: epsilon per
token and per record, with the lengths. ``dp_prompt`` (the default) takes the configuration's own causal model.
``dp_mlm`` takes a masked language model, by a directory or the name of one that is in transformers' cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clkit import build, resolve
from clkit.config import RunConfig
from clkit.errors import ClkitError, ConfigError
from clkit.models.lora import base_model
from clkit.strategies.dp2unlearning.rewrite import DpMlm, DpPrompt, Rewriter
from clkit.strategies.dp2unlearning.rewritten import write_tasks
from clkit.tasks.base import TaskSequence


def make_rewriter(arguments: argparse.Namespace, config: RunConfig, tasks: TaskSequence) -> Rewriter:
    """By ``--method``.

    Raises:
        ConfigError: there is no such masked model.
    """
    if arguments.method == "dp_prompt":
        model: Any = build.make_model(config.model, tasks, config.seed, print)
        most = arguments.max_new_tokens
        return DpPrompt(base_model(model.module), model.tokenizer, arguments.epsilon, max_new_tokens=most)
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    if not arguments.model:
        raise ConfigError("--method dp_mlm needs --model: a masked language model")
    try:
        module = AutoModelForMaskedLM.from_pretrained(arguments.model, use_safetensors=True, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model: {arguments.model} holds no masked language model: {error}") from error
    return DpMlm(module, tokenizer, arguments.epsilon)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite and say what it is worth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument("--method", choices=("dp_prompt", "dp_mlm"), default="dp_prompt")
    parser.add_argument("--epsilon", type=float, required=True, help="per drawn token")
    parser.add_argument("--model", help="the masked language model of dp_mlm")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest text of dp_prompt (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.out.exists() and any(arguments.out.iterdir()):
            raise ConfigError(f"{arguments.out} is not empty; give a new folder")
        config = resolve.load(arguments.config)
        tasks = build.make_tasks(config)
        print(write_tasks(tasks, arguments.out, make_rewriter(arguments, config, tasks)))
    except ClkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    folders = ",".join(str(arguments.out / task.name) for task in tasks)
    print(
        f"Train the protected base on it:\n  clkit run {arguments.config} 'tasks.tasks=[{folders}]' output_dir=runs/m0"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
