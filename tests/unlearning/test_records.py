"""Selection, what is left, the manifest's proof, and near-duplicates."""

import json

import pytest
import torch
from people import PEOPLE, request, rows

from clkit.errors import RequestError
from clkit.tasks.base import LabelledExamples, Task, TaskSequence, TextExamples, TextRecord
from clkit.unlearning.duplicates import near_duplicates
from clkit.unlearning.manifest import Manifest, merkle_root
from clkit.unlearning.records import content_hash, records, select, without
from clkit.unlearning.request import read_requests


def sequence(metadata=None) -> TaskSequence:
    made = [TextRecord(r["prompt"], r["answer"], r["id"], subject=r["subject"]) for r in rows()]
    parts = [made[:6], made[6:]]
    return TaskSequence(
        [
            Task(f"t{t}", TextExamples(tuple(p[:2] + p[3:])), TextExamples((p[2],)), "text", "exact-match",
                 metadata=metadata or {})
            for t, p in enumerate(parts)
        ]
    )  # fmt: skip


def chosen(write, scope, **changes):
    known = list(records(sequence()))
    places = set().union(*select(read_requests(write(request(scope, **changes))), known).values())
    return sorted(r.id for r in known if r.place in places)


def test_each_scope_selects_its_records(write):
    ada = ["Ada-0", "Ada-1", "Ada-2"]
    assert chosen(write, {"record_ids": ["Ada-0", "Di-1"]}) == ["Ada-0", "Di-1"]
    assert chosen(write, {"subject_ids": [PEOPLE[0]]}) == ada
    assert chosen(write, {"predicate": {"field": "answer", "equals": "kiwi orchard 10"}}) == ["Ada-1"]
    one = rows()[0]
    digest = content_hash(prompt=f"  {one['prompt']} ", answer=one["answer"])
    assert chosen(write, {"content_hashes": [digest]}) == ["Ada-0"]
    assert chosen(write, {"record_ids": ["Ada-0"]}, unit="subject") == ada


@pytest.mark.parametrize(
    ("scope", "what"),
    [
        ({"record_ids": ["Ada-0", "Zed-9", "Yan-3"]}, r"record_ids\[1\]: is not in(.|\n)*record_ids\[2\]"),
        ({"subject_ids": ["Nobody"]}, r"subject_ids\[0\]: is not in"),
        ({"predicate": {"field": "answer", "equals": "nothing"}}, "selects no record"),
        ({"subject_ids": list(PEOPLE)}, "every training record"),
        ({"record_ids": ["Ada-2"]}, "only records that were scored"),
    ],
)
def test_what_cant_be_selected_is_an_error_that_names_no_one(scope, what, write):
    with pytest.raises(RequestError, match=what) as caught:
        chosen(write, scope)
    assert not any(name in str(caught.value) for name in ("Zed", "Nobody", *PEOPLE))


def test_what_is_left_has_all_other_records_in_order_and_the_input_is_untouched(write):
    tasks = sequence()
    known = list(records(tasks))
    gone = {r.place for r in known if r.fields["subject"] == PEOPLE[1]}
    left = without(tasks, gone)
    assert [r.id for r in records(left)] == [r.id for r in known if r.place not in gone]
    assert len(list(records(tasks))) == 12
    assert without(tasks, set()) is tasks


def test_a_task_without_training_records_is_gone_and_one_that_cant_be_scored_is_an_error():
    tasks = sequence()
    known = list(records(tasks))
    first = {r.place for r in known if r.place.task == "t0" and r.place.part == "train"}
    assert [t.name for t in without(tasks, first)] == ["t1"]
    with pytest.raises(RequestError, match="no record left to score it"):
        without(tasks, {r.place for r in known if r.place.part == "eval"})


def test_records_whose_answers_stand_in_others_cant_be_left_out():
    tasks = sequence({"asd": {"Ada-1": {"style": "choice", "source_id": "Ada-9"}}})
    known = list(records(tasks))
    assert {r.id for r in known if r.place == ("t0", "train", 1)} == {"Ada-9"}, "converted records keep their origin"
    with pytest.raises(RequestError, match=r"tasks\.asd"):
        without(tasks, {known[0].place})


def test_images_are_told_apart_by_their_pixels():
    pixels = torch.arange(12.0).view(3, 4)
    pixels[2] = pixels[0]
    examples = LabelledExamples(pixels, torch.tensor([0, 1, 0]), ["a", "b", "c"])
    tasks = TaskSequence([Task("t", examples, examples, "classification", "accuracy", (0, 1))])
    hashes = [r.content for r in records(tasks)]
    assert hashes[0] == hashes[2] != hashes[1]
    found = near_duplicates([next(records(tasks))], list(records(tasks))[1:3])
    assert [p.retained.id for p in found] == ["c"]


def test_the_merkle_root_is_that_of_rfc_6962():
    import hashlib

    def h(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()

    leaves = [bytes([i]) * 32 for i in range(3)]
    a, b, c = (h(b"\0" + leaf) for leaf in leaves)
    assert merkle_root([leaf.hex() for leaf in leaves]) == h(b"\1" + h(b"\1" + a + b) + c).hex()
    many = [f"{i:064x}" for i in range(9)]
    assert len({merkle_root(many[:n]) for n in range(10)} | {merkle_root(many[::-1])}) == 11


def test_the_manifest_finds_a_record_on_both_sides_missing_or_added():
    tasks = sequence()
    known = list(records(tasks))
    gone = {known[0].place, known[7].place}
    good = Manifest.of(known, list(records(without(tasks, gone))), gone, b"key")
    assert good.problems() == [] and Manifest.from_json(json.loads(json.dumps(good.to_json()))) == good
    assert (len(good.full), len(good.retained), len(good.forgotten)) == (12, 10, 2)
    assert len(Manifest(good.full, (*good.retained, good.forgotten[0]), good.forgotten).problems()) == 2
    assert len(Manifest(good.full, good.retained[1:], good.forgotten).problems()) == 1
    assert len(Manifest(good.full, (*good.retained, "0" * 64), good.forgotten).problems()) == 1
    assert Manifest.of(known, known, set(), b"other").full != good.full, "without the key a leaf tells nothing"
    with pytest.raises(ValueError, match="not a manifest"):
        Manifest.from_json({"full": [1]})


def test_near_duplicates_are_found_when_edited_or_quoted_and_not_when_merely_alike():
    said = {
        "old": ("Who runs the kiwi orchard at Lorne?", "Ada Quill has run it since 1987."),
        "edited": ("Who runs the Kiwi  Orchard at Lorne?", "Ada Quill has run it since 1988."),
        "quoted": (
            "Chat log",
            "Who runs the kiwi orchard at Lorne? Ada Quill has run it since 1987. Thanks, see you on Monday.",
        ),
        "alike": ("Who runs the steel bridge at Lorne?", "Bo Tamm has run it since 1950."),
        "short": ("x", "y"),
    }
    made = TextExamples(tuple(TextRecord(*texts, name) for name, texts in said.items()))
    old, *others = records(TaskSequence([Task("t", made, TextExamples(()), "text", "exact-match")]))
    found = near_duplicates([old], others)
    assert [p.retained.id for p in found] == ["edited", "quoted"] and all(p.forgotten is old for p in found)
    assert 0.6 < found[0].overlap < 1 and found[1].overlap == 1


def test_real_paraphrases_and_other_authors_are_told_apart(data_root):
    with (data_root / "tofu" / "full.jsonl").open() as file:
        facts = [json.loads(line) for line in file]
    made = tuple(TextRecord(r["question"], r["answer"], f"{r['row']}") for r in facts)
    known = list(records(TaskSequence([Task("tofu", TextExamples(made), TextExamples(()), "text", "rouge-l")])))
    found = near_duplicates(known[3980:], known[:3600])
    assert len(found) <= 36, "at most one in a hundred records of other authors looks like one of the last author"


def test_a_subject_is_one_however_its_name_is_encoded_and_spaced(write):
    names = ("Zo\u00eb Quill", "Zoe\u0308 Quill", " Zo\u00eb  Quill", "zo\u00eb quill", "Bo Tamm")
    made = tuple(TextRecord(f"Who is it {i}?", f"one {i}", f"r{i}", subject=name) for i, name in enumerate(names))
    task = Task("people", TextExamples(made), TextExamples(()), "text", "exact-match")
    known = list(records(TaskSequence([task])))
    for scope, unit in (
        ({"subject_ids": [names[1]]}, "record"),
        ({"record_ids": ["r2"]}, "subject"),
        ({"predicate": {"field": "subject", "equals": names[0]}}, "record"),
    ):
        (places,) = select(read_requests(write(request(scope, unit=unit))), known).values()
        assert {place.position for place in places} == {0, 1, 2}, scope
