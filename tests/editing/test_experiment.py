"""The editing experiment on a tiny model: draws, skips what is finished, goes on where it was cut, writes its tables."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import yaml

from clkit.editing import Editor
from clkit.errors import DataError

HERE = Path(__file__).parents[2] / "experiments" / "editing"
TINY = {"name": "wise", "layer": "0", "steps": 3, "contexts": 0, "negatives": 1}


@pytest.fixture
def modules(monkeypatch, data_root):
    if not (data_root / "editing").is_dir():
        pytest.skip(f"the edits are not at {data_root}; set CLKIT_DATA")
    monkeypatch.setenv("CLKIT_DATA", str(data_root))
    monkeypatch.syspath_prepend(str(HERE))
    for name in ("data", "run"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import data
    import run

    yield data, run
    for name in ("data", "run"):
        del sys.modules[name]


@pytest.fixture
def command(tiny_llama, tmp_path):
    content = {
        "model": {"name": str(tiny_llama), "prompt": "plain", "max_length": 256},
        "methods": {"wise": TINY, "no-history": {**TINY, "history": 0}, "other": {"name": "no_such_method"}},
        "sizes": {1: 2, 3: 1},
        "measured_at": [1, 10],
        "evaluation": {"batch_size": 8, "max_new_tokens": 3},
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(content))
    return ["--settings", str(tmp_path / "settings.yaml"), "--out", str(tmp_path / "out"), "--seeds", "0"]


def test_draws_share_their_first_edits_and_never_touch_those_kept_for_tuning(modules):
    data, _ = modules
    few, many = data.draw("zsre", 3, 1), data.draw("zsre", 900, 1)
    assert few.records == many.records[:3] and few.records != data.draw("zsre", 3, 2).records
    numbers = sorted(int(r.id.removeprefix("zsre-")) for r in many.records)
    assert numbers == list(range(900))
    with pytest.raises(DataError, match="has 900 edits beside the 100 kept for tuning; 901 were asked for"):
        data.draw("zsre", 901, 0)
    learned = {r.locality_prompt for r in many.records}
    assert not learned & {p.prompt for p in many.probes}, "what is learned from is never asked"
    assert {p.aspect for p in few.probes} == {"reliability", "generalisation", "locality", "portability"}
    assert all(p.answer for p in (*many.probes, *many.near))
    assert all(r.subject in r.prompt for r in many.records)
    kept = data.draw("zsre-kept", 100, 1)
    assert sorted(int(r.id.removeprefix("zsre-")) for r in kept.records) == list(range(900, 1000))
    with pytest.raises(DataError, match="has 100 edits kept for tuning; 101 were asked for"):
        data.draw("zsre-kept", 101, 0)
    passages = data.draw("hallucination", 5, 0)
    assert [p.aspect for p in passages.probes[:2]] == ["reliability", "locality"] and len(passages.near) == 5


def test_runs_are_measured_skipped_and_compared(modules, command, tmp_path, capsys, monkeypatch):
    _, run = modules
    assert run.main([*command, "--methods", "wise", "other", "--sizes", "1", "3"]) == 0
    text = capsys.readouterr().out
    assert "no such strategy: no_such_method" in text and "### Final model, teacher-forced tokens" in text
    result = json.loads((tmp_path / "out/zsre/wise/3-0/result.json").read_text())
    assert set(result["measured"]) == {"1", "3"} and 0 < result["bytes"] < 32 * 64 * 4
    assert len(result["measured"]["3"]["all"]["cases"]["reliability"]["tokens"]) == 3
    singles = json.loads((tmp_path / "out/zsre/wise/1-0/result.json").read_text())
    assert len(singles["measured"]["1"]["all"]["cases"]["locality"]["generated"]) == 2, "two groups of one edit"
    with (tmp_path / "out/zsre/summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(r["T"], r["after"]) for r in rows} == {("1", "1"), ("3", "1"), ("3", "3")}
    assert {"reliability", "near locality"} <= {r["aspect"] for r in rows}
    routes = result["measured"]["3"]["all"]["routes"]
    near = result["measured"]["3"]["near"]["routes"]["locality"]
    missed = sum(routes[a].get("none", 0) for a in ("reliability", "generalisation"))
    answered = sum(n for counts in (routes["locality"], near) for name, n in counts.items() if name != "none")
    assert len(result["failures"]) == missed + answered > 0
    monkeypatch.setattr(Editor, "load", None)
    assert run.main([*command, "--methods", "wise", "--sizes", "1", "3"]) == 0, "what is finished is not run again"


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_other_options_or_defaults_is_not_taken_for_this_one(finished, modules, command, tmp_path, capsys):
    _, run = modules
    options, settings = [*command, "--methods", "no-history", "--sizes", "3"], tmp_path / "settings.yaml"
    assert run.main(options) == 0
    home = tmp_path / "out/zsre/no-history/3-0"
    made = json.loads((home / "settings.json").read_text())
    assert made["options.history"] == 0 and made["model.max_length"] == 256
    if not finished:
        (home / "result.json").unlink()
    content = yaml.safe_load(settings.read_text())
    content["methods"]["no-history"]["history"] = 4
    settings.write_text(yaml.safe_dump(content | {"ask_every": 2}))
    capsys.readouterr()
    assert run.main(options) == 2
    assert "no-history/3-0: was made with other values of ask_every, options.history" in capsys.readouterr().err
    assert (home / "result.json").exists() == finished and run.main([*options, "--summary"]) == 0
    (home / "settings.json").unlink()
    assert run.main(options) == 0, "runs of before settings were kept are taken"


def test_a_run_that_is_cut_goes_on_after_its_last_edit(modules, command, tmp_path, monkeypatch):
    _, run = modules
    plain = Editor._edit

    def cut(self, record):
        if len(self.records) == 2:
            raise KeyboardInterrupt
        return plain(self, record)

    options = [*command, "--methods", "no-history", "--sizes", "3"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Editor, "_edit", cut)
        run.main(options)
    made = []
    monkeypatch.setattr(Editor, "_edit", lambda self, record: made.append(record.id) or plain(self, record))
    assert run.main(options) == 0 and len(made) == 1
    assert (tmp_path / "out/zsre/no-history/3-0/result.json").is_file()


def test_only_some_of_many_edits_are_asked_about(modules, command, tmp_path):
    data, run = modules
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(yaml.safe_load(settings.read_text()) | {"ask_every": 2}))
    assert run.main([*command, "--methods", "wise", "--sizes", "3"]) == 0
    after = {t: json.loads((tmp_path / f"out/zsre/wise/3-0/group-0/after-{t}.json").read_text()) for t in (1, 3)}
    asked = {t: {row["edit"] for part in found.values() for row in part["rows"]} for t, found in after.items()}
    first, _, third = (r.id for r in data.draw("zsre", 3, 0).records)
    assert asked == {1: {first}, 3: {first, third}}


@pytest.mark.parametrize("name", ["settings", "all", "tuning"])
def test_the_options_of_the_settings_are_valid(name, modules):
    from clkit.editing.store import make_strategy

    content = yaml.safe_load((HERE / f"{name}.yaml").read_text())
    for section in content["methods"].values():
        make_strategy(section)
    data, _ = modules
    assert all(t * groups <= (100 if name == "tuning" else 900) for t, groups in content["sizes"].items())
    assert data.draw("zsre", 900, 0)


def test_what_is_not_in_the_settings_is_refused(modules, command, capsys):
    _, run = modules
    assert run.main([*command, "--methods", "wize"]) == 2
    assert "unknown method 'wize'. Did you mean 'wise'?" in capsys.readouterr().err
    assert run.main([*command, "--sizes", "7"]) == 2
    assert "--sizes: 7 is not in settings.yaml. Known: 1, 3" in capsys.readouterr().err
