"""A process that is SIGKILLed at each state of a request goes on from there, and ends where one ends that never was."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from people import PEOPLE, digits, request, run

from clkit.unlearning.ledger import STATES, Ledger

PRELOAD = ["torch", "clkit.api", "clkit.cli", "clkit.tasks.digits", "clkit.unlearning.command", "sklearn.datasets"]
LENIENT = ["--max-utility-loss", "99", "--max-membership", "1", "--max-extraction", "1", "--keep-near-duplicates"]


def _serve(run_dir: str, file: str, log: str, dies_at: str | None, when: str, method: str = "retrain") -> None:
    """The process: `clkit unlearn`, dying just before or just after the ledger says that a state is reached.

    With ``dies_at="hold"`` it waits in its first step until the file called ``when`` is there.
    """
    import torch

    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    plain = Ledger._remember

    def dying(self, job, state, reason):
        plain(self, job, state, reason)
        if state == dies_at:
            if when == "after":
                self._database.execute("COMMIT")
            os.kill(os.getpid(), signal.SIGKILL)

    Ledger._remember = dying  # type: ignore[method-assign]
    if dies_at == "step":
        from clkit.strategy import Strategy

        taken = 0

        def after_backward(self) -> None:
            nonlocal taken
            taken += 1
            if taken == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        Strategy.after_backward = after_backward  # type: ignore[method-assign]
    if dies_at == "hold":
        from clkit.strategy import Strategy

        def wait(self) -> None:
            Path(f"{when}.waiting").touch()
            while not Path(when).exists():
                time.sleep(0.05)

        Strategy.after_backward = wait  # type: ignore[method-assign]
    from clkit.cli import main

    sys.exit(main(["unlearn", "--run", run_dir, "--request", file, "--method", method, *LENIENT]))


def outcome(run_dir: Path) -> tuple:
    (path,) = (run_dir.parent / "unlearning").glob("*/certificate.json")
    content = json.loads(path.read_text())
    new = path.parent / content["new_run"]["path"]
    (weights,) = [f.read_bytes() for f in (new / "export").glob("*.safetensors")]
    counts = {name: part["count"] for name, part in content["records"].items()}
    return counts, json.loads((new / "matrix.json").read_text())["matrix"], weights, content["verification"]


@pytest.fixture
def context():
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)
    return found


@pytest.fixture
def compare(tmp_path, context):
    """Serve a request in one go, and again in a folder of its own with a kill at each of ``places``."""

    def compare(content, scope, method: str, places: list[tuple[str, str]]) -> tuple:
        log, found = tmp_path / "log.txt", {}
        for name in ("whole", "killed"):
            folder = tmp_path / name
            folder.mkdir()
            run_dir = run({**content, "output_dir": str(folder / "runs" / "first")}, folder)
            file = folder / "request.json"
            file.write_text(json.dumps(request(scope)))
            for dies_at, when in [*(places if name == "killed" else []), (None, "")]:
                arguments = (str(run_dir), str(file), str(log), dies_at, when, method)
                process = context.Process(target=_serve, args=arguments)
                process.start()
                process.join(300)
                assert process.exitcode == (0 if dies_at is None else -signal.SIGKILL), (dies_at, when, log.read_text())
            ledger = Ledger(run_dir.parent / "unlearning")
            ((job,),) = ledger._rows("SELECT key FROM jobs")
            found[name] = (*outcome(run_dir), [s for s, _, _ in ledger.history(job)], len(ledger.tombstones()))
            ledger.close()
        assert found["killed"] == found["whole"]
        return found["whole"]

    return compare


@pytest.mark.kill
@pytest.mark.parametrize(
    ("method", "whens"),
    [("retrain", ("before", "after")), ("exact_replay", ("after",)), ("gradient_difference", ("after",))],
)
def test_a_kill_before_and_after_every_state_leaves_no_trace(method, whens, tmp_path, digit_ids, compare):
    places = [(state, when) for state in STATES for when in whens]
    places.insert(3 * len(whens), ("step", ""))  # between selected and trained
    content = digits(tmp_path, checkpoint={"every_steps": 2, "keep": 100})
    whole = compare(content, {"record_ids": digit_ids[:3]}, method, places)
    assert whole[4] == list(STATES) and whole[5] == 3


@pytest.mark.kill
@pytest.mark.parametrize("method", ["sisa", "dp2unlearning"])
def test_a_language_model_unlearned_from_shards_or_its_protected_base_survives_kills(
    method, people_content, tmp_path, compare
):
    train = {**people_content["train"], "epochs": 4}
    content = {**people_content, "train": train, "checkpoint": {"every_steps": 1, "keep": 100}}
    strategy = {"name": "ties"}
    if method == "dp2unlearning":
        base = tmp_path / "protected" / "m0"  # one for both: its noise can't be drawn again
        base.parent.mkdir()
        private = {"name": "private", "noise_multiplier": 4.0, "accountant": "rdp", "unit": "record"}
        run({**people_content, "output_dir": str(base), "engine": private}, base.parent)
        strategy = {"name": "dp2unlearning", "base": str(base)}
    places = [("selected", "after"), ("step", ""), ("trained", "after"), ("verified", "after")]
    whole = compare({**content, "strategy": strategy}, {"subject_ids": [PEOPLE[0]]}, method, places)
    assert whole[4] == list(STATES) and whole[5] >= 3


@pytest.mark.kill
def test_a_second_process_is_refused_while_one_serves(tmp_path, digit_ids, context):
    run_dir = run(digits(tmp_path), tmp_path)
    file, release, logs = tmp_path / "request.json", tmp_path / "go", [tmp_path / "a.txt", tmp_path / "b.txt"]
    file.write_text(json.dumps(request({"record_ids": digit_ids[:3]})))
    first = context.Process(target=_serve, args=(str(run_dir), str(file), str(logs[0]), "hold", str(release)))
    first.start()
    while not Path(f"{release}.waiting").exists():
        assert first.is_alive(), logs[0].read_text()
        time.sleep(0.05)
    second = context.Process(target=_serve, args=(str(run_dir), str(file), str(logs[1]), None, ""))
    second.start()
    second.join(300)
    release.touch()
    first.join(300)
    assert second.exitcode == 2 and "another process is serving a request" in logs[1].read_text()
    assert first.exitcode == 0, logs[0].read_text()
    assert outcome(run_dir)[0]["forgotten"] == 3
