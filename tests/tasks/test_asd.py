"""Answer-style diversification: shares, balance, right letters, provenance, untouched rest and untouched test sets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit import api, build, resolve
from clkit.errors import ConfigError, DataError
from clkit.tasks.asd import STYLES, diversify, first_sentence, given_explanations, listed_options, native_style
from clkit.tasks.base import TextRecord, content_id

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


def test_an_answer_with_a_full_stop_is_no_wrong_answer_beside_the_one_without():
    both = [TextRecord(f"q{i}", ["yes", "Yes.", "no", "No."][i % 4], f"r{i}") for i in range(40)]
    made, provenance = diversify(both, 1.0, 0)
    converted = [r for r in made if r.id in provenance]
    assert len(converted) == 40 and all(len(r.options or ()) == 2 for r in converted)
    cities = [TextRecord(f"q{i}", ["Paris", "Paris."][i % 2], f"r{i}") for i in range(10)]
    assert all(r.answer == "yes" for r in diversify(cities, 1.0, 0)[0] if r.options == ("yes", "no"))


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


# --- properties, over tasks of every native style ------------------------------------------------------------------
def choice_records(count, listed=lambda i: True):
    """Multiple choice with letters; the prompt lists what they stand for where ``listed`` says so."""
    made = []
    for i in range(count):
        shown = [LABELS[(i + k) % 5] for k in range(3)]
        lines = "\n".join(f"{letter}. {text}" for letter, text in zip("ABC", shown, strict=True))
        prompt = f"Question {i}?\nChoices:\n{lines}\nAnswer:" if listed(i) else f"Question {i}?"
        made.append(TextRecord(prompt, "ABC"[i % 3], f"r{i}", ("A", "B", "C"), None, "ABC"[i % 3]))
    return made


@st.composite
def worlds(draw):
    """Records of one task, explanations of some of them, a fraction and a seed."""
    count = draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["labels", "open", "yes-no", "letters", "mixed letters"]))
    if kind == "labels":
        made = records(count)
    elif kind == "open":  # answers of their own, without options; some differ in letter case only
        made = [
            TextRecord(f"Text {i}?", draw(st.sampled_from(["Rome", "rome", f"Town {i}"])), f"r{i}")
            for i in range(count)
        ]
    elif kind == "yes-no":
        made = records(count, ("yes", "no"))
    else:
        made = choice_records(count, lambda i: kind == "letters" or i % 3 == 0)
    known = draw(st.sets(st.integers(0, count - 1)))
    texts = {f"r{i}": f"First {i}. Then more." if i % 4 else "One sentence." for i in known}
    return made, texts, draw(st.floats(0, 1)), draw(st.integers(0, 3))


def convertible(record, style, native, texts, answers):
    """Whether the rules allow it, said once more and differently."""
    text = texts.get(record.id)
    if style in ("brief", "detail"):
        return text is not None and (style == "brief" or text != "One sentence.")
    if style == native:
        return False
    if native == "choice":
        return style != "choice" and "Choices:" in record.prompt
    others = {a.lower() for a in record.options or answers} - {record.answer.lower()}
    return (style == "choice" or (native == "short" and style == "yes-no")) and bool(others)


@settings(max_examples=150, deadline=None)
@given(worlds())
def test_every_conversion_is_right_whatever_the_task(world):
    given_records, texts, fraction, seed = world
    explain = given_explanations(texts) if texts else None
    made, provenance = diversify(given_records, fraction, seed, explain)
    assert (made, provenance) == diversify(given_records, fraction, seed, explain)
    assert len(made) == len(given_records) and len({r.id for r in made}) == len(made)
    native, answers = native_style(given_records), {r.answer for r in given_records}
    seen = Counter()
    for before, after in zip(given_records, made, strict=True):
        if after.id == before.id:
            assert after is before
            continue
        style = provenance[after.id]["style"]
        assert provenance[after.id] == {"style": style, "source_id": before.id}
        cue = "\nAnswer:" if before.prompt.endswith("\nAnswer:") else ""
        assert after.prompt.startswith(f"{before.prompt.removesuffix(cue)}\n") and after.prompt.endswith(cue)
        assert convertible(before, style, native, texts, answers)
        seen[style, after.answer if style == "yes-no" else ""] += 1
        truth = before.answer
        if native == "choice" and style != "choice":
            truth = dict(line.split(". ", 1) for line in before.prompt.split("\n") if line[1:3] == ". ").get(
                before.answer
            )
        if style == "short":
            assert after.answer == truth and truth in after.options
        elif style == "yes-no":
            proposed = after.prompt.split("Proposed answer: ")[1].split("\n")[0]
            assert (proposed.lower() == truth.lower()) == (after.answer == "yes")
        elif style == "choice":
            lines = dict(line.split(". ", 1) for line in after.prompt.removeprefix(before.prompt).split("\n")[1:-1])
            assert lines[after.answer] == truth and tuple(lines) == after.options
            assert len({text.lower() for text in lines.values()}) == len(lines) >= 2
        else:
            expected = texts[before.id] if style == "detail" else first_sentence(texts[before.id])
            assert after.answer == f"{before.answer}\n{expected}" and after.options is None
    assert len(provenance) == sum(a is not b for a, b in zip(given_records, made, strict=True))
    assert abs(seen["yes-no", "yes"] - seen["yes-no", "no"]) <= 1 and seen["yes-no", "yes"] >= seen["yes-no", "no"]
    # The share is used up while any record left over could still be converted.
    wanted = round(fraction * len(given_records))
    rest = [b for b, a in zip(given_records, made, strict=True) if a is b]
    assert len(provenance) <= wanted
    if len(provenance) < wanted:
        assert not any(convertible(r, style, native, texts, answers) for r in rest for style in STYLES)


@given(worlds())
def test_a_share_of_zero_is_the_identity(world):
    given_records, texts, _, seed = world
    made, provenance = diversify(given_records, 0.0, seed, given_explanations(texts))
    assert provenance == {} and all(a is b for a, b in zip(made, given_records, strict=True))


@settings(deadline=None)
@given(st.integers(4, 120), st.floats(0, 1), st.integers(0, 5), st.sampled_from([records, choice_records]))
def test_styles_that_all_can_be_made_differ_by_one_at_most(count, fraction, seed, make):
    _, provenance = diversify(make(count), fraction, seed, explain)
    counts = Counter(p["style"] for p in provenance.values())
    styles = {"yes-no", "brief", "detail", "choice" if make is records else "short"}
    assert len(provenance) == round(fraction * count) and set(counts) <= styles
    assert max(counts[s] for s in styles) - min(counts[s] for s in styles) <= 1


def test_a_smaller_share_converts_some_of_what_a_larger_one_does():
    small, large = (diversify(records(), share, 3)[1] for share in (0.1, 0.4))
    assert {p["source_id"] for p in small.values()} < {p["source_id"] for p in large.values()}


def test_a_task_with_answers_of_several_lines_is_converted_by_explanations_only():
    given = [*records(10), TextRecord("Text?", "World\nand why", "x")]
    assert diversify(given, 1.0, 0) == (given, {})
    _, provenance = diversify(given, 0.5, 0, explain)
    assert {p["style"] for p in provenance.values()} == {"brief", "detail"}


# --- explanations and listed options -------------------------------------------------------------------------------
def test_what_explanations_are_missing_is_given_to_the_other_styles():
    texts = {f"r{i}": "Because. And so." for i in range(6)}
    _, provenance = diversify(records(), 0.4, 0, given_explanations(texts))
    counts = Counter(p["style"] for p in provenance.values())
    assert counts == {"brief": 3, "detail": 3, "yes-no": 17, "choice": 17}
    assert {p["source_id"] for p in provenance.values() if p["style"] in ("brief", "detail")} == set(texts)


def test_an_explanation_of_one_sentence_is_brief_and_nothing_else():
    texts = {f"r{i}": "Because." for i in range(100)}
    _, provenance = diversify(records(), 0.3, 0, given_explanations(texts))
    assert Counter(p["style"] for p in provenance.values()) == {"brief": 10, "yes-no": 10, "choice": 10}


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("It is. It was.", "It is."),
        ("In the U.S. Dr. A. Lee said (e.g. twice) so! Then?", "In the U.S. Dr. A. Lee said (e.g. twice) so!"),
        ("Pi is 3.14 or so. Yes.", "Pi is 3.14 or so."),
        ('He said "no." She left.', 'He said "no."'),
        ("A heading\nA sentence.", "A heading"),
        ("no end at all", "no end at all"),
        ("これは文です。次の文。", "これは文です。"),
        ("", ""),
    ],
)
def test_the_first_sentence_is_found(text, first):
    assert first_sentence(text) == first


@pytest.mark.parametrize(
    ("prompt", "answer", "options", "found"),
    [
        ("Q?\nA. red\nB. blue\nAnswer:", "B", None, {"A": "red", "B": "blue"}),
        ("Q?\n(A) red\n(B) blue", "(b)", None, {"A": "red", "B": "blue"}),
        ("Q?", "B) blue", ("A) red", "B) blue"), {"A": "red", "B": "blue"}),
        ("Q?\nA. red\nB. blue", "C", None, None),
        ("Q?\nA. red\nC. blue", "A", None, None),
        ("Q?\nA. red\nand pink\nB. blue", "A", None, None),
        ("A. Lee asks:\nA. red\nB. blue", "A", None, None),
        ("A. Lee\nasks:\nA. red\nB. blue", "A", None, None),
        ("Q?\nA. red\nB. Red", "A", None, None),
        ("Choose A. red, B. blue.", "A", None, None),
    ],
)
def test_the_texts_behind_letters_are_read_only_where_there_is_no_doubt(prompt, answer, options, found):
    assert listed_options(TextRecord(prompt, answer, "1", options)) == found


# --- from a configuration ------------------------------------------------------------------------------------------
def news(folder, **columns):
    rows = [
        {"prompt": f"text {i}", "answer": LABELS[i % 5], "label": LABELS[i % 5]}
        | {key: make(i) for key, make in columns.items()}
        for i in range(100)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "news.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def task(**options):
        tasks = {"source": "jsonl", "root": str(folder), "tasks": ["news.jsonl"], "eval_fraction": 0.2, **options}
        return build.make_tasks(resolve.validate({"tasks": tasks}))[0]

    return task


def test_explanations_come_from_a_column_of_the_records(tmp_path):
    task = news(tmp_path, why=lambda i: f"Reason {i}. And more." if i % 2 else None)
    made = task(asd=0.5, explanation_field="why")
    styles = {id: p["style"] for id, p in made.metadata["asd"].items()}
    assert Counter(styles.values()) == {"brief": 10, "detail": 10, "yes-no": 10, "choice": 10}
    by_id = {r.id: r for r in made.train.records}
    for id, style in styles.items():
        if style in ("brief", "detail"):
            label, reason = by_id[id].answer.split("\n")
            assert label in LABELS and reason.startswith("Reason") and reason.endswith("more.") == (style == "detail")
    assert {p["style"] for p in task(asd=0.5).metadata["asd"].values()} == {"yes-no", "choice"}


def test_a_share_of_zero_leaves_a_task_with_explanations_as_it_was(tmp_path):
    plain = news(tmp_path / "plain")()
    explained = news(tmp_path / "explained", explanation=lambda i: ["not", "text"])()
    assert plain.train == explained.train and plain.train.fingerprint() == explained.train.fingerprint()
    assert plain.metadata == explained.metadata
    with pytest.raises(DataError, match="'explanation' must be text"):
        news(tmp_path / "explained", explanation=lambda i: ["not", "text"])(asd=0.1)


def test_an_answer_that_carries_its_explanation_is_split_in_training_and_evaluation(tmp_path):
    task = news(tmp_path, answer=lambda i: f"{LABELS[i % 5]}\nReason {i}. And more." if i else "World")
    whole, split = task(), task(explanation_after="\n")
    assert whole.metric == "exact-match" and split.metric == "option-loglik"
    assert {r.answer for part in (split.train, split.eval) for r in part.records} == set(LABELS)
    assert split.train.ids[0] == content_id(
        {"prompt": split.train.records[0].prompt, "answer": split.train.records[0].answer}
    )
    converted = task(explanation_after="\n", asd=0.4)
    assert converted.eval == split.eval
    assert Counter(p["style"] for p in converted.metadata["asd"].values()) == dict.fromkeys(
        ("brief", "detail", "yes-no", "choice"), 8
    )
    with pytest.raises(DataError, match=r"news\.jsonl:1: 'answer' is empty before its explanation"):
        news(tmp_path, answer=lambda i: "\nReason." if i == 0 else "World")(explanation_after="\n")
    with pytest.raises(ConfigError, match=r"tasks\.explanation_after: splits answers of text tasks"):
        task(kind="edit", explanation_after="\n")


def test_the_run_directory_and_the_plan_say_what_was_converted(text_content, capsys):
    from clkit.cli import main
    from clkit.rundir import RunDirectory

    for file in map(Path, text_content["tasks"]["tasks"]):
        file.write_text(file.read_text().replace('"a"', '"yea"').replace('"b"', '"nay"'))
    text_content["tasks"]["asd"] = 0.5
    text_content["train"] = {"steps": 1, "batch_size": 4}
    config = resolve.validate(text_content)
    tasks = build.make_tasks(config)
    result = api.run(config)
    rows = [json.loads(line) for line in (result.run_dir / "answer_styles.jsonl").read_text().splitlines()]
    assert rows == [{"task": t.name, "id": id, **p} for t in tasks for id, p in t.metadata["asd"].items()]
    assert {r["id"] for r in rows} < {i for t in tasks for i in t.train.ids} and len(rows) == 12
    facts = RunDirectory(result.run_dir).read("run.json")
    assert facts["answer_styles"] == {name: {"yes-no": 2, "choice": 2} for name in ("red", "blue", "green")}
    file = result.run_dir.parent / "config.yaml"
    file.write_text(json.dumps(text_content))
    assert main(["validate", str(file)]) == 0
    assert capsys.readouterr().out.count("4 of them in other answer styles: 2 choice, 2 yes-no") == 3
    text_content["tasks"]["asd"] = 0.0
    again = api.run(resolve.validate(text_content), fresh=True)
    assert not (again.run_dir / "answer_styles.jsonl").exists()


def test_science_questions_get_all_styles_without_a_generator(data_root):
    from clkit.tasks import build_tasks

    options = {"root": str(data_root / "textcl"), "tasks": ["scienceqa"], "explanation_after": "\n"}
    plain, made = (build_tasks("jsonl", {**options, "asd": share})[0] for share in (0.0, 0.2))
    assert plain.eval == made.eval and {r.answer for r in made.eval.records} == set("ABCD")
    assert Counter(p["style"] for p in made.metadata["asd"].values()) == dict.fromkeys(
        ("yes-no", "short", "brief", "detail"), 30
    )
    by_id, sources = {r.id: r for r in made.train.records}, {r.id: r for r in plain.train.records}
    for id, origin in made.metadata["asd"].items():
        source, answer = sources[origin["source_id"]], by_id[id].answer
        if origin["style"] == "short":
            assert f"\n{source.answer}. {answer}\n" in source.prompt
        elif origin["style"] != "yes-no":
            assert answer.startswith(f"{source.answer}\n") and len(answer) > 10
