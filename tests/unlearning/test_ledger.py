"""The ledger: states in order, failures, tombstones, one process, damage."""

import sqlite3

import pytest

from clkit.errors import CheckpointError, RequestError
from clkit.tasks import build_tasks
from clkit.unlearning.ledger import FILE, STATES, Ledger, find_folder
from clkit.unlearning.records import records
from clkit.unlearning.tombstones import Tombstones, in_force


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path / "unlearning")
    yield made
    made.close()


def test_a_job_goes_through_the_states_in_order_and_no_other_way(ledger):
    ledger.receive("job", [("R-1", "d1")])
    with pytest.raises(CheckpointError, match="can't become trained"):
        ledger.advance("job", "trained")
    for state in STATES[1:]:
        ledger.advance("job", state, **{state: 1})
    assert ledger.state("job") == ("certified", None, dict.fromkeys(STATES[1:], 1))
    with pytest.raises(CheckpointError, match="can't become"):
        ledger.advance("job", "certified")
    with pytest.raises(CheckpointError, match="None can't become"):
        ledger.advance("unknown", "validated")
    assert [state for state, _, _ in ledger.history("job")] == list(STATES)


def test_a_failed_job_begins_again_and_its_history_stays(ledger):
    ledger.receive("job", [("R-1", "d1")])
    ledger.fail("job", "no reason")
    assert ledger.state("job")[:2] == ("failed", "no reason")
    ledger.receive("job", [("R-1", "d1")])
    assert ledger.state("job")[:2] == ("received", None)
    assert [state for state, _, _ in ledger.history("job")] == ["received", "failed", "received"]


def test_a_transition_and_its_tombstones_are_written_together_or_not_at_all(ledger):
    ledger.receive("job", [("R-1", "d1")])
    ledger.advance("job", "validated")
    with pytest.raises(TypeError):
        ledger.advance("job", "selected", [("a", "b")], broken=object())
    assert ledger.tombstones() == [] and ledger.state("job")[0] == "validated"
    ledger.advance("job", "selected", [("a", "b"), ("a", "b"), ("c", "d")])
    assert [(i, c) for _, i, c in ledger.tombstones()] == [("a", "b"), ("c", "d")]
    assert len(ledger.tombstones(upto=1)) == 1


def test_a_request_counts_as_served_once_records_were_selected(ledger):
    ledger.receive("one", [("R-1", "d1")])
    ledger.advance("one", "validated")
    assert ledger.served("R-1", "two") is None
    ledger.advance("one", "selected")
    assert ledger.served("R-1", "two") == ("one", "d1") and ledger.served("R-1", "one") is None
    ledger.fail("one", "gate")
    assert ledger.served("R-1", "two") is None, "it may be tried again in another way"


def test_a_second_process_is_refused(ledger, tmp_path):
    other = Ledger(tmp_path / "unlearning")
    with ledger.serving(), pytest.raises(RequestError, match="another process is serving"), other.serving():
        pass
    with other.serving():
        assert other.key == ledger.key, "made once"
    other.close()


def test_a_damaged_or_newer_ledger_stops_everything(tmp_path):
    folder = tmp_path / "unlearning"
    Ledger(folder).close()
    database = sqlite3.connect(folder / FILE)
    database.execute("UPDATE meta SET value = '9' WHERE name = 'schema'")
    database.commit()
    database.close()
    with pytest.raises(CheckpointError, match="schema 9"):
        in_force(tmp_path / "run")
    (folder / FILE).write_bytes(b"not a database, but long enough to look at" * 40)
    with pytest.raises(CheckpointError, match="forgotten records could come back"):
        in_force(tmp_path / "run")


def test_the_nearest_ledger_above_a_run_holds_or_the_one_that_is_named(tmp_path, monkeypatch):
    assert find_folder(tmp_path / "runs" / "a") is None
    Ledger(tmp_path / "unlearning").close()
    assert find_folder(tmp_path / "runs" / "deep" / "a") == tmp_path / "unlearning"
    Ledger(tmp_path / "runs" / "unlearning").close()
    assert find_folder(tmp_path / "runs" / "deep" / "a") == tmp_path / "runs" / "unlearning"
    monkeypatch.setenv("CLKIT_LEDGER", str(tmp_path / "central"))
    assert find_folder(tmp_path / "runs" / "a") == find_folder(None) == tmp_path / "central"


def test_a_tombstone_holds_for_the_id_and_for_the_content_and_up_to_its_serial(ledger, tmp_path):
    tasks = build_tasks("digits", {"train_limit": 3, "eval_limit": 1})
    first, second, third = list(records(tasks))[:3]
    hashes = Tombstones(ledger.key)
    ledger.receive("job", [])
    ledger.advance("job", "validated")
    ledger.advance("job", "selected", [hashes.hashes(first), hashes.hashes(second)])
    stones = in_force(tmp_path / "run")
    assert stones.places(tasks) == {first.place, second.place} and stones.facts() == {"tombstones": {stones.name: 2}}
    assert stones.covers(third._replace(id=first.id)), "a corrected text under the same id"
    assert stones.covers(first._replace(id="new")), "the same text under a new id"
    assert not stones.covers(third)
    for began in ({"tombstones": {stones.name: 1}}, {"tombstones": 1}):
        assert in_force(tmp_path / "run", began).places(tasks) == {first.place}
    assert in_force(tmp_path / "run", {}).apply(tasks) is tasks and Tombstones().facts() == {}
    assert first.id.encode() not in (tmp_path / "unlearning" / FILE).read_bytes()


def test_every_ledger_above_a_run_holds_and_the_one_that_is_named(tmp_path, monkeypatch):
    """A ledger of a sweep's own, made before the one further up, must not hide what that one says."""
    tasks = build_tasks("digits", {"train_limit": 3, "eval_limit": 1})
    chosen = list(records(tasks))[:3]
    run_dir = tmp_path / "runs" / "sweep" / "a"
    folders = [tmp_path / "runs" / "sweep" / "unlearning", tmp_path / "unlearning", tmp_path / "central"]
    facts = [in_force(run_dir).facts()]
    for folder, record in zip(folders, chosen, strict=True):
        if folder.name == "central":
            monkeypatch.setenv("CLKIT_LEDGER", str(folder))
        made = Ledger(folder)
        made.receive("job", [])
        made.advance("job", "validated")
        made.advance("job", "selected", [Tombstones(made.key).hashes(record)])
        made.close()
        facts.append(in_force(run_dir).facts())
    assert in_force(run_dir).places(tasks) == {r.place for r in chosen}
    for count, began in enumerate(facts):
        known = {r.place for r in chosen[:count]}
        assert in_force(run_dir, began).places(tasks) == known, "a run sees its data as they were when it began"
