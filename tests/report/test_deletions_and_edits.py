"""What a page says of deletions and of edits: the figures of the certificate, curves, routes, and nothing personal."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from clkit.cli import main
from clkit.report import write_report
from clkit.report.deletions import deletions
from clkit.report.sections import Edits
from clkit.result import RunResult


def certificate(run_dir):
    (path,) = (run_dir.parent / "unlearning").glob("*/certificate.json")
    return path, json.loads(path.read_text())


def figures(run_dir):
    return {f["name"]: f["figures"] for f in certificate(run_dir)[1]["verification"]}


def drawn(run_dir, page):
    write_report([RunResult.load(run_dir)], page)
    return page.read_text()


def test_curves_and_probabilities_stand_in_the_certificate(deletion):
    found = figures(deletion)["membership"]
    for name in ("loss", "reference"):
        fpr, tpr = found[name]["roc"]
        assert fpr[0] == tpr[0] == 0 and fpr[-1] == tpr[-1] == 1
        assert np.trapezoid(tpr, fpr) == pytest.approx(found[name]["auc"][0], abs=2e-3)
    before, after = found["probability"]["forgotten"]
    assert 0 < after < before < 1, "the model that had learned them is surer of them"
    assert found["probability"].keys() == {"forgotten", "retained", "never_seen"}
    scores = figures(deletion)["utility"]["scores"]
    first = deletion.parent / "first"
    for place, run_dir in enumerate((first, deletion)):
        assert [pair[place] for pair in scores.values()] == RunResult.load(run_dir).matrix[-1].tolist()
    text = (certificate(deletion)[0].parent / "certificate.md").read_text()
    assert "roc" not in text and "scores" not in text and "probability" in text


def test_the_page_shows_certificate_before_and_after_attacks_and_ledger(deletion, tmp_path):
    text = drawn(deletion, tmp_path / "r.html")
    content = certificate(deletion)[1]
    for part in (
        f"Deletion certificate {content['job'][:16]}", "takes the place of one that had learned", "GDPR Art. 17(1)(b)",
        "Probability of the true answer", "Utility: final score of each task", "Membership inference after the deletion",
        "Way through the ledger", "false positive rate", "certified", "rows of other records: 0", content["digest"],
    ):  # fmt: skip
        assert part in text, part
    auc = figures(deletion)["membership"]["loss"]["auc"][0]
    assert f"loss (AUC {auc:.2f})" in text and ", roc " not in text
    before, after = figures(deletion)["membership"]["probability"]["forgotten"]
    assert f"{before:.3g} → {after:.3g}" in text, "all digits that were written"
    ids = json.loads((deletion.parent.parent / "request.json").read_text())["scope"]["record_ids"]
    assert not any(i in text for i in ids)
    old = drawn(deletion.parent / "first", tmp_path / "old.html")
    assert "This run was superseded" in old and "Way through the ledger" in old


def test_certificates_from_before_these_figures_still_show(deletion, tmp_path):
    shutil.copytree(deletion.parent, tmp_path / "runs")
    run_dir = tmp_path / "runs" / deletion.name
    path, content = certificate(run_dir)
    for check in content["verification"]:
        check["figures"].pop("scores", None)
        check["figures"].pop("probability", None)
        for found in check["figures"].values():
            if isinstance(found, dict):
                found.pop("roc", None)
    path.write_text(json.dumps(content))
    names = [d.title for d in deletions(run_dir)[0].drawings("x")]
    assert names == ["Way through the ledger"]
    assert "Deletion certificate" in drawn(run_dir, tmp_path / "r.html")


def test_edits_show_final_scores_and_routes(edited, tmp_path):
    edits = Edits.read(edited)
    assert edits.answered == [("reliability", 3, 0), ("generalisation", 3, 0), ("locality", 1, 2)]
    write_report([], tmp_path / "r.html", edits=[edits], figures=tmp_path / "figures")
    text = (tmp_path / "r.html").read_text()
    assert "Score with all 3 edits in the model" in text and "Routing of queries" in text
    assert "&lt;b&gt;2" in text and "<b>2" not in text
    assert {f.name for f in (tmp_path / "figures").glob("*.svg")} == {
        "edits-edits.svg", "edits-final.svg", "edits-routing.svg", "edits-memories.svg",
    }  # fmt: skip
    row = re.search(r"unrelated</th><td>(\d+)</td><td>(\d+)</td>", text)
    assert row.groups() == ("1", "2")


def test_without_final_scores_the_journal_is_shown(edited, tmp_path):
    shutil.copytree(edited, tmp_path / "copy")
    (tmp_path / "copy" / "scores.json").unlink()
    edits = Edits.read(tmp_path / "copy")
    titles = [d.title for d in edits.drawings("e")]
    assert titles == ["Score right after each edit", "Routing of queries", "Edits by memory"]
    assert edits.answered[2] == ("locality", 1, 2)
    (tmp_path / "copy" / "journal.jsonl").write_text("")
    assert main(["report", str(tmp_path / "copy"), "--no-figures"]) == 0
