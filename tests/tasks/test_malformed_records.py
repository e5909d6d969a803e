"""Malformed data: one DataError with every problem, and nothing is returned."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clkit.errors import DataError
from clkit.tasks import build_tasks

GOOD = '{"prompt": "p", "answer": "a"}'


def problems_of(files: list[Path], **config: object) -> list[str]:
    with pytest.raises(DataError) as error:
        build_tasks("jsonl", {"tasks": [str(f) for f in files], **config})
    return [f"{Path(p.where).name}: {p.what}" for p in error.value.problems]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"prompt": "p", "answer": }', "not valid JSON: Expecting value at column 27"),
        ('{"prompt": "p", "answer": "a"', "not valid JSON"),
        ('{"prompt": "p", "prompt": "q", "answer": "a"}', "an object has the key 'prompt' more than once"),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
        ('{"prompt": "p", "answer": ' + "9" * 5000 + "}", "not valid JSON: Exceeds the limit"),
        ('["p", "a"]', "not a JSON object (got list)"),
        ('{"prompt": "p"}', "field 'answer' is missing"),
        ('{"prompt": "p", "anwser": "a"}', "field 'answer' is missing. Did you mean 'anwser'?"),
        ('{"prompt": "p", "answer": null}', "'answer' is empty"),
        ('{"prompt": "p", "answer": "  "}', "'answer' is empty"),
        ('{"prompt": 3, "answer": "a"}', "'prompt' must be text (got int)"),
        ('{"prompt": "p", "answer": "a", "id": 1.5}', "'id' must be text (got float)"),
        ('{"prompt": "p", "answer": "a", "options": "a"}', "must have at least two different texts"),
        ('{"prompt": "p", "answer": "a", "options": {}}', "'options' must be a list of texts (got dict)"),
        ('{"prompt": "p", "answer": "a", "options": ["a", "a"]}', "must have at least two different texts"),
        ('{"prompt": "p", "answer": "a", "options": ["a", 2]}', "'options' must be text (got int)"),
        ('{"prompt": "p", "answer": "c", "options": ["a", "b"]}', "the answer 'c' is not among 'options'"),
        ('{"prompt": "p", "answer": "a", "options": "[a"}', "starts like a JSON array but is none"),
        ('{"prompt": "\\ud83d", "answer": "a"}', "half of a surrogate pair"),
        (json.dumps({"prompt": "p" * 51, "answer": "a"}), "'prompt' has 51 characters (max_chars is 50)"),
    ],
)
def test_a_bad_line_is_named_with_its_file_line_and_reason(tmp_path, line, what):
    file = tmp_path / "x.jsonl"
    file.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    found = problems_of([file], max_chars=50)
    assert len(found) == 1 and found[0].startswith("x.jsonl:3: ") and what in found[0]


def test_a_bad_element_of_an_array_is_named_with_its_own_line(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(f'[{GOOD},\n\n{{"prompt": "p", "answer": "a", "answer": "b"}}]')
    assert problems_of([file]) == [
        "x.json:3: not valid JSON: an object has the key 'answer' more than once at column 1"
    ]


def test_all_problems_of_all_files_come_in_one_error_with_twenty_shown(tmp_path):
    files = []
    for name in "ab":
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text(f"{GOOD}\n" + "{}\n" * 15)
    with pytest.raises(DataError) as error:
        build_tasks("jsonl", {"tasks": [str(f) for f in files]})
    assert len(error.value.problems) == 60  # two missing fields in each of 30 lines
    assert str(error.value).count("is missing") == 20 and "... and 40 more" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("x.jsonl", b"", "x.jsonl: has no records"),
        ("x.csv", b"prompt,answer\n", "x.csv: has no records"),
        ("x.json", b"[]", "x.json: has no records"),
        ("x.jsonl", b'{"prompt": "p", "answer": "a"}\n{"prompt": "\xff"}', "x.jsonl:2: not UTF-8 (byte 0xff)"),
        ("x.csv", b"prompt,answer\np,a\np,a,b\n", "x.csv:3: more cells than the header has columns (2)"),
        ("x.csv", b"prompt,answer,answer\np,a,b\n", "x.csv:1: the header has 2 columns 'answer'; give each column"),
        ("x.csv", b"prompt,answer\np,a\np,\n", "x.csv:3: 'answer' is empty"),
        ("x.csv", b'prompt,answer\np,a\n"p', "x.csv:3: not valid CSV: unexpected end of data"),
        ("x.json", b'[\n{"prompt": "p", "answer": "a"},\n{"prompt": "p"}\n]', "x.json:3: field 'answer' is missing"),
        ("x.json", b'[{"prompt": "p", "answer": "a"}\n', "x.json:2: not valid JSON: expected ',' or ']' at column 1"),
        ("x.json", b'[{"prompt": "p", "answer": "a"}]\n]', "x.json:2: not valid JSON: more text after the array"),
        ("x.json", b'[{"prompt": "p", "answer": "a"},\n]', "x.json:2: not valid JSON: Expecting value"),
        ("x.json", b'{"data": [\n{"prompt": "p", "answer": "a"}\n]}', "x.json: is one object; give an"),
        ("x.parquet", b"PAR1 but not really", "x.parquet: not a readable parquet file"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, found):
    file = tmp_path / name
    file.write_bytes(content)
    assert any(p.startswith(found) for p in problems_of([file])), problems_of([file])


def test_a_byte_order_mark_is_no_problem(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\n{GOOD}".encode())
    assert len(build_tasks("jsonl", {"tasks": [str(file)]})[0].train) == 1


def test_cells_of_a_csv_may_be_as_long_as_max_chars_says(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("prompt,answer\n" + "".join(f"{word * 200_000},a\n" for word in "pq"))
    before = csv.field_size_limit()
    assert problems_of([file])[0] == "x.csv:2: 'prompt' has 200000 characters (max_chars is 100000)"
    assert len(build_tasks("jsonl", {"tasks": [str(file)], "max_chars": 200_000})[0].train) == 1
    assert csv.field_size_limit() == before


def test_duplicate_given_ids_are_errors_over_all_files_but_can_be_ignored(tmp_path):
    files = []
    for name in "ab":
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text(
            "".join(json.dumps({"prompt": f"{name}{i}", "answer": "a", "id": i}) + "\n" for i in (1, 2))
        )
    files[0].write_text(files[0].read_text() + json.dumps({"prompt": "x", "answer": "a", "id": "1"}))
    found = problems_of(files)
    assert [p.partition(",")[0] for p in found] == [
        "a.jsonl:3: duplicate id '1'",
        "b.jsonl:1: duplicate id '1'",
        "b.jsonl:2: duplicate id '2'",
    ]
    assert "a.jsonl:1" in found[0]
    assert len(build_tasks("jsonl", {"tasks": [str(f) for f in files], "id_field": ""})) == 2


def test_an_id_in_train_and_eval_is_an_error(tmp_path):
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_text(json.dumps({"prompt": part, "answer": "a", "id": "k"}))
    assert "duplicate id 'k'" in problems_of([tmp_path])[0]


def test_one_record_is_too_few_to_hold_some_out(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(GOOD)
    assert problems_of([file]) == ["x.jsonl: too few records to hold some out for evaluation"]


def test_a_class_in_two_tasks_is_told_once_for_each_further_task(tmp_path):
    files = []
    for name in "abc":
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({"prompt": f"{name}{i}", "label": "k"}) + "\n" for i in range(4)))
    found = problems_of(files, kind="classification")
    assert len(found) == 2
    assert all("class 'k' is already in task 'a'" in p for p in found)


def test_a_record_to_classify_needs_a_class(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "p"}\n')
    assert problems_of([file], kind="classification") == ["x.jsonl:1: has neither 'label' nor 'answer'"]


def test_strict_labels_say_why_a_record_gets_no_options(tmp_path):
    file = tmp_path / "x.jsonl"
    rows = [
        {"prompt": "p", "answer": "a", "label": "a"},
        {"prompt": "q", "answer": "b", "label": "b"},
        {"prompt": "r", "answer": "b!", "label": "b"},
        {"prompt": "s", "answer": "b"},
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = problems_of([file], options="labels")
    assert sorted(found) == [
        "x.jsonl:3: has no options and can't get them from the labels: its answer is not its label 'b'",
        "x.jsonl:4: has no options and can't get them from the labels: there is no 'label'",
    ]


def test_an_edit_needs_its_target(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "p", "locality_prompt": 3}\n')
    assert problems_of([file], kind="edit") == [
        "x.jsonl:1: field 'target_new' is missing.",
        "x.jsonl:1: 'locality_prompt' must be text (got int)",
    ]


@given(
    st.sampled_from(["x.jsonl", "x.json", "x.csv"]),
    st.binary(max_size=80)
    | st.text(max_size=80).map(str.encode)
    | st.from_regex(r'[\[\]{}",:a-z0 \n]*').map(str.encode),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_bytes_are_the_only_error_is_a_data_error(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError):
        build_tasks("jsonl", {"tasks": [str(file)]})
