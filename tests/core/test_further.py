"""Further matrices: of more metrics and of weights that do not serve; scored once, resumed exactly, shown."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

from clkit import api, build, resolve
from clkit.cli import main
from clkit.errors import CapabilityError, CheckpointError, ConfigError, DataError
from clkit.models.causal_lm import CausalLM
from clkit.report import write_report
from clkit.result import RunResult, compare_text
from clkit.strategy import Strategy

BOTH = ["exact-match", "tolerant-match"]


def config(content, also=BOTH, **changes):
    return resolve.validate({**content, **changes, "eval": {**content["eval"], "also": also}})


@pytest.fixture
def worded(text_content):
    """The three tasks with words for answers and no options, so that form and content can differ."""
    for file in map(Path, text_content["tasks"]["tasks"]):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [{"prompt": r["prompt"], "answer": {"a": "yea", "b": "nay"}[r["answer"]]} for r in rows]
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return text_content


def speak(monkeypatch, say):
    """Let the model answer ``say(answer, how many steps were taken)``; returns the list of its calls."""
    calls, steps = [], [0]
    plain = Strategy.after_step

    def count(self):
        steps[0] = self.run.position.total_steps
        plain(self)

    def generate(self, encoded, indices, max_new_tokens):
        calls.append([encoded.ids[int(i)] for i in indices])
        return [say(encoded.records[int(i)], steps[0]) for i in indices]

    monkeypatch.setattr(Strategy, "after_step", count)
    monkeypatch.setattr(CausalLM, "generate", generate)
    return calls


def test_forgetting_is_split_and_every_answer_is_generated_once(worded, monkeypatch):
    def say(record, steps):
        """Later tasks bring a new form at once, and the first task's 'yea' is forgotten at last."""
        old = record.prompt.startswith("red") and steps > 4
        if old and steps > 8 and record.answer == "yea":
            return "The answer is nay."
        return f"The answer is {record.answer}." if old else record.answer

    calls = speak(monkeypatch, say)
    result = api.run(config(worded, tasks={**worded["tasks"], "metric": "exact-match"}))
    red = build.make_tasks(config(worded))[0].eval.records
    yea = sum(r.answer == "yea" for r in red) / len(red)
    strict, tolerant = (result.further[name].matrix for name in BOTH)
    np.testing.assert_array_equal(strict, result.matrix)
    np.testing.assert_allclose(strict[:, 0], [1, 0, 0])
    np.testing.assert_allclose(tolerant[:, 0], [1, 1, 1 - yea])
    split = result.format_split["tolerant-match"]
    assert split["per_task"][0] == {
        "task": 0,
        "strict": 1.0,
        "superficial": pytest.approx(1 - yea),
        "essential": pytest.approx(yea),
    }
    assert split["strict"] == result.metrics["forgetting"] == pytest.approx(0.5)
    assert split["superficial"] + split["essential"] == pytest.approx(0.5)
    # Untouched: 3 tasks; then 2, 3 and 3: 11 scorings of one batch each, though three metrics are asked for.
    assert len(calls) == 11 and all(len(ids) == len(set(ids)) for ids in calls)


def test_the_split_needs_a_strict_and_a_tolerant_score_of_every_task(worded, text_content, monkeypatch):
    speak(monkeypatch, lambda record, steps: record.answer)
    own = {**worded["tasks"], "metric": "exact-match"}
    assert set(api.run(config(worded, ["tolerant-match"], tasks=own)).format_split) == {"tolerant-match"}
    assert api.run(config(worded, ["perplexity"], tasks=own), fresh=True).format_split == {}
    assert api.run(config(worded, [], tasks=own), fresh=True).further == {}


def test_option_likelihoods_are_a_tolerant_score_too(text_content):
    result = api.run(config(text_content, ["exact-match"]))
    assert set(result.format_split) == {"option-loglik"}
    assert result.format_split["option-loglik"]["essential"] == result.metrics["forgetting"]


def test_further_metrics_change_nothing_else(text_content, tmp_path):
    plain = api.run(config(text_content, [], output_dir=str(tmp_path / "plain")))
    more = api.run(config(text_content, [*BOTH, "perplexity", "option-loglik"], output_dir=str(tmp_path / "more")))
    np.testing.assert_array_equal(more.matrix, plain.matrix)
    assert more.metrics == plain.metrics
    np.testing.assert_array_equal(more.further["option-loglik"].matrix, plain.matrix)
    assert more.further["perplexity"].higher_is_better == [False] * 3
    assert not (plain.run_dir / "further.json").exists()
    events = [json.loads(line) for line in (more.run_dir / "events.jsonl").read_text().splitlines()]
    last = [e["value"] for e in events if e["event"] == "score" and e["metric"] == "perplexity"][-3:]
    assert last == more.further["perplexity"].matrix[-1].tolist()


class TwoMinds(Strategy):
    """Serves what it has learned, and keeps the untouched weights of its adapter."""

    def setup(self, run):
        super().setup(run)
        self.first = {n: p.detach().clone() for n, p in run.model.module.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def _untouched(self):
        module = self.run.model.module
        now = {n: p.detach().clone() for n, p in module.named_parameters() if n in self.first}
        module.load_state_dict(self.first, strict=False)
        try:
            yield module
        finally:
            module.load_state_dict(now, strict=False)

    def alternatives(self):
        return {"untouched": self._untouched}


def test_other_weights_get_a_matrix_of_their_own_and_learning_does_not_notice(text_content, tmp_path, monkeypatch):
    plain = api.run(config(text_content, [], output_dir=str(tmp_path / "plain")))
    monkeypatch.setattr(api.build, "make_strategy", lambda plugin: TwoMinds(plugin.config))
    result = api.run(config(text_content, ["perplexity"], output_dir=str(tmp_path / "two")))
    np.testing.assert_array_equal(result.matrix, plain.matrix)
    assert list(result.further) == ["perplexity", "untouched"]
    untouched = result.further["untouched"]
    np.testing.assert_array_equal(untouched.initial, result.initial)
    for row in untouched.matrix:
        measured = ~np.isnan(row)
        np.testing.assert_array_equal(row[measured], result.initial[measured])
    assert untouched.metrics()["forgetting"] == 0


class Cut(Exception):
    pass


@pytest.mark.parametrize("at", [2, 9, 14, 20])
def test_a_run_that_is_cut_while_it_scores_ends_with_the_same_further_matrices(text_content, tmp_path, monkeypatch, at):
    from clkit.trainer import SequentialTrainer

    monkeypatch.setattr(api.build, "make_strategy", lambda plugin: TwoMinds(plugin.config))
    whole = api.run(config(text_content, output_dir=str(tmp_path / "whole")))
    cut = config(text_content, output_dir=str(tmp_path / "cut"))
    plain, done = SequentialTrainer._evaluate, [0]

    def evaluate(self, task, metrics):
        done[0] += 1
        if done[0] == at:
            raise Cut
        return plain(self, task, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(SequentialTrainer, "_evaluate", evaluate)
        with pytest.raises(Cut):
            api.run(cut)
    resumed = api.run(cut)
    assert list(resumed.further) == list(whole.further) == [*BOTH, "untouched"]
    for name, scores in whole.further.items():
        np.testing.assert_array_equal(resumed.further[name].matrix, scores.matrix)
        np.testing.assert_array_equal(resumed.further[name].initial, scores.initial)


def test_a_result_is_read_back_with_its_further_matrices_and_damage_is_said(text_content):
    result = api.run(config(text_content, [*BOTH, "perplexity"]))
    back = RunResult.load(result.run_dir)
    assert back.format_split == result.format_split and list(back.further) == list(result.further)
    for name, scores in result.further.items():
        np.testing.assert_array_equal(back.further[name].matrix, scores.matrix)
        assert back.further[name].metrics() == scores.metrics()
    file = result.run_dir / "further.json"
    saved = json.loads(file.read_text())
    assert saved["format_split"]["tolerant-match"]["strict"] == result.format_split["tolerant-match"]["strict"]
    assert saved["matrices"]["exact-match"]["metrics"]["bwt"] == result.further["exact-match"].metrics()["bwt"]
    saved["matrices"]["exact-match"]["matrix"].pop()
    for content in (saved, [], {"matrices": {"x": {}}}):
        file.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"further\.json: damaged .*Delete matrix\.json and run"):
            RunResult.load(result.run_dir)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"further\.json: damaged \(it does not hold the matrices"):
        RunResult.load(result.run_dir)
    (result.run_dir / "matrix.json").unlink()
    again = api.run(config(text_content, [*BOTH, "perplexity"]))
    assert json.loads(file.read_text())["matrices"].keys() == result.further.keys() == again.further.keys()
    np.testing.assert_array_equal(again.further["perplexity"].matrix, result.further["perplexity"].matrix)


def test_report_summary_and_comparison_show_them(worded, monkeypatch, tmp_path):
    speak(monkeypatch, lambda record, steps: f"It is {record.answer}" if steps > 8 else record.answer)
    own = {**worded["tasks"], "metric": "exact-match"}
    result = api.run(config(worded, tasks=own, output_dir=str(tmp_path / "more")))
    plain = api.run(config(worded, [], tasks=own, output_dir=str(tmp_path / "plain")))
    text = result.summary()
    assert "tolerant-match:\n" in text and "   1.0000  superficial (forgetting of the strict" in text
    compared = compare_text([result, plain])
    line = next(row for row in compared.splitlines() if row.startswith("superficial forgetting (tolerant-match)"))
    assert line.split()[-5:-3] == ["1.0000", "-"]
    write_report([result, plain], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h3>tolerant-match</h3>" in page and "Forgetting by form and by content (tolerant-match)" in page
    assert page.count("<h3>tolerant-match</h3>") == 1 and "superficial forgetting (tolerant-match)" in page
    write_report([plain], tmp_path / "report.html")
    assert "tolerant-match" not in (tmp_path / "report.html").read_text().partition("<summary>Configuration")[0]


def test_metrics_that_do_not_fit_are_refused_before_the_model_is_loaded(text_content, vision_content, worded):
    with pytest.raises(ConfigError, match=r"eval\.also: .*'exact-mach'.*Did you mean 'exact-match'"):
        config(text_content, ["exact-mach"])
    with pytest.raises(ConfigError, match=r"eval\.also: 'exact-match' is listed twice"):
        config(text_content, ["exact-match", "exact-match"])
    with pytest.raises(CapabilityError, match="metric 'exact-match' scores text tasks"):
        api.run(resolve.validate({**vision_content, "eval": {"also": ["exact-match"]}}))
    with pytest.raises(DataError, match=r"can't be scored with 'option-loglik'"):
        api.run(config(worded, ["option-loglik"]))
    assert not Path(text_content["output_dir"], "checkpoints").exists()


def test_validate_names_all_metrics(worded, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({**worded, "eval": {"also": BOTH}}))
    assert main(["validate", str(file)]) == 0
    assert capsys.readouterr().out.count("steps  exact-match, tolerant-match\n") == 3
