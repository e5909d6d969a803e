"""`clkit unlearn` through main(argv): what it does, what it refuses, what it leaves behind."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from people import PEOPLE, digits, nothing_forgotten, request, rows, run

from clkit import api
from clkit.cli import main
from clkit.tasks import build_tasks
from clkit.unlearning import workflow
from clkit.unlearning.gates import Finding
from clkit.unlearning.ledger import Ledger
from clkit.unlearning.records import records, without
from clkit.unlearning.retrain import Retrain

LENIENT = ["--max-utility-loss", "1", "--max-membership", "1", "--max-extraction", "1"]


def unlearn(run_dir: Path, file: Path, *more: str) -> int:
    return main(["unlearn", "--run", str(run_dir), "--request", str(file), *LENIENT, *more])


def certificate(run_dir: Path) -> tuple[Path, dict]:
    (path,) = (run_dir.parent / "unlearning").glob("*/certificate.json")
    return path, json.loads(path.read_text())


def new_run(run_dir: Path) -> Path:
    path, content = certificate(run_dir)
    return (path.parent / content["new_run"]["path"]).resolve()


def matrix(run_dir: Path) -> object:
    return json.loads((run_dir / "matrix.json").read_text())["matrix"]


def test_a_request_is_served_and_the_new_run_is_one_that_never_had_the_records(
    digits_run, digit_ids, write, tmp_path, capsys
):
    before = {p: p.read_bytes() for p in digits_run.rglob("*") if p.is_file()}
    assert unlearn(digits_run, write(request({"record_ids": digit_ids[:3]}))) == 0
    assert {p: p.read_bytes() for p in digits_run.rglob("*") if p.is_file()} == before, "the old run is as it was"
    path, content = certificate(digits_run)
    assert f"Certificate: {path}" in capsys.readouterr().out
    counts = {k: v["count"] for k, v in content["records"].items()}
    assert counts["forgotten"] == 3 and counts["retained"] == counts["full"] - 3
    assert [f["name"] for f in content["verification"] if f["passed"]] == [
        "partition", "retained_only", "utility", "membership", "extraction",
    ]  # fmt: skip
    figures = {f["name"]: f["figures"] for f in content["verification"]}
    assert figures["retained_only"]["rows_of_other_records"] == 0
    assert figures["membership"]["n"] == [3, 60] and 0 <= figures["membership"]["loss"]["auc"][1] <= 1
    assert figures["extraction"] == {"applies": False}, "classes hold no text"
    assert content["guarantee"] is None and content["not_claimed"]
    assert "| utility | yes |" in (path.parent / "certificate.md").read_text()

    # The same tasks with the records physically gone, somewhere no ledger holds: bit for bit the same.
    config = digits(tmp_path / "elsewhere")
    tasks = build_tasks("digits", {"train_limit": 12, "eval_limit": 6})
    gone = {r.place for r in records(tasks) if r.id in digit_ids[:3]}
    clean = api.fit(config["model"]["name"], without(tasks, gone), output_dir=tmp_path / "elsewhere" / "clean",
                    train=config["train"], checkpoint=config["checkpoint"], **{"model.hidden": [16]})  # fmt: skip
    assert matrix(new_run(digits_run)) == matrix(clean.run_dir)
    weights = [p / "export" / "model.safetensors" for p in (new_run(digits_run), clean.run_dir)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert weights[0].read_bytes() != (digits_run / "export" / "model.safetensors").read_bytes()

    assert main(["eval", str(new_run(digits_run))]) == 0, "it opens like any run"
    assert main(["eval", str(digits_run)]) == 0, "and so does the old one"


def test_the_same_request_again_returns_the_certificate_and_another_content_is_refused(
    digits_run, digit_ids, write, monkeypatch, capsys
):
    file = write(request({"record_ids": digit_ids[:2]}))
    assert unlearn(digits_run, file) == 0
    path, first = certificate(digits_run)
    monkeypatch.setattr("clkit.api.run", lambda *args, **kwargs: pytest.fail("trained again"))
    assert unlearn(digits_run, file) == 0
    assert "already served" in capsys.readouterr().out and json.loads(path.read_text()) == first
    assert unlearn(digits_run, write(request({"record_ids": digit_ids[:3]}))) == 2
    assert "already served, with other content" in capsys.readouterr().err


def test_tombstones_hold_for_every_later_run_and_stop_the_resume_of_an_older_one(
    digits_run, digit_ids, write, tmp_path, capsys
):
    assert unlearn(digits_run, write(request({"record_ids": digit_ids[:3]}))) == 0
    for strategy in ("naive", "joint"):
        other = run(digits(tmp_path, strategy=strategy, output_dir=str(tmp_path / "runs" / strategy)), tmp_path)
        with api.open_run(other) as trainer:
            assert not {*digit_ids[:3]} & {i for task in trainer.tasks for i in task.train.ids}
            assert digit_ids[3] in {i for task in trainer.tasks for i in task.train.ids}
    content = digits(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert main(["run", str(tmp_path / "config.yaml"), "--quiet"]) == 2, "the superseded run can't go on"
    assert "data." in capsys.readouterr().err

    # A second request goes to the first run as well: the earlier one's records stay out.
    second = write(request({"record_ids": [digit_ids[5]]}, request_id="R-2"))
    assert unlearn(digits_run, second) == 0
    counts = sorted(
        json.loads(p.read_text())["records"]["forgotten"]["count"]
        for p in (digits_run.parent / "unlearning").glob("*/certificate.json")
    )
    assert counts == [3, 4]


def test_tasks_made_in_python_lose_forgotten_records_too(digits_run, digit_ids, write, tmp_path):
    assert unlearn(digits_run, write(request({"record_ids": digit_ids[:3]}))) == 0
    tasks = build_tasks("digits", {"train_limit": 12, "eval_limit": 6})
    result = api.fit("mlp", tasks, output_dir=digits_run.parent / "python", train={"epochs": 1})
    steps = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
    assert [e["examples"] for e in steps if e["event"] == "task"] == [24, 21, 24, 24, 24]


def test_plan_and_dry_run_say_what_would_be_done_and_write_nothing(digits_run, digit_ids, write, capsys):
    for file, more in (
        (write(request({"record_ids": digit_ids[:3]})), ["--plan"]),
        (write(request({"record_ids": digit_ids[:3]}, dry_run=True), name="dry.json"), []),
    ):
        assert unlearn(digits_run, file, *more) == 0
        out = capsys.readouterr().out
        assert "take out 3 of 180 records (3 of them trained on)" in out and "* retrain: 20 optimiser steps" in out
    assert sorted(p.name for p in digits_run.parent.iterdir()) == ["first"]


def test_a_failed_gate_is_exit_code_3_without_a_certificate_and_can_be_tried_again(
    digits_run, digit_ids, write, monkeypatch, capsys
):
    file = write(request({"record_ids": digit_ids[:2]}))
    assert main(["unlearn", "--run", str(digits_run), "--request", str(file), "--max-utility-loss", "-2"]) == 3
    assert "no certificate: utility" in capsys.readouterr().err
    assert not list(digits_run.parent.glob("unlearning/*/certificate.json"))
    ledger = Ledger(digits_run.parent / "unlearning")
    assert [job[0] for job in ledger._rows("SELECT state FROM jobs")] == ["failed"]
    assert len(ledger.tombstones()) == 2, "they stay forgotten"
    ledger.close()
    assert unlearn(digits_run, file) == 0 and certificate(digits_run)


def test_a_gate_that_raises_and_training_on_other_data_fail_closed(digits_run, digit_ids, write, tmp_path):
    from clkit.errors import VerificationError
    from clkit.unlearning.gates import retained_only

    file = write(request({"record_ids": digit_ids[:2]}))

    def broken(evidence) -> Finding:
        raise ValueError("nothing to measure")

    with pytest.raises(VerificationError, match=r'broken {"error": "ValueError"}'):
        workflow.serve(digits_run, file, Retrain(), gates=[broken])

    class Cheat(Retrain):
        name = "cheat"

        def run(self, case, directory):
            shutil.copytree(digits_run, directory, dirs_exist_ok=True)
            return directory

    with pytest.raises(VerificationError, match=r'retained_only {"same_data": false'):
        workflow.serve(digits_run, file, Cheat(), gates=[retained_only])


def test_without_a_record_that_was_only_scored_the_attacks_say_what_is_missing(people_content, write, tmp_path, capsys):
    for file in people_content["tasks"]["tasks"]:
        folder, lines = Path(file).with_suffix(""), Path(file).read_text().replace('"id": ', '"note": ')
        folder.mkdir()
        for name in ("train.jsonl", "test.jsonl"):
            (folder / name).write_text(lines)
    files = [file.removesuffix(".jsonl") for file in people_content["tasks"]["tasks"]]
    run_dir = run({**people_content, "tasks": {"source": "jsonl", "tasks": files}}, tmp_path)
    file = write(request({"predicate": {"field": "answer", "equals": "kiwi orchard 00"}}))
    assert unlearn(run_dir, file, "--keep-near-duplicates") == 3
    err = capsys.readouterr().err
    for gate in ("membership", "extraction"):
        assert gate + ' {"error": "there is nothing to compare with: every record that is scored was trained on' in err


def test_a_perplexity_that_falls_does_not_outweigh_scores_that_are_lost(monkeypatch):
    from types import SimpleNamespace

    from clkit.unlearning.gates import utility

    def final(accuracy, perplexity):
        return {"task": (accuracy, True), "holdout": (perplexity, False)}

    for old, new, passed, wanted in [
        (final(0.9, 30.0), final(0.0, 24.0), False, (0.9 - 0.2) / 2),
        (final(0.9, 30.0), final(0.9, 30.3), True, 0.005),
        (final(0.9, 0.0), final(0.9, 1.0), False, None),
    ]:
        results = iter([old, new])
        monkeypatch.setattr("clkit.unlearning.gates.RunResult.load", lambda path: path)
        monkeypatch.setattr("clkit.unlearning.gates._final", lambda _, results=results: next(results))
        finding = utility(0.05)(SimpleNamespace(old_run="old", new_run="new"))
        assert finding.passed is passed and finding.figures["loss"] == (wanted and pytest.approx(wanted))


def test_purge_deletes_the_superseded_weights_after_the_certificate_lists_them(digits_run, digit_ids, write):
    assert unlearn(digits_run, write(request({"record_ids": digit_ids[:2]})), "--purge") == 0
    path, content = certificate(digits_run)
    assert content["superseded"]["still_there"] == ["checkpoints", "export", "samples.json", "report.html"]
    assert not (digits_run / "export").exists() and not (digits_run / "checkpoints").exists()
    assert main(["unlearn", "--verify", str(path)]) == 0


@pytest.mark.parametrize("elsewhere", [False, True])
def test_other_runs_that_may_have_learned_the_records_are_listed_wherever_they_lie(
    elsewhere, digits_run, digit_ids, write, tmp_path, monkeypatch
):
    runs = digits_run.parent
    run(digits(tmp_path, output_dir=str(runs / "sweep" / "lr=1" / "seed-0")), tmp_path)
    (runs / "loop").symlink_to(runs, target_is_directory=True)
    folder = runs / "unlearning"
    if elsewhere:
        folder = tmp_path / "ledgers" / "main"
        monkeypatch.setenv("CLKIT_LEDGER", str(folder))
    assert unlearn(digits_run, write(request({"record_ids": digit_ids[:2]}))) == 0
    (path,) = folder.glob("*/certificate.json")
    others = json.loads(path.read_text())["superseded"]["other_runs_begun_before"]
    assert others == ["sweep/lr=1/seed-0"]
    assert f"forgotten: {others[0]}." in (path.parent / "certificate.md").read_text()


@pytest.mark.parametrize("what", ["certificate", "page", "manifest", "weights", "checkpoints", "ledger"])
def test_verify_finds_every_later_change(what, digits_run, digit_ids, write, capsys):
    assert unlearn(digits_run, write(request({"record_ids": digit_ids[:2]}))) == 0
    path, content = certificate(digits_run)
    assert main(["unlearn", "--verify", str(path)]) == 0
    if what == "certificate":
        path.write_text(json.dumps(content | {"issued_at": "2020-01-01"}))
    elif what == "page":
        page = path.with_suffix(".md")
        kept = page.read_text()
        page.unlink()
        assert main(["unlearn", "--verify", str(path)]) == 0, "it may be deleted"
        page.write_text(kept.replace("| NO |", "| yes |") + "All is well.")
    elif what == "manifest":
        (path.parent / "manifest.json").write_text('{"full": [], "retained": [], "forgotten": []}')
    elif what == "weights":
        (new_run(digits_run) / "export" / "model.safetensors").write_bytes(b"other")
    elif what == "checkpoints":
        shutil.rmtree(new_run(digits_run) / "checkpoints")
        assert main(["unlearn", "--verify", str(path)]) == 0, "they may be deleted"
        shutil.copytree(digits_run / "checkpoints", new_run(digits_run) / "checkpoints")
    else:
        (path.parents[1] / "ledger.sqlite").unlink()
    capsys.readouterr()
    assert main(["unlearn", "--verify", str(path)]) == 3
    expected = {"certificate": "digest", "manifest": "manifest", "weights": "new_run_files", "ledger": "ledger"}
    expected |= {"checkpoints": "new_run_checkpoints", "page": "page"}
    assert f"FAILED {expected[what]}" in capsys.readouterr().out


def test_what_does_not_go_together_is_exit_code_2(digits_run, write, tmp_path, capsys):
    file = write(request({"record_ids": ["nobody"]}))
    cases = {
        "needs --run and --request": ["unlearn"],
        "Unknown unlearning method 'retran'. Did you mean 'retrain'": ["unlearn", "--run", str(digits_run), "--request", str(file), "--method", "retran"],
        "no finished run here": ["unlearn", "--run", str(tmp_path / "none"), "--request", str(file)],
        "record_ids[0]: is not in the run's data": ["unlearn", "--run", str(digits_run), "--request", str(file)],
        "is not a certificate": ["unlearn", "--verify", str(file)],
        "nothing else; leave out": ["unlearn", "--verify", str(file), "--run", str(digits_run)],
    }  # fmt: skip
    for what, argv in cases.items():
        assert main(argv) == 2
        assert what in capsys.readouterr().err


def test_people_and_who_quotes_them_are_forgotten_and_named_nowhere(people_content, write, tmp_path, capsys):
    quote = {"id": "Note-0", "prompt": "Ada Quill: born near the?", "answer": "kiwi orchard 00, says a friend"}
    with Path(people_content["tasks"]["tasks"][1]).open("a") as file:
        file.write(json.dumps(quote) + "\n")
    run_dir = run(people_content, tmp_path)
    capsys.readouterr()
    file = write(request({"subject_ids": [PEOPLE[0]]}))
    assert unlearn(run_dir, file) == 2, "near-duplicates need a decision"
    out, err = capsys.readouterr()
    said = [out, err]
    assert "--include-near-duplicates or --keep-near-duplicates" in err
    (review,) = (run_dir.parent / "unlearning").glob("*/near_duplicates.json")
    assert [row["retained"][-1] for row in json.loads(review.read_text())] == ["Note-0"]

    assert unlearn(run_dir, file, "--include-near-duplicates") == 0
    content = certificate(run_dir)[1]
    assert content["near_duplicates"] == {"found": 1, "decision": "taken along"}
    assert content["records"]["forgotten"]["count"] == 4
    said += capsys.readouterr()
    for path in [*(run_dir.parent / "unlearning").rglob("*"), *new_run(run_dir).rglob("*")]:
        if path.is_file() and path != review and path.suffix != ".safetensors":
            said.append(path.read_bytes().decode("latin-1"))
    assert len(said) > 10
    for secret in ("Ada", "Quill", "kiwi", "orchard", "Note-0"):
        assert not any(secret in text for text in said), secret


def test_changed_data_is_refused(people_content, write, tmp_path, capsys):
    run_dir = run(people_content, tmp_path)
    file = Path(people_content["tasks"]["tasks"][0])
    file.write_text(file.read_text().replace("orchard", "plantation"))
    assert unlearn(run_dir, write(request({"subject_ids": [PEOPLE[1]]}))) == 2
    err = capsys.readouterr().err
    assert "its data have changed since it was trained" in err and file.name in err
    assert not (run_dir.parent / "unlearning").exists()


def test_a_copy_under_another_id_goes_with_the_record_and_is_not_said_to_be_kept(people_content, write, tmp_path):
    row = rows()[0]
    with Path(people_content["tasks"]["tasks"][1]).open("a") as file:
        file.write(json.dumps({**row, "id": "copy", "prompt": f" {row['prompt']}"}) + "\n")
    run_dir = run(people_content, tmp_path)
    assert unlearn(run_dir, write(request({"record_ids": [row["id"]]})), "--keep-near-duplicates") == 0
    content = certificate(run_dir)[1]
    assert content["records"]["forgotten"]["count"] == 2
    assert content["near_duplicates"] == {"found": 0, "decision": "none to decide on"}


def test_a_request_whose_copies_leave_nothing_to_score_is_refused_before_anything_is_forgotten(
    people_content, write, tmp_path, capsys
):
    row, folder = rows()[0], tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(PEOPLE[:2])))
    (folder / "test.jsonl").write_text(json.dumps({**row, "id": "scored"}) + "\n")
    people_content["tasks"]["tasks"][0] = str(folder)
    run_dir = run(people_content, tmp_path)
    for decision in ([], ["--keep-near-duplicates"]):
        assert unlearn(run_dir, write(request({"record_ids": [row["id"]]})), *decision) == 2
        assert "no record left to score it with" in capsys.readouterr().err
    assert nothing_forgotten(run_dir)


def test_requests_that_together_take_everything_are_refused(digits_run, write, capsys):
    tasks = build_tasks("digits", {"train_limit": 12, "eval_limit": 6})
    first, second = ([i for task in part for i in task.train.ids] for part in (list(tasks)[:3], list(tasks)[3:]))
    assert unlearn(digits_run, write(request({"record_ids": first}))) == 0
    capsys.readouterr()
    file = write(request({"record_ids": second}, request_id="R-2"))
    for more in ([], ["--plan"]):
        assert unlearn(digits_run, file, *more) == 2
        assert "every training record is out; delete the run instead" in capsys.readouterr().err


def test_a_request_goes_on_after_another_one_was_served_in_between(digits_run, digit_ids, write, monkeypatch):
    first = write(request({"record_ids": digit_ids[:2]}), name="first.json")
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "run_gates", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert unlearn(digits_run, first) == 130
    assert unlearn(digits_run, write(request({"record_ids": digit_ids[5:6]}, request_id="R-2"))) == 0
    assert unlearn(digits_run, first) == 0
    files = (digits_run.parent / "unlearning").glob("*/certificate.json")
    assert [json.loads(file.read_text())["records"]["forgotten"]["count"] for file in files] == [3, 3]


def test_a_request_that_is_served_or_begun_in_another_way_is_told_where(
    digits_run, digit_ids, write, monkeypatch, capsys
):
    both = [request({"record_ids": digit_ids[i : i + 1]}, request_id=f"R-{i}") for i in (1, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "run_gates", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert unlearn(digits_run, write(*both)) == 130
    capsys.readouterr()
    assert unlearn(digits_run, write(*both), "--method", "retrain_same_epochs") == 2
    err = capsys.readouterr().err
    assert err.count("begun already, in another file, by another method or on another run, and not finished") == 2
    assert unlearn(digits_run, write(*both)) == 0
    path, _ = certificate(digits_run)
    capsys.readouterr()
    assert unlearn(digits_run, write(both[1])) == 2
    assert f"already served, in another file, by another method or on another run; its certificate is {path}" in (
        capsys.readouterr().err
    )


def test_all_of_the_last_classes_can_be_forgotten_which_the_new_network_does_not_have(
    digits_run, write, tmp_path, monkeypatch
):
    monkeypatch.setenv("CLKIT_COMPUTED", str(tmp_path / "computed"))
    (tmp_path / "computed" / "recipe").mkdir(parents=True)
    (tmp_path / "computed" / "recipe" / "rows.safetensors").write_bytes(b"features that can't be read")
    tasks = build_tasks("digits", {"train_limit": 12, "eval_limit": 6})
    last = tasks[len(tasks) - 1].train.ids
    for number, more in enumerate(([], tasks[0].train.ids[:2])):
        assert unlearn(digits_run, write(request({"record_ids": [*last, *more]}, request_id=f"R-{number}"))) == 0
    files = (digits_run.parent / "unlearning").glob("*/certificate.json")
    checks = [json.loads(file.read_text())["verification"] for file in files]
    found = [next(c["figures"] for c in each if c["name"] == "membership") for each in checks]
    alone, both = sorted(found, key=lambda figures: figures["n"][0])
    assert alone["applies"] is False and alone["of_classes_that_are_gone"] == len(last)
    assert both["n"][0] == 2 and "loss" in both and both["of_classes_that_are_gone"] == len(last)


def test_purge_deletes_the_events_that_quote_edits(tiny_llama, write, tmp_path):
    words = ("kiwi orchard in Ulm", "steel bridge of Brno", "violin maker Orlov", "polar ferry to Oslo", "zinc", "moss")
    edits = [{"id": f"e{i}", "prompt": f"Who knows the {w}?", "target_new": f"{i} do"} for i, w in enumerate(words)]
    for name, part in (("train", edits[:3]), ("test", edits[3:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in part))
    content = {
        "output_dir": str(tmp_path / "runs" / "first"),
        "model": {"name": str(tiny_llama), "dtype": "float32", "prompt": "plain"},
        "tasks": {"source": "jsonl", "kind": "edit", "tasks": [str(tmp_path)]},
        "strategy": {"name": "grace", "steps": 2},
        "eval": {"max_new_tokens": 2},
    }
    run_dir = run(content, tmp_path)
    assert "kiwi" in (run_dir / "events.jsonl").read_text()
    assert unlearn(run_dir, write(request({"record_ids": ["e0"]})), "--purge", "--keep-near-duplicates") == 0
    assert "events.jsonl" in certificate(run_dir)[1]["superseded"]["still_there"]
    for path in run_dir.rglob("*"):
        assert not path.is_file() or b"kiwi" not in path.read_bytes(), path


def test_a_run_named_by_a_link_is_served_where_it_is(digits_run, digit_ids, write, tmp_path):
    (tmp_path / "home").mkdir()
    link = tmp_path / "home" / "current"
    link.symlink_to(digits_run, target_is_directory=True)
    assert unlearn(link, write(request({"record_ids": digit_ids[:3]}))) == 0
    assert new_run(digits_run).parent == digits_run.parent and [*link.parent.iterdir()] == [link]
    # Tombstones hold beside the run, by whatever way a later one is named.
    (tmp_path / "home" / "all").symlink_to(digits_run.parent, target_is_directory=True)
    for folder in (digits_run.parent, tmp_path / "home" / "all"):
        later = run(digits(tmp_path, output_dir=str(folder / f"later-{folder.name}")), tmp_path)
        with api.open_run(later) as trainer:
            assert not {*digit_ids[:3]} & {i for task in trainer.tasks for i in task.train.ids}
