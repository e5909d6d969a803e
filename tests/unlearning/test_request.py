"""The request file: what is read, and that everything wrong with it is told at once and without its contents."""

import json

import pytest
from people import request

from clkit.errors import RequestError
from clkit.unlearning.request import read_requests

GOOD = request({"record_ids": ["a", "b"]}, unit="subject", deadline="2026-04-01", dry_run=False)


def test_one_request_a_list_and_json_lines_read_the_same(tmp_path):
    other = {**GOOD, "request_id": "R-2"}
    files = {"one.json": json.dumps(GOOD), "list.json": json.dumps([GOOD, other]),
             "lines.jsonl": f"{json.dumps(GOOD)}\n\n{json.dumps(other)}\n"}  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = [read_requests(tmp_path / name) for name in files]
    assert [len(f) for f in found] == [1, 2, 2]
    assert {f[0].digest for f in found} == {found[0][0].digest}
    first = found[0][0]
    assert (first.scope, first.values, first.unit, first.dry_run) == ("record_ids", ("a", "b"), "subject", False)


WRONG = {
    "schema": (2, "must be 1"),
    "request_id": ("two words", "no name, no address"),
    "requester": ("ada@example.org", "no name, no address"),
    "received_at": ("2026-03-01", "time with its zone"),
    "legal_basis": (" ", "must be a text"),
    "deadline": ("soon", "must be a date"),
    "unit": ("person", "record or subject"),
    "dry_run": ("no", "true or false"),
    "scope": ({"record_ids": ["a"], "subject_ids": ["b"]}, "exactly one of"),
    "scopes": (1, "Did you mean 'scope'"),
}


def test_every_problem_is_told_at_once_with_its_place(write):
    with pytest.raises(RequestError) as caught:
        read_requests(write({**GOOD, **{key: value for key, (value, _) in WRONG.items()}}))
    text = str(caught.value)
    assert len(caught.value.problems) == len(WRONG)
    assert all(what in text for _, what in WRONG.values())
    assert "ada@example" not in text and "two words" not in text


@pytest.mark.parametrize(
    ("scope", "what"),
    [
        ({"record_ids": []}, "with at least one"),
        ({"record_ids": ["a", "a"]}, "record_ids[1]: stands in the list twice"),
        ({"content_hashes": ["abc"]}, "content_hashes[0]: is not a SHA-256"),
        ({"predicate": {"field": "colour", "equals": "x"}}, "`field` (one of"),
        ({"predicate": {"field": "answer"}}, "nothing else"),
        ({"predicate": {"field": "answer", "equals": "x", "like": "y"}}, "nothing else"),
        ({"everything": True}, "exactly one of"),
        ("all", "exactly one of"),
        ({"record_ids": ["\ud83d"]}, "of whole characters"),
        ({"predicate": {"field": "answer", "equals": "\ud83d"}}, "(a text)"),
    ],
)
def test_a_wrong_scope_is_a_clear_error(scope, what, write):
    with pytest.raises(RequestError) as caught:
        read_requests(write(request(scope)))
    assert what in str(caught.value)


def test_a_file_is_one_batch_with_ids_used_once_and_one_dry_run(write, tmp_path):
    with pytest.raises(RequestError, match=r"\[1\]\.request_id: is used twice(.|\n)*mixes dry_run"):
        read_requests(write(GOOD, {**GOOD, "dry_run": True}))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(RequestError, match="holds no request"):
        read_requests(tmp_path / "empty.jsonl")
    separated = json.dumps(GOOD | {"legal_basis": "one\u2028two"}, ensure_ascii=False)
    (tmp_path / "separated.jsonl").write_text(separated + "\n")
    assert read_requests(tmp_path / "separated.jsonl")[0].legal_basis == "one\u2028two"
    (tmp_path / "bad.jsonl").write_text('{"a": \n[]\n')
    with pytest.raises(RequestError, match=r"bad\.jsonl:1: is not JSON(.|\n)*bad\.jsonl:2: is not an object"):
        read_requests(tmp_path / "bad.jsonl")
    with pytest.raises(RequestError, match="can't be read"):
        read_requests(tmp_path / "absent.json")


def test_half_of_a_surrogate_pair_is_refused_before_it_could_break_the_certificate(write):
    with pytest.raises(RequestError, match="legal_basis: must be a text of whole characters"):
        read_requests(write(GOOD | {"legal_basis": "Art. 17 \ud83d"}))


def test_json_lines_may_be_called_so_in_capitals(tmp_path):
    file = tmp_path / "REQUESTS.JSONL"
    file.write_text(f"{json.dumps(GOOD)}\n{json.dumps(GOOD | {'request_id': 'R-2'})}\n")
    assert [r.request_id for r in read_requests(file)] == [GOOD["request_id"], "R-2"]


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "request.json").write_text(json.dumps(request({"record_ids": ["a"]})), encoding="utf-8-sig")
    assert read_requests(tmp_path / "request.json")[0].values == ("a",)


def test_a_line_separator_within_a_text_ends_no_line(tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps(request({"subject_ids": ["Ada\u2028Quill"]}), ensure_ascii=False) + "\n")
    assert read_requests(file)[0].values == ("Ada\u2028Quill",)


@pytest.mark.parametrize("outer", [False, True])
def test_a_key_that_stands_twice_is_refused_since_one_would_be_lost(outer, tmp_path):
    text, file = json.dumps(request({"record_ids": ["b"]})), tmp_path / "request.json"
    one = '{"record_ids": ["b"]}'
    file.write_text(
        text.replace(one, one + ', "scope": {"record_ids": ["a"]}' if outer else '{"record_ids": ["a"], ' + one[1:])
    )
    with pytest.raises(RequestError, match="same key twice"):
        read_requests(file)
