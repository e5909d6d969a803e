"""Search through Optuna: what it proposes, what it stops, how it goes on."""

from __future__ import annotations

import json

import pytest

from clkit.cli import main
from clkit.sweep.search import running_average

optuna = pytest.importorskip("optuna")


def line(kind, **fields):
    return json.dumps({"event": kind, **fields})


def score(task, stage, value, after="after x", **rest):
    return line("score", task=task, stage=stage, value=value, after=after, **rest)


def test_the_running_average_is_over_the_tasks_seen_and_of_whole_stages_only():
    lines = [
        score("a", 0, 0.0, after="before training"),
        line("task", name="a"),
        score("a", 0, 0.9),
        score("a", 0, 0.1),  # a further metric of the same task
        score("b", 0, 0.2),  # the next task, for forward transfer
        score("a", 0, 0.3, weights="fast"),
        line("task", name="b"),
        score("a", 1, 0.3, after="step 5 of b"),
        score("a", 1, 0.5),
        '{"event": "sco',
    ]
    assert running_average(lines) == [(0, 0.9)]
    assert running_average([*lines, score("b", 1, 0.7)]) == [(0, 0.9), (1, pytest.approx(0.6))]


@pytest.mark.slow
def test_a_search_tries_settings_and_goes_on_with_more(write, sweep_content, tmp_path, capsys):
    sweep_content["sweep"] |= {
        "axes": {
            "strategy": ["naive", "replay"],
            "strategy.replay.size": {"from": 2, "to": 20, "step": 1, "when": {"strategy": "replay"}},
            "train.learning_rate": {"from": 0.001, "to": 0.5, "count": 3, "scale": "log"},
        },
        "launcher": {"name": "local", "jobs": 1},
        "search": {"trials": 3},
        "seeds": 1,
    }
    file = write(sweep_content)
    assert main(["sweep", file, "--dry-run"]) == 0
    assert "a search of 3 trials" in capsys.readouterr().out
    assert main(["sweep", file]) == 0
    first = capsys.readouterr()
    assert "3 trials, 0 done, 3 to do" in first.err and "### All settings" in first.out
    runs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    for run in runs:
        assert 0.001 <= run["values"]["train.learning_rate"] <= 0.5
        assert ("strategy.replay.size" in run["values"]) == (run["values"]["strategy"] == "replay")
    before = {p: p.stat().st_mtime for p in (tmp_path / "sweep").rglob("metrics.json")}
    assert main(["sweep", file, "sweep.search.trials=4"]) == 0
    assert "4 trials, 3 done, 1 to do" in capsys.readouterr().err
    assert all(p.stat().st_mtime == time for p, time in before.items())
    more = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    assert more[: len(runs)] == runs


@pytest.mark.slow
def test_a_setting_below_the_median_is_stopped_and_counted_as_pruned(
    write, sweep_content, tmp_path, capsys, monkeypatch
):
    from clkit.sweep import search

    sweep_content["tasks"] |= {"train_limit": 60}
    sweep_content["train"] |= {"epochs": 8}
    sweep_content["checkpoint"] = {"every_steps": 5}
    # The first setting learns; the second, which the sampler is told to try next, does not.
    sweep_content["sweep"] |= {
        "axes": {"train.learning_rate": [0.1, 1e-9]},
        "launcher": {"name": "local", "jobs": 1},
        "search": {"trials": 1, "warmup_trials": 1},
        "seeds": 1,
    }
    file = write(sweep_content)
    folder = tmp_path / "sweep"
    folder.mkdir()
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(folder / "search.jsonl"))
        ),
        study_name="sweep",
        direction="maximize",
    )
    for position in (0, 1):
        study.enqueue_trial({"train.learning_rate": position})
    monkeypatch.setattr(search, "_POLL_SECONDS", 0.01)
    assert main(["sweep", file, "sweep.search.trials=2"]) == 0
    assert "pruned, below the median" in capsys.readouterr().err
    assert [t.state.name for t in study.get_trials()] == ["COMPLETE", "PRUNED"]
    stopped = folder / "learning_rate=1e-09" / "seed-0"
    assert json.loads((stopped / "status.json").read_text())["state"] == "interrupted"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (["sweep.axes.train.learning_rate=[0.3,0.01]"], "axes"),
        (["sweep.axes.train.epochs=[1,2]"], "axes"),
        (["sweep.best=forgetting"], "best"),
        (["sweep.axes.train.learning_rate=[0.1]", "sweep.seeds=2"], "axes and seeds"),
    ],
)
def test_a_search_goes_on_with_the_same_question_only(
    changes, what, write, sweep_content, tmp_path, capsys, monkeypatch
):
    from clkit.sweep import search

    sweep_content["sweep"] |= {
        "axes": {"train.learning_rate": [0.01, 0.1]},
        "launcher": {"name": "local"},
        "search": {"trials": 1},
        "seeds": 1,
    }
    file = write(sweep_content)
    monkeypatch.setattr(search._Search, "run", lambda self: {})
    monkeypatch.setattr("clkit.sweep.command._summary", lambda directory: None)
    assert main(["sweep", file]) == 0
    assert main(["sweep", file, "sweep.search.trials=2", "sweep.search.sampler=random"]) == 0
    assert main(["sweep", file, *changes]) == 2
    err = capsys.readouterr().err
    assert f"had other {what};" in err and "search.jsonl to search anew" in err
    (tmp_path / "sweep" / "search.jsonl").unlink()
    assert main(["sweep", file, *changes]) == 0


def test_a_search_needs_local_processes(write, sweep_content, capsys):
    sweep_content["sweep"]["search"] = {"trials": 2}
    assert main(["sweep", write(sweep_content)]) == 2
    assert "a search runs in local processes" in capsys.readouterr().err
