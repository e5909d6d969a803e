"""Make T edits one after another with each method of settings.yaml, and compare what the models answer in the end.

    python experiments/editing/run.py --out runs/editing
    python experiments/editing/run.py --out runs/editing --methods wise ft_layer --sizes 10 --seeds 0 1 2
    python experiments/editing/run.py --out runs/editing --data hallucination --sizes 10 100
    python experiments/editing/run.py --out runs/editing --summary

A run is a directory OUT/DATA/METHOD/T-SEED: its groups of T edits, each an ordinary directory of edits with a journal,
settings.json and result.json. Finished runs are skipped, killed ones go on after their last edit; both are refused
where they were made with other options or defaults than those asked for. The seed draws the edits and is the method's
own (masks). Writes into OUT/DATA: summary.csv (a row per run, moment, aspect and reading), summary.md (the tables of
docs/results/editing.md) and failures.md (what the router got wrong, prompt by prompt).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from data import SETS, Edits, draw

from clkit.errors import ClkitError, ConfigError, Problem, did_you_mean
from clkit.metrics.editing import ASPECTS, estimate, perplexity
from clkit.registry import STRATEGIES

HERE = Path(__file__).parent
COLUMNS = ("data", "method", "T", "seed", "after", "aspect", "reading", "mean", "low", "high", "n")
# The published tables read teacher-forced tokens; what the model writes by itself is the harder reading.
SHOWN = {"tokens": "teacher-forced tokens", "generated-normalised": "generated answers"}


@dataclass(frozen=True)
class Run:
    """One method, T edits, one seed."""

    data: str
    method: str
    size: int
    seed: int
    groups: int
    section: Mapping[str, Any]
    directory: Path

    @property
    def result(self) -> Path:
        """What is there when it is finished."""
        return self.directory / "result.json"

    @property
    def made_with(self) -> Path:
        """Its settings, written before its first edit."""
        return self.directory / "settings.json"

    def settings(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """What decides its numbers beside data, T and seed: every option, those that have their defaults too."""
        from clkit.editing.store import make_strategy

        _, plugin = make_strategy(self.section)
        parts = {"model": content["model"], "evaluation": content["evaluation"]}
        parts["options"] = dataclasses.asdict(plugin.config)
        flat = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
        found: dict[str, Any] = json.loads(json.dumps(flat | {"ask_every": content.get("ask_every", 1)}))
        return found


def plan(arguments: argparse.Namespace, content: Mapping[str, Any]) -> list[Run]:
    """All runs that are asked for and possible, the quick ones first.

    Raises:
        ConfigError: a method or a size is not in settings.yaml.
    """
    methods, sizes = content["methods"], {int(t): n for t, n in content["sizes"].items()}
    for name in arguments.methods or ():
        if name not in methods:
            near = did_you_mean(name, methods)
            raise ConfigError(f"--methods: unknown method '{name}'.{near} Known: {', '.join(methods)}")
    for size in arguments.sizes:
        if size not in sizes:
            raise ConfigError(f"--sizes: {size} is not in settings.yaml. Known: {', '.join(map(str, sizes))}")
    runs = []
    for size, seed, name in itertools.product(arguments.sizes, arguments.seeds, arguments.methods or methods):
        section, folder = methods[name], arguments.out / arguments.data / name / f"{size}-{seed}"
        if section["name"] in STRATEGIES.names():
            runs.append(Run(arguments.data, name, size, seed, sizes[size], section, folder))
    missing = sorted({s["name"] for s in methods.values()} - set(STRATEGIES.names()))
    if missing and not arguments.summary:
        print(f"left out, because this clkit has no such strategy: {', '.join(missing)}")
    return runs


def check(runs: Sequence[Run], content: Mapping[str, Any]) -> None:
    """Refuse runs that are there, whole or in part, and not those asked for; older ones did not keep their settings.

    Raises:
        ConfigError: with every such run, and in what it differs.
    """
    problems = []
    for run in runs:
        if run.made_with.exists():
            then, now = json.loads(run.made_with.read_text(encoding="utf-8")), run.settings(content)
            if names := sorted(key for key in {*then, *now} if then.get(key) != now.get(key)):
                problems.append(Problem(str(run.directory), f"was made with other values of {', '.join(names)}"))
    if problems:
        raise ConfigError.collect(
            "Runs that are there are not those asked for; delete them or give another --out:", problems
        )


def execute(run: Run, content: Mapping[str, Any]) -> str:
    """Make the edits of a run, measure, write result.json. Returns a line to print."""
    edits, start = draw(run.data, run.size * run.groups, run.seed), time.monotonic()
    if not run.directory.exists():
        run.directory.mkdir(parents=True)
        run.made_with.write_text(json.dumps(run.settings(content), indent=1), encoding="utf-8")
    found = [_group(run, k, edits, content) for k in range(run.groups)]
    measured: dict[str, Any] = {}
    for group in found:
        for moment, values in group["measured"].items():
            _extend(measured.setdefault(moment, {}), values)
    last = found[-1]
    result = {
        "data": run.data, "method": run.method, "T": run.size, "seed": run.seed, "groups": run.groups,
        "options": dict(run.section),
        "measured": measured,
        "failures": [f for group in found for f in group["failures"]],
        "seconds_per_edit": statistics.fmean(s for group in found for s in group["seconds"]),
        "bytes": last["bytes"],
    }  # fmt: skip
    run.result.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    return f"{run.data} {run.method} T={run.size} seed {run.seed}: finished after {time.monotonic() - start:.0f} s"


def _extend(whole: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add the cases of one group to those of the others."""
    for key, value in part.items():
        if isinstance(value, Mapping):
            _extend(whole.setdefault(key, {}), value)
        elif isinstance(value, list):
            whole.setdefault(key, []).extend(value)
        else:
            whole[key] = whole.get(key, 0) + value


def _group(run: Run, number: int, edits: Edits, content: Mapping[str, Any]) -> dict[str, Any]:
    """T edits on a model of their own, measured on the way and at the end; what is finished is read, not made again."""
    home = run.directory / f"group-{number}"
    done = home / "measured.json"
    if done.exists():
        found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return found
    from clkit.config import EvalConfig
    from clkit.editing import Editor, Measure

    model = dict(content["model"])
    editor = Editor.load(model.pop("name"), run.section, directory=home, seed=run.seed, **model)
    records = edits.records[number * run.size : (number + 1) * run.size]
    options = EvalConfig(**content["evaluation"])
    every = [r.id for r in records[:: content.get("ask_every", 1)]]  # the edits that are asked about
    asked, near = (
        Measure(editor, [p for p in probes if p.edit in every], readings=edits.readings, routes=True, options=options)
        for probes in (edits.probes, edits.near)
    )
    measured, rows = {}, []
    for moment in sorted({t for t in content["measured_at"] if t < run.size} | {run.size}):
        path = home / f"after-{moment}.json"
        if not path.exists():
            editor.edit(records[:moment], progress=lambda e: print(f"  {e['number']}: {e['seconds']} s", flush=True))
            ids = [i for i in every if i in {r.id for r in records[:moment]}]
            scores = {"all": asked.scores(ids), "near": near.scores(ids)}
            path.write_text(json.dumps({k: _plain(s) for k, s in scores.items()}, ensure_ascii=False), encoding="utf-8")
        state = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for part in state.values() for row in part.pop("rows")]
        measured[str(moment)] = state
    found = {
        "measured": measured,
        "failures": list(_failures(rows)),
        "seconds": [e["seconds"] for e in editor.journal.entries if e["kind"] == "edit"],
        "bytes": _bytes(editor.strategy.memory_state()),
    }
    done.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    return found


def _plain(scores: Any) -> dict[str, Any]:
    """What is kept of one measurement."""
    reliability = [r for r in scores.rows if r.probe.aspect == "reliability"]
    return {
        "cases": scores.cases,
        "routes": scores.routes(),
        "nll": [r.nll for r in reliability],
        "tokens": [r.tokens for r in reliability],
        "rows": [
            {
                "edit": r.probe.edit, "aspect": r.probe.aspect, "prompt": r.probe.prompt, "answer": r.probe.answer,
                "said": r.said, "memory": r.memory, "scores": r.scores,
            }
            for r in scores.rows
        ],
    }  # fmt: skip


def _failures(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Edits that no memory answered, and unrelated prompts that one did."""
    for row in rows:
        missed = row["aspect"] in ("reliability", "generalisation") and row["memory"] is None
        if missed or (row["aspect"] == "locality" and row["memory"] is not None):
            yield {k: row[k] for k in ("edit", "aspect", "prompt", "said", "memory")}


def _bytes(state: Any) -> int:
    """Of all tensors in a nested state."""
    if isinstance(state, Mapping):
        return sum(_bytes(v) for v in state.values())
    if isinstance(state, list | tuple):
        return sum(_bytes(v) for v in state)
    return state.numel() * state.element_size() if hasattr(state, "element_size") else 0


# --- tables -----------------------------------------------------------------------------------------------------------
def collect(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The results of finished runs."""
    return [json.loads(run.result.read_text(encoding="utf-8")) for run in runs if run.result.exists()]


def long_rows(results: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row per run, moment, aspect and reading."""
    for r in results:
        for moment, parts in r["measured"].items():
            for part, values in parts.items():
                for aspect, readings in values["cases"].items():
                    for reading, cases in readings.items():
                        e = estimate(cases)
                        name = aspect if part == "all" else f"{part} {aspect}"
                        key = (r["data"], r["method"], r["T"], r["seed"], moment, name, reading)
                        yield dict(zip(COLUMNS, (*key, e.mean, e.low, e.high, e.n), strict=True))


def tables(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: the papers' layout in two readings, then all aspects of the final models, then what it cost."""
    parts = []
    for reading, name in SHOWN.items():
        sizes = sorted({r["T"] for r in results})
        head = ["method", *(f"T={t}: Rel / Gen / Loc / mean" for t in sizes)]
        lines = []
        for method in dict.fromkeys(r["method"] for r in results):
            cells = [_triple([r for r in results if r["method"] == method and r["T"] == t], reading) for t in sizes]
            lines.append([method, *cells])
        parts.append(f"### Final model, {name}\n\n{_markdown(head, lines)}")
    parts.append(f"### Further scores of the final models\n\n{_further(results)}")
    parts.append(f"### Along T\n\n{_along(results)}")
    parts.append(f"### Cost and routes\n\n{_cost(results)}")
    return "\n\n".join(parts)


def _cases(results: Sequence[Mapping[str, Any]], aspect: str, reading: str, part: str = "all") -> list[float]:
    """Of all seeds together, on the final model."""
    return [
        v for r in results for v in r["measured"][str(r["T"])][part]["cases"].get(aspect, {}).get(reading, [])
    ]  # fmt: skip


def _triple(results: Sequence[Mapping[str, Any]], reading: str) -> str:
    cases = [_cases(results, aspect, reading) for aspect in ASPECTS[:3]]
    known = [statistics.fmean(c) for c in cases if c]
    if not known:
        return ""
    shown = " / ".join(f"{statistics.fmean(c):.2f}" if c else "–" for c in cases)
    return f"{shown} / {statistics.fmean(known):.2f} (n={len(cases[0])})"


def _interval(cases: Sequence[float]) -> str:
    if not cases:
        return ""
    e = estimate(cases)
    return f"{e.mean:.3f}" + (f" [{e.low:.2f}, {e.high:.2f}]" if e.low is not None else "")


def _groups(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int, list[Mapping[str, Any]]]]:
    """Results of one method and T, all seeds."""
    for key in dict.fromkeys((r["T"], r["method"]) for r in results):
        yield key[1], key[0], [r for r in results if (r["T"], r["method"]) == key]


def _further(results: Sequence[Mapping[str, Any]]) -> str:
    kinds = [
        ("Rel, options", "all", "reliability", "options"),
        ("Rel, generated", "all", "reliability", "generated-normalised"),
        ("Gen, generated", "all", "generalisation", "generated-normalised"),
        ("Loc, tokens", "all", "locality", "tokens"),
        ("Loc, generated", "all", "locality", "generated"),
        ("same subject Loc, tokens", "near", "locality", "tokens"),
        ("portability, tokens", "all", "portability", "tokens"),
    ]
    head = ["method", "T", "seeds", *(k[0] for k in kinds), "perplexity of targets"]
    lines = []
    for method, size, mine in _groups(results):
        final = [r["measured"][str(size)]["all"] for r in mine]
        nll, tokens = ([v for f in final for v in f[key]] for key in ("nll", "tokens"))
        ppl = f"{perplexity(nll, tokens):.2f}" if sum(tokens) else ""
        cells = [_interval(_cases(mine, aspect, reading, part)) for _, part, aspect, reading in kinds]
        lines.append([method, str(size), str(len(mine)), *cells, ppl])
    return _markdown(head, lines)


def _along(results: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for method, size, mine in _groups(results):
        for moment in sorted({int(m) for r in mine for m in r["measured"]}):
            values = [r["measured"][str(moment)]["all"]["cases"] for r in mine if str(moment) in r["measured"]]
            cells = [
                _interval([v for c in values for v in c.get(aspect, {}).get("tokens", [])]) for aspect in ASPECTS[:3]
            ]
            lines.append([method, str(size), str(moment), *cells])
    return _markdown(["method", "T", "after", "Rel", "Gen", "Loc"], lines)


def _cost(results: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for method, size, mine in _groups(results):
        routes: dict[str, Counter[str]] = {}
        for r in mine:
            for aspect, counts in r["measured"][str(size)]["all"]["routes"].items():
                answered = Counter({"memory": sum(n for m, n in counts.items() if m != "none")})
                routes.setdefault(aspect, Counter()).update(answered + Counter({"none": counts.get("none", 0)}))
        shown = [f"{routes[a]['memory']}/{routes[a].total()}" if a in routes else "" for a in ASPECTS]
        seconds = statistics.fmean(r["seconds_per_edit"] for r in mine)
        lines.append([method, str(size), f"{seconds:.1f}", f"{max(r['bytes'] for r in mine):,}", *shown])
    head = ["method", "T", "s per edit", "bytes kept", *(f"{a}: answered by an edit" for a in ASPECTS)]
    return _markdown(head, lines)


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def write(out: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write and print what is finished."""
    if not results:
        print(f"no finished run in {out}")
        return
    with (out / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(long_rows(results))
    text = tables(results)
    (out / "summary.md").write_text(text + "\n", encoding="utf-8")
    keys = ("edit", "aspect", "prompt", "memory", "said")
    head = ["method", "T", "seed", *keys]
    wrong = [
        [r["method"], str(r["T"]), str(r["seed"]), *(f[key] or "none" for key in keys)]
        for r in results
        for f in r["failures"]
    ]  # fmt: skip
    clean = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in wrong]
    (out / "failures.md").write_text(_markdown(head, clean) + "\n", encoding="utf-8")
    print(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, run what is not finished, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/editing"), help="default runs/editing")
    parser.add_argument("--data", choices=sorted(SETS), default="zsre", help="default zsre")
    parser.add_argument("--methods", nargs="+", help="names in settings.yaml; default all")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 10, 100], metavar="T", help="default 1 10 100")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--settings", type=Path, default=HERE / "settings.yaml", help="default: the one beside run.py")
    parser.add_argument("--summary", action="store_true", help="run nothing, compare what is finished")
    arguments = parser.parse_args(argv)
    try:
        content = yaml.safe_load(arguments.settings.read_text(encoding="utf-8"))
        runs = plan(arguments, content)
        if not arguments.summary:
            check(runs, content)
            for run in runs:
                if not run.result.exists():
                    print(execute(run, content), flush=True)
        write(arguments.out / arguments.data, collect(runs))
    except ClkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
