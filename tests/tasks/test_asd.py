"""Answer-style diversification: shares, balance, right letters, provenance, untouched rest and untouched test sets."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from clkit import build, resolve
from clkit.errors import ConfigError
from clkit.tasks.asd import diversify, native_style
from clkit.tasks.base import TextRecord

LABELS = ("World", "Sports", "Business", "Science", "Art")


def records(count=100, labels=LABELS):
    return [TextRecord(f"Topic of text {i}?", labels[i % len(labels)], f"r{i}", tuple(labels)) for i in range(count)]


def explain(record, style):
    return f"{record.answer}, for a reason ({style})"


def by_style(given, **options):
    made, provenance = diversify(given, **options)
    return (
        made,
        provenance,
        {
            s: [r for r in made if provenance.get(r.id, {}).get("style") == s]
            for s in {p["style"] for p in provenance.values()}
        },
    )


def test_the_share_is_split_evenly_over_the_styles_that_can_be_made():
    _, provenance = diversify(records(), 0.2, 0)
    assert Counter(p["style"] for p in provenance.values()) == {"yes-no": 10, "choice": 10}
    _, provenance = diversify(records(), 0.2, 0, explain)
    assert Counter(p["style"] for p in provenance.values()) == {"yes-no": 5, "choice": 5, "brief": 5, "detail": 5}


def test_the_rest_is_untouched_and_in_place_and_every_change_names_its_source():
    given = records()
    made, provenance = diversify(given, 0.2, 0)
    assert len(made) == len(given) and len({r.id for r in made}) == len(made)
    for before, after in zip(given, made, strict=True):
        if after.id in provenance:
            assert provenance[after.id]["source_id"] == before.id
            assert after.prompt.startswith(before.prompt) and after != before
        else:
            assert after is before


def test_yes_and_no_are_balanced_and_true():
    _, _, styles = by_style(records(), fraction=0.4, seed=1)
    answers = Counter(r.answer for r in styles["yes-no"])
    assert answers == {"yes": 10, "no": 10}
    originals = {r.id: r.answer for r in records()}
    for record in styles["yes-no"]:
        proposed = record.prompt.split("Proposed answer: ")[1].split("\n")[0]
        assert (proposed == originals[record.id.split("#")[0]]) == (record.answer == "yes")
        assert proposed in LABELS


def test_the_letter_always_points_at_the_right_answer_and_letters_vary():
    _, _, styles = by_style(records(), fraction=0.8, seed=2)
    originals = {r.id: r.answer for r in records()}
    for record in styles["choice"]:
        lines = dict(line.split(". ", 1) for line in record.prompt.split("\n")[1:-1])
        assert lines[record.answer] == originals[record.id.split("#")[0]]
        assert len(set(lines.values())) == 4 and tuple(lines) == record.options
    assert len({r.answer for r in styles["choice"]}) == 4


def test_it_is_a_function_of_the_seed_and_zero_changes_nothing():
    assert diversify(records(), 0.3, 5) == diversify(records(), 0.3, 5)
    assert diversify(records(), 0.3, 5) != diversify(records(), 0.3, 6)
    assert diversify(records(), 0.0, 5) == (records(), {})
    assert diversify([], 0.3, 5) == ([], {})


def test_a_task_is_not_converted_into_its_own_style():
    yes_no = records(labels=("yes", "no"))
    assert native_style(yes_no) == "yes-no"
    _, provenance = diversify(yes_no, 0.2, 0)
    assert Counter(p["style"] for p in provenance.values()) == {"choice": 20}
    letters = records(labels=("A", "B"))
    assert native_style(letters) == "choice"
    assert diversify(letters, 0.2, 0) == (letters, {})
    _, provenance = diversify(letters, 0.2, 0, explain)
    assert Counter(p["style"] for p in provenance.values()) == {"brief": 10, "detail": 10}


def test_a_record_without_an_explanation_stays_as_it_is():
    given = records(labels=("A", "B"))
    made, provenance = diversify(given, 0.5, 0, lambda record, style: None)
    assert made == given and provenance == {}


def test_files_are_converted_in_training_only_with_provenance(tmp_path):
    rows = [{"prompt": f"text {i}", "answer": LABELS[i % 5], "label": LABELS[i % 5]} for i in range(100)]
    (tmp_path / "news.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def task(**options):
        tasks = {"source": "jsonl", "root": str(tmp_path), "tasks": ["news.jsonl"], "eval_fraction": 0.2, **options}
        return build.make_tasks(resolve.validate({"tasks": tasks}))[0]

    plain, converted = task(), task(asd=0.25)
    assert converted.eval.records == plain.eval.records and converted.metric == plain.metric
    changed = [r.id for r in converted.train.records if r not in plain.train.records]
    assert sorted(changed) == sorted(converted.metadata["asd"]) and len(changed) == 20
    with pytest.raises(ConfigError, match=r"tasks\.asd: converts answers of text tasks"):
        task(kind="edit", asd=0.25)
