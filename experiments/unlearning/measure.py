"""What the model of a run knows of forgotten and retained authors: TOFU's figures, attacks, relearning.

    python experiments/unlearning/measure.py RUN --forget 2 --output RUN/tofu.json

run.py calls it for every run. Truth ratios of the forget set are written out, so that forget quality can be computed
against any other run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tofu
import torch

from clkit import api
from clkit.metrics import unlearning as metrics
from clkit.models.causal_lm import CausalLM
from clkit.modes import evaluating
from clkit.rng import fresh_generator
from clkit.strategies.unlearning.losses import sequence_log_probs
from clkit.tasks.base import Task, TextExamples, TextRecord
from clkit.trainer import SequentialTrainer
from clkit.unlearning import attacks, robustness

HERE = Path(__file__).parent
TOKENS = 60  # of a generated answer; TOFU's answers have about 50


def examples(pairs: Sequence[tuple[str, str]]) -> TextExamples:
    """Prompts and answers as records."""
    return TextExamples(tuple(TextRecord(p, a, f"{i}") for i, (p, a) in enumerate(pairs)))


def losses(model: CausalLM, pairs: Sequence[tuple[str, str]], batch_size: int) -> np.ndarray:
    """(N,) mean token loss of each answer, its end token included; rows of like length go together."""
    encoded, found = model.encode(examples(pairs)), np.empty(len(pairs))
    order = torch.tensor(sorted(range(len(pairs)), key=lambda i: len("".join(pairs[i]))))
    with evaluating(model.module), torch.inference_mode():
        for rows in torch.split(order, batch_size):
            batch = encoded.batch(rows).to(model.device)
            sums, counts = sequence_log_probs(model.logits(batch), model.targets(batch))
            found[rows.numpy()] = (-sums / counts).cpu().double().numpy()
    return found


def scores(
    model: CausalLM, asked: Sequence[tofu.Question], kind: str, answered: int, batch_size: int
) -> dict[str, Any]:
    """Probability, truth ratio and ROUGE-L recall of one set; ``kind`` is its name."""
    own = losses(model, [(q.prompt, q.answer) for q in asked], batch_size)
    same = all(q.right == q.answer for q in asked)
    right = own if same else losses(model, [(q.prompt, q.right) for q in asked], batch_size)
    flat = losses(model, [(q.prompt, w) for q in asked for w in q.wrong], batch_size)
    wrong = flat.reshape(len(asked), -1)
    ratios = metrics.truth_ratio(right, wrong)
    options = kind in ("authors", "facts")
    found = {
        "probability": metrics.choice_probability(own, wrong) if options else metrics.probability(own),
        "truth_ratio": (metrics.truth_ratio_forget if kind == "forget" else metrics.truth_ratio_retain)(ratios),
        "ratios": ratios.tolist(),
        "n": [len(asked), answered and len(asked[:: max(1, -(-len(asked) // answered))])],
    }
    return found | ({"rouge": rouge(model, asked, answered)} if answered else {})


def rouge(model: CausalLM, asked: Sequence[tofu.Question], answered: int) -> float | None:
    """ROUGE-L recall of the answers that the model writes to so many of the questions, evenly spread."""
    some = asked[:: max(1, -(-len(asked) // answered))]
    encoded = model.encode(examples([(q.prompt, q.answer) for q in some]))
    said = [text for rows in torch.split(torch.arange(len(some)), 16) for text in model.generate(encoded, rows, TOKENS)]
    return metrics.rouge_l_recall(said, [q.answer for q in some])


def relearn(trainer: SequentialTrainer, gone: Task, steps: int, rate: float) -> dict[str, Any]:
    """Train briefly on half of the forgotten rows; how probable the other half is before and after."""
    model: Any = trainer.model
    records = gone.train.records  # type: ignore[attr-defined]
    order = torch.randperm(len(records), generator=fresh_generator(0, "relearn")).tolist()
    halves = [[(records[i].prompt, records[i].answer) for i in part] for part in (order[::2], order[1::2])]
    found = {"before": metrics.probability(losses(model, halves[1], 16))}
    encoded = model.encode(examples(halves[0]))
    robustness.relearn(model, trainer.strategy.parameters(), encoded, steps=steps, rate=rate)
    found["after"] = metrics.probability(losses(model, halves[1], 16))
    return {**found, "steps": steps, "rate": rate, "n": [len(half) for half in halves]}


def rounded(trainer: SequentialTrainer, gone: Task) -> dict[str, float | None]:
    """How probable the forgotten rows are once the weights have 8 or 4 bits."""
    model: Any = trainer.model
    pairs = [(r.prompt, r.answer) for r in gone.train.records]  # type: ignore[attr-defined]
    found = {}
    for bits in (8, 4):
        with robustness.quantised(model.module, bits):
            found[f"{bits}"] = metrics.probability(losses(model, pairs, 16))
    return found


def measure(run_dir: Path, settings: dict[str, Any], count: int, certificate: Path | None) -> dict[str, Any]:
    """All figures of one run; those of its certificate, where it has one, are taken from there."""
    options = settings["measure"]
    asked = tofu.questions(settings, count, options["rows"])
    rows = tofu.forgotten_rows(settings, count)
    gone = examples([(tofu.prompt(r["question"]), r["answer"]) for r in rows])
    gone = TextExamples(tuple(dataclasses.replace(r, id=f"gone {r.id}") for r in gone.records))
    found: dict[str, Any] = {"forget": count}
    with api.open_run(run_dir) as trainer, trainer.serving():
        model: Any = trainer.model
        size = trainer.config.eval.batch_size
        found["sets"] = {
            kind: scores(model, questions, kind, options["answered"], size) for kind, questions in asked.items()
        }
        task = dataclasses.replace(trainer.tasks[0], train=gone)
        found["rounded"] = rounded(trainer, task)
        found["relearning"] = relearn(trainer, task, options["relearn_steps"], float(options["relearn_rate"]))
    parts = [found["sets"][kind] for kind in ("retain", "authors", "facts")]
    found["model_utility"] = metrics.model_utility(
        [p[k] for p in parts for k in ("probability", "rouge", "truth_ratio") if k in p]
    )
    if certificate is None:
        measured = attacks.measure(run_dir, [task])
        found["membership"], found["extraction"] = attacks.membership(measured), attacks.extraction(measured)
    else:
        verified = json.loads(certificate.read_text(encoding="utf-8"))["verification"]
        found |= {f["name"]: f["figures"] for f in verified if f["name"] in ("membership", "extraction")}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", metavar="RUN", type=Path)
    parser.add_argument("--forget", type=int, required=True, help="authors that are forgotten")
    parser.add_argument("--certificate", type=Path, help="of the run, if it has one")
    parser.add_argument("--settings", type=Path, default=HERE / "settings.yaml", help="default: beside this file")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    settings = tofu.read_settings(arguments.settings)
    found = measure(arguments.run_dir, settings, arguments.forget, arguments.certificate)
    temporary = arguments.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(found), encoding="utf-8")
    temporary.replace(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
