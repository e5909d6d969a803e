"""Tables of a sweep from made-up runs, against numbers worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import shutil

import pytest

from clkit.errors import CheckpointError
from clkit.sweep.summary import Row, choose, summarise
from clkit.sweep.tables import as_json, latex, markdown, runs_csv, settings_csv, write

R = {  # setting -> seed -> (R[2,1], R[1,1], R[2,2]); with two tasks the average accuracy is (R[2,1] + R[2,2]) / 2
    "naive": {0: (0.1, 0.9, 0.9), 1: (0.2, 0.9, 0.8), 2: (0.3, 0.9, 1.0)},
    "replay,size=8": {0: (0.5, 0.9, 0.7), 1: (0.6, 0.9, 0.8), 2: (0.7, 0.9, 0.9)},
    "replay,size=2": {0: (0.4, 0.9, 0.7), 1: (0.5, 0.9, 0.8), 2: (0.6, 0.9, 0.9)},
}


@pytest.fixture
def folder(tmp_path):
    runs = []
    for setting, by_seed in R.items():
        for seed, (old, first, new) in by_seed.items():
            where = tmp_path / setting / f"seed-{seed}"
            where.mkdir(parents=True)
            matrix = [[first, None], [old, new]]
            columns = {"task_metrics": ["accuracy"] * 2, "higher_is_better": [True] * 2, "initial": [None, None]}
            names = {"name": setting, "tasks": ["a", "b"], "holdout": [], "further": [], "snippet": ""}
            (where / "matrix.json").write_text(json.dumps({**names, **columns, "matrix": matrix}))
            metrics = {"average_accuracy": (old + new) / 2, "forgetting": first - old}
            (where / "metrics.json").write_text(json.dumps(metrics))
            cost = {"cpu_seconds": 10 + len(setting), "peak_memory_bytes": 2**20 * len(setting)}
            (where / "status.json").write_text(json.dumps({"state": "finished", "cost": cost}))
            common = {
                "setting": setting,
                "seed": seed,
                "strategy": setting.partition(",")[0],
                "problem": "",
                "hash": "x",
            }
            runs.append(common | {"directory": f"{setting}/seed-{seed}", "values": {}})
    manifest = {
        "name": "made up",
        "metrics": ["average_accuracy", "forgetting"],
        "best": "average_accuracy",
        "runs": runs,
    }
    (tmp_path / "sweep.json").write_text(json.dumps(manifest))
    return tmp_path


def test_means_spread_best_and_comparison(folder):
    summary = summarise(folder)
    found = summary.rows[0].estimate("average_accuracy")
    assert (found.n, found.mean) == (3, pytest.approx((0.5 + 0.5 + 0.65) / 3))
    assert [r.setting for r in summary.best] == ["replay,size=8", "naive"]
    (comparison,) = summary.comparisons
    assert (comparison.first, comparison.second) == ("replay,size=8", "naive")
    assert comparison.paired.difference.mean == pytest.approx((0.1 + 0.2 + 0.15) / 3)
    assert comparison.paired.wilcoxon_p == pytest.approx(0.25)


def test_pareto_rows(folder):
    fronts = {row.setting: row.fronts for row in summarise(folder).rows}
    assert fronts == {
        "naive": ("peak_mib", "cpu_seconds"),
        "replay,size=8": ("forgetting", "peak_mib", "cpu_seconds"),
        "replay,size=2": (),
    }


def test_the_formats_hold_the_same_numbers(folder):
    summary = summarise(folder)
    rows = list(csv.DictReader(io.StringIO(settings_csv(summary))))
    row = next(r for r in rows if r["setting"] == "naive" and r["metric"] == "forgetting")
    assert float(row["mean"]) == pytest.approx(0.7) and float(row["sd"]) == pytest.approx(0.1)
    assert len(list(csv.DictReader(io.StringIO(runs_csv(summary))))) == 9
    content = json.loads(as_json(summary))
    assert content["settings"][0]["metrics"]["forgetting"]["mean"] == pytest.approx(0.7)
    text = markdown(summary)
    assert "| naive " in text and "0.700 ± 0.100 [0.452, 0.948]" in text
    tex = latex(summary)
    assert r"average\_accuracy" in tex and r"0.700 $\pm$ 0.100" in tex and tex.count(r"\begin{tabular}") == 4
    assert tex.count("{") == tex.count("}")
    assert {p.name for p in write(summary, folder)} >= {"summary.md", "summary.tex", "summary.csv", "summary.json"}


def test_unfinished_runs_are_counted_and_left_out_of_the_choice(folder):
    (folder / "replay,size=8" / "seed-2" / "status.json").write_text('{"state": "running"}')
    summary = summarise(folder)
    assert summary.missing == ("replay,size=8 seed 2",) and "1 runs are not finished" in markdown(summary)
    assert summary.best[0].setting == "replay,size=2", "a mean over fewer seeds is another one"


def test_one_seed_is_compared_and_not_tested(folder):
    for status in folder.glob("*/seed-[12]/status.json"):
        status.write_text("{}")
    text = markdown(summarise(folder))
    assert "One seed is too few for a test." in text and "p is at least" not in text


def test_each_problem_has_its_own_direction(folder):
    manifest = json.loads((folder / "sweep.json").read_text())
    for run in list(manifest["runs"]):
        copy = folder / "perplexity" / run["directory"]
        shutil.copytree(folder / run["directory"], copy)
        saved = json.loads((copy / "matrix.json").read_text())
        saved |= {"task_metrics": ["perplexity"] * 2, "higher_is_better": [False] * 2}
        (copy / "matrix.json").write_text(json.dumps(saved))
        setting = f"metric=perplexity,{run['setting']}"
        changed = {"setting": setting, "problem": "metric=perplexity", "directory": f"perplexity/{run['directory']}"}
        manifest["runs"].append(run | changed)
    (folder / "sweep.json").write_text(json.dumps(manifest))
    chosen = [r.setting for r in summarise(folder).best]
    assert chosen == ["replay,size=8", "naive", "metric=perplexity,naive", "metric=perplexity,replay,size=2"]
    fronts = {row.setting: row.fronts for row in summarise(folder).rows}
    assert fronts["replay,size=8"] == ("forgetting", "peak_mib", "cpu_seconds")
    assert fronts["metric=perplexity,naive"] == ("forgetting", "peak_mib", "cpu_seconds")
    assert "average_accuracy" not in summarise(folder).lower_is_better


def test_without_a_finished_run_there_is_no_table(folder):
    for status in folder.rglob("status.json"):
        status.write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 9 runs"):
        summarise(folder)


def test_where_less_is_better_the_lowest_is_chosen_and_problems_stay_apart():
    rows = [
        Row(
            f"{strategy}-{problem}-{value}", strategy, problem, (0,), {"average_accuracy": (value,)},
            lower=frozenset({"average_accuracy"}),
        )
        for strategy in ("a", "b") for problem in ("x", "y") for value in (3.0, 2.0)
    ]  # fmt: skip
    assert [r.setting for r in choose(rows, "average_accuracy")] == [
        "a-x-2.0",
        "b-x-2.0",
        "a-y-2.0",
        "b-y-2.0",
    ]
    assert choose([Row("s", "a", "", (0, 1), {"forgetting": (None, 0.1)})], "forgetting") == ()
