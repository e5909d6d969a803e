"""``clkit edit``: apply requests, list, roll back, go on after a kill, and refuse what does not fit before any work."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from quickly import METHOD

from clkit.cli import main
from clkit.editing.journal import Journal


@pytest.fixture
def command(tiny_llama, tmp_path):
    rows = [
        {"prompt": f"Town of {i}?", "target_new": "ab"[i % 2], "id": f"e{i}", "locality_prompt": "Sum?"}
        for i in range(3)
    ]
    file = tmp_path / "edits.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = [f"{k}={v}" for k, v in METHOD.items() if k != "name"]
    return [
        "edit",
        "--model",
        str(tiny_llama),
        "--requests",
        str(file),
        "--output",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--set",
        *options,
    ]


def test_edit_list_and_rollback(command, tmp_path, capsys):
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "3 requests, 0 done already, 3 to do" in text and "[3/3] e2:" in text
    assert "3 active edits in 2 memories" in text and "reliability" in text
    final = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert final["edits"] == 3 and [row["id"] for row in final["rows"]] == ["e0", "e1", "e2"]
    assert all(row["routes"]["prompt"]["memory"] in ("shard-0", "shard-1", None) for row in final["rows"])
    assert main(command) == 0
    assert "3 requests, 3 done already, 0 to do" in capsys.readouterr().out
    out = ["edit", "--output", str(tmp_path / "out")]
    assert main([*out, "--list"]) == 0
    assert "e1  Town of 1? -> b\n" in capsys.readouterr().out
    assert main([*out, "--rollback", "e0", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "removed: e0\nlearned again without it, in the same memory: e1\n"
    assert not (tmp_path / "out" / "scores.json").exists(), "it was another model's"
    assert main([*out, "--list"]) == 0
    assert "2 active edits" in capsys.readouterr().out


def test_a_file_of_another_kind_is_refused(command, tmp_path, capsys):
    file = (tmp_path / "edits.jsonl").rename(tmp_path / "edits.txt")
    assert main([str(file) if o.endswith("edits.jsonl") else o for o in command]) == 2
    assert "edits.txt: edit requests are read from .jsonl, .json, .csv, .parquet" in capsys.readouterr().err


@pytest.mark.parametrize(("device", "why"), [("cuda:99", "GPUs are visible; use auto or cpu"), ("gpu", "is no device")])
def test_a_device_that_is_not_there_is_one_clear_error(command, capsys, device, why):
    assert main([device if o == "cpu" else o for o in command]) == 2
    text = capsys.readouterr().err
    assert f"device: '{device}'" in text and why in text


def test_another_answer_under_the_same_id_is_refused_and_replaced_when_asked(command, tmp_path, capsys):
    assert main(command) == 0
    file = tmp_path / "edits.jsonl"
    file.write_text(file.read_text().replace('"target_new": "a", "id": "e0"', '"target_new": "z", "id": "e0"'))
    capsys.readouterr()
    assert main(command) == 2
    assert "edit 'e0': 'Town of 0?' -> 'z', but edit 'e0' says 'a'" in capsys.readouterr().err
    assert main([command[0], "--on-conflict", "replace", *command[1:]]) == 0
    assert "3 requests, 2 done already, 1 to do" in capsys.readouterr().out
    assert main(["edit", "--output", str(tmp_path / "out"), "--list"]) == 0
    assert "e0  Town of 0? -> z\n" in capsys.readouterr().out


def test_each_edit_is_shown_when_it_is_made_also_in_a_file(command, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown))  # keeps 8 kB back, as into a file
    assert main(command) == 0
    assert b"3 to do\n" in shown.getvalue() and b"[3/3] e2:" in shown.getvalue()


def test_the_command_keeps_the_type_of_the_weights(command, tmp_path):
    assert main([*command[:1], "--dtype", "bfloat16", *command[1:]]) == 0
    head = tmp_path / "out" / "edits.json"
    assert json.loads(head.read_text())["model"]["dtype"] == "bfloat16"
    assert main(command) == 0, "the same directory without the option goes on in its own type"
    assert json.loads(head.read_text())["model"]["dtype"] == "bfloat16"


def test_wrong_requests_and_missing_options_exit_2_before_the_model_is_loaded(command, tmp_path, capsys):
    (tmp_path / "edits.jsonl").write_text('{"prompt": "a"}\n{"target_new": "b"}\n')
    assert main(command) == 2
    text = capsys.readouterr().err
    assert "edits.jsonl:1" in text and "edits.jsonl:2" in text and not (tmp_path / "out").exists()
    for arguments, message in (
        (["--output", "nowhere"], "--requests: give a file"),
        (["--output", "nowhere", "--list"], "nowhere: there are no edits here"),
        (["--output", "nowhere", "--requests", "x"], "--model: give the model"),
    ):
        assert main(["edit", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_answers_that_do_not_fit_are_all_listed_before_the_first_edit(command, tmp_path, capsys):
    with (tmp_path / "edits.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "x", "target_new": "z" * 600, "id": "e3"}) + "\n")
        unrelated = {"locality_prompt": "w", "locality_answer": "y" * 700}
        file.write(json.dumps({"prompt": "y", "target_new": "z", "id": "e4", **unrelated}) + "\n")
    assert main(command) == 2
    text = capsys.readouterr().err
    assert "'e3 (prompt)': the answer takes 601 tokens" in text
    assert "'e4 (locality)': the answer takes 701 tokens" in text
    assert main(["edit", "--output", str(tmp_path / "out"), "--list"]) == 0
    assert "0 active edits" in capsys.readouterr().out


def test_edits_are_gone_on_with_as_they_were_begun(command, tmp_path, capsys):
    assert main([*command, "--seed", "3"]) == 0
    journal = (tmp_path / "out" / "journal.jsonl").read_bytes()
    for changes, messages in (
        (["--strategy", "grace", "--set", "radius=2.0"], ["--strategy: got grace, the edits are by wise"]),
        (["--set", "steps=9", "shard_size=2"], ["--set steps: got 9, the edits are made with 8"]),
        (["--seed", "4", "--set", "steps=9"], ["--set steps", "--seed: got 4, the edits are made with 3"]),
    ):
        capsys.readouterr()
        assert main([*command[: command.index("--set")], *changes]) == 2
        text = capsys.readouterr().err
        assert all(m in text for m in messages) and "choose another --output" in text
        assert "shard_size" not in text, "an option that is as it was is no problem"
    for option in ("nowhere", "radius=x"):
        fresh = [o.replace(str(tmp_path / "out"), str(tmp_path / "fresh")) for o in command[: command.index("--set")]]
        assert main([*fresh, "--strategy", "grace", "--set", option]) == 2
        assert not (tmp_path / "fresh").exists(), "a wrong option is found before anything is written"
    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == journal
    plain = command[: command.index("--set")]
    other = [o.replace(str(tmp_path / "out"), str(tmp_path / "grace")) for o in plain]
    assert main([*other, "--strategy", "grace", "--set", "radius=0.3", "steps=2"]) == 0
    assert main([*other, "--set", "radius=0.3"]) == 0, "options are those of the method that made the edits"
    assert main([*command[: command.index("--set")], "--quiet"]) == 0


def test_edits_are_gone_on_with_in_another_directory_as_they_were_begun(command, tmp_path, capsys):
    assert main([*command, "--seed", "3"]) == 0
    file, edits = tmp_path / "more.jsonl", tmp_path / "out"
    file.write_text('{"prompt": "Town of 9?", "target_new": "c", "id": "e9"}\n')
    on = ["edit", "--model", str(edits), "--requests", str(file), "--output", str(tmp_path / "on"), "--device", "cpu"]
    for changes, message in (
        (["--strategy", "grace"], "--strategy: got grace, the edits are by wise"),
        (["--set", "steps=9"], "--set steps: got 9, the edits are made with 8"),
        (["--seed", "4"], "--seed: got 4, the edits are made with 3"),
    ):
        assert main([*on, *changes]) == 2
        text = capsys.readouterr().err
        assert message in text and "choose another --model" in text
    assert main(on) == 0
    for folder, count in ((edits, 3), (tmp_path / "on", 4)):
        capsys.readouterr()
        assert main(["edit", "--output", str(folder), "--list"]) == 0
        assert f"{count} active edits" in capsys.readouterr().out


@pytest.mark.kill
def test_two_commands_at_once_lose_no_edit(command, tmp_path):
    slow = [o.replace("steps=8", "steps=100") for o in command] + ["stop_loss=0.0"]
    started = [
        subprocess.Popen([sys.executable, "-m", "clkit.cli", *slow], stderr=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=400)[1] for process in started]
    codes = [process.returncode for process in started]
    refused = ["another process is editing here" in e for e in errors]
    assert 0 in codes, "the second is refused, or comes when all is done"
    assert all(code == 0 or busy for code, busy in zip(codes, refused, strict=True))
    assert [e["id"] for e in Journal.open(tmp_path / "out" / "journal.jsonl").entries] == ["e0", "e1", "e2"]


@pytest.mark.kill
def test_a_killed_command_resumes(command, tmp_path):
    journal = tmp_path / "out" / "journal.jsonl"
    slow = [o.replace("steps=8", "steps=400") for o in command] + ["stop_loss=0.0"]
    process = subprocess.Popen([sys.executable, "-m", "clkit.cli", *slow], env=os.environ, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and not (journal.is_file() and journal.read_text().count("\n")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = Journal.open(journal).entries
    assert 1 <= len(done) <= 3
    assert main(slow) == 0
    assert [e["id"] for e in Journal.open(journal).entries] == ["e0", "e1", "e2"]
