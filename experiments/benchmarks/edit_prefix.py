"""What an edit with memit or grace costs, against running all tokens of all rows in every step.

    OMP_NUM_THREADS=1 python experiments/benchmarks/edit_prefix.py --rounds 3

SmolLM2-135M-Instruct, float32, chat template, an edit with its subject, the defaults of each method but for the
number of steps. Both variants keep what is below the edited layer; what this shows is what keys and values of the
tokens before the first changed one save on top. What is learned is the same (tests/strategies/test_edit_baselines.py).
Rounds of both in alternating order in one process, CPU times, ratio of medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from unittest import mock

import torch

from clkit.editing import Editor
from clkit.editing.prefix import Prefix, Reader
from clkit.editing.rows import Rows
from clkit.tasks.base import EditRecord

RECORD = EditRecord("Which family does Epaspidoceras belong to?", "Noctuidae", "0", subject="Epaspidoceras")
SHORT = Reader.prefix


def whole(reader: Reader, rows: Rows, since: torch.Tensor | None = None) -> Prefix:
    """As if the edit might change every token."""
    return SHORT(reader, rows)


def seconds(editor: Editor, every_token: bool) -> float:
    """CPU time of learning one edit; it is taken out again."""
    with mock.patch.object(Reader, "prefix", whole if every_token else SHORT):
        since = time.process_time()
        editor.strategy.learn(RECORD)
        found = time.process_time() - since
    editor.strategy.forget([RECORD.id], {})
    return found


def main() -> None:
    """Time both variants of both methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="default 3, after one that warms up")
    parser.add_argument("--steps", type=int, default=10, help="per edit, default 10")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}")
    for name in ("memit", "grace"):
        options = {"name": name, "steps": arguments.steps, "stop_loss": 0.0}
        editor = Editor.load("smollm2-135m", options, device="cpu", max_length=256)
        times: dict[bool, list[float]] = {True: [], False: []}
        for round_ in range(arguments.rounds + 1):
            for every_token in (True, False) if round_ % 2 else (False, True):
                found = seconds(editor, every_token)
                if round_:
                    times[every_token].append(found)
        ratio = statistics.median(a / b for a, b in zip(times[True], times[False], strict=True))
        long, short = (statistics.median(times[k]) for k in (True, False))
        print(f"  {name}: {long:.2f} s with all tokens, {short:.2f} s as it is: {ratio:.1f} times less", flush=True)


if __name__ == "__main__":
    main()
