"""The page: what stands in it, that it is whole, safe and small; groups, intervals, fronts and differences."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from clkit.cli import main
from clkit.report import comparison, load, write_report
from clkit.report.figures import Drawing, legend_below
from clkit.report.history import History, result_so_far
from clkit.report.plots import shades, thinned
from clkit.report.sections import Edits
from clkit.result import RunResult, compare_text, compared


class Page(HTMLParser):
    """Checks that tags are balanced and ids unique; collects what an element could load."""

    VOID = {"wbr", "img", "meta", "link", "input", "br", "path", "use", "rect", "line", "circle"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.text = text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.loads.append(value)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="session")
def page(runs, tmp_path_factory) -> Page:
    file = tmp_path_factory.mktemp("page") / "report.html"
    write_report([RunResult.load(r) for r in runs], file)
    return Page(file.read_text())


def test_the_page_is_whole_and_loads_nothing(page):
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    assert page.loads and all(link.startswith(("#", "data:")) for link in page.loads)
    assert {link[1:] for link in page.loads if link.startswith("#")} <= set(page.ids)
    assert "@import" not in page.text and not re.search(r"url\((?!#)", page.text)


def test_names_are_escaped_everywhere(page):
    assert "naive <0>" not in page.text and "naive &lt;0&gt; &amp; co" in page.text


def test_everything_about_a_run_stands_in_its_page(runs, tmp_path):
    write_report([RunResult.load(runs[1])], tmp_path / "r.html", figures=tmp_path / "figures")
    text = (tmp_path / "r.html").read_text()
    for part in (
        "Scores", "Score of each task along training", "Forgetting per task", "Loss terms", "Metrics", "Cost",
        "mean over i&lt;T of R[T,i]-R[i,i]", "peak memory", "before and after", "How to load the model",
        "How to repeat it", "clkit run", "Configuration", "Versions and hashes", "trainable parameters",
        "3 tasks of", "training and", "task-1 (0,\u00a01,\u00a02,\u00a03)", "loss: cross entropy", "backward transfer (BWT)",
        '<img src="data:image/png;base64,',
    ):  # fmt: skip
        assert part in text, part
    svgs, pngs = sorted((tmp_path / "figures").glob("*.svg")), sorted((tmp_path / "figures").glob("*.png"))
    assert len(svgs) == len(pngs) >= 3
    assert {svg.stem.rpartition("-")[2] for svg in svgs} >= {"matrix", "scores", "forgetting", "losses"}
    for svg in svgs:
        assert ET.parse(svg).getroot().tag.endswith("svg")
    assert all(png.read_bytes().startswith(b"\x89PNG") for png in pngs)


def test_images_stand_in_pages_of_few_runs_only(runs, tmp_path):
    results = [RunResult.load(r) for r in (*runs, runs[0])]
    for count, shown in ((4, True), (5, False)):
        write_report(results[:count], tmp_path / "r.html")
        assert ("<img" in (tmp_path / "r.html").read_text()) == shown


def test_an_address_elsewhere_is_no_picture(runs, tmp_path):
    shutil.copytree(runs[1], tmp_path / "run")
    file = tmp_path / "run" / "samples.json"
    samples = json.loads(file.read_text())
    for row in (row for entries in samples.values() for entry in entries for row in entry["rows"]):
        row["picture"] = "https://example.org/seen.png"
    file.write_text(json.dumps(samples))
    write_report([RunResult.load(tmp_path / "run")], tmp_path / "r.html")
    assert "example.org" not in (tmp_path / "r.html").read_text()


def test_runs_from_before_sizes_were_written_down_still_show(runs, tmp_path):
    shutil.copytree(runs[1], tmp_path / "run")
    file = tmp_path / "run" / "events.jsonl"
    first, _, rest = file.read_text().partition("\n")
    start = json.loads(first)
    assert start["event"] == "start" and start.pop("holds")
    file.write_text(json.dumps(start) + "\n" + rest)
    samples = json.loads((tmp_path / "run" / "samples.json").read_text())
    for row in (row for entries in samples.values() for entry in entries for row in entry["rows"]):
        del row["picture"]
    (tmp_path / "run" / "samples.json").write_text(json.dumps(samples))
    write_report([RunResult.load(tmp_path / "run")], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "3 tasks: task-1, task-2, task-3" in text and "<img" not in text


@pytest.mark.parametrize(
    ("sizes", "unit", "size"), [([300.0], "KiB", 2**10), ([5e3, 3e6], "MiB", 2**20), ([5e9], "GiB", 2**30)]
)
def test_memory_has_a_unit_that_fits(sizes, unit, size):
    assert comparison._unit(sizes) == (unit, size)


def test_nearly_equal_memory_is_told_in_whole_numbers():
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    points = [("naive", [275.20007], [1.0]), ("replay", [275.20126], [0.9])]
    comparison._pareto(axes, points, "model and exemplars (MiB)")
    figure.canvas.draw()
    assert axes.xaxis.get_offset_text().get_text() == ""
    low, high = axes.get_xlim()
    assert low < 265 and high > 285
    axes.clear()
    comparison._pareto(axes, [("a", [-0.05], [1.0]), ("b", [-0.05], [0.9])], "forgetting")
    assert axes.get_xlim()[0] < -0.05 < axes.get_xlim()[1]


def test_a_legend_is_read_line_by_line():
    from matplotlib.figure import Figure

    from clkit.report.figures import legend_below

    axes = Figure().subplots()
    for k in range(5):
        axes.plot([0, 1], [k, k], label=str(k))
    legend_below(axes, 5)
    axes.figure.canvas.draw()
    placed = [
        (round(-t.get_window_extent().y0), t.get_window_extent().x0, t.get_text()) for t in axes.get_legend().texts
    ]
    assert [text for _, _, text in sorted(placed)] == list("01234")


def test_memory_is_told_with_the_model_of_each_stage_and_of_the_end(runs, tmp_path):
    shutil.copytree(runs[1], tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    costs = [e for e in events if e["event"] == "cost"]
    for e in costs:
        e |= {"model_bytes": (e["stage"] + 1) * 2**20, "exemplar_bytes": 2**19}

    def told(kept):
        (tmp_path / "run" / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in kept))
        write_report([RunResult.load(tmp_path / "run")], tmp_path / "r.html")
        table = (tmp_path / "r.html").read_text().partition('aria-label="Cost of')[2].partition("</table>")[0]
        return [re.findall(r"<td>([^<]*)</td>", row)[5:7] for row in table.split("<tr>")[2:]]

    last = len(costs)
    assert last > 1
    assert told(events) == [[f"{k + 1.5} MiB", f"{last + 0.5} MiB"] for k in range(last)]
    assert told([e for e in events if e is not costs[-1]]) == [[f"{k + 1.5} MiB", "–"] for k in range(last - 1)]


def test_inline_figures_take_the_colours_of_the_page(page):
    figures = re.findall(r"<svg.*?</svg>", page.text, flags=re.DOTALL)
    assert len(figures) > 8
    for svg in figures:
        assert 'role="img"' in svg and "aria-label=" in svg and "var(--ink)" in svg
        assert not re.search(r"(fill|stroke): ?#(1a1f24|57606a|0b62b3)", svg)


def test_the_page_says_the_same_again(runs, tmp_path):
    for name in ("a", "b"):
        write_report([RunResult.load(runs[0])], tmp_path / f"{name}.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_fifty_runs_stay_below_five_megabytes(runs, tmp_path):
    paths = []
    for i in range(50):
        paths.append(tmp_path / f"run-{i}")
        shutil.copytree(runs[i % 4], paths[-1], ignore=shutil.ignore_patterns("checkpoints", "export"))
    write_report([RunResult.load(p) for p in paths], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 5_000_000


def test_the_command_compares_a_sweep_and_writes_figures(runs, tmp_path, capsys):
    assert main(["report", "--sweep", str(runs[0].parent), "--output", str(tmp_path / "r.html")]) == 0
    assert str(tmp_path / "r.html") in capsys.readouterr().out
    text = (tmp_path / "r.html").read_text()
    assert "4 runs of 2 settings" in text and f"<h1>Sweep {runs[0].parent.name}</h1>" in text
    names = {f.name for f in (tmp_path / "r_figures").iterdir()}
    assert {"compare-average_accuracy.svg", "compare-pareto-forgetting.png"} <= names


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert main(["report"]) == 2
    assert main(["report", "--sweep", str(tmp_path)]) == 2
    assert main(["report", "--live", str(tmp_path), str(tmp_path)]) == 2
    err = capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["report", "--live", str(tmp_path / "file"), "--port", "0"]) == 2
    err += capsys.readouterr().err
    assert "is a file; give the output_dir of a run" in err
    assert "give run directories" in err and "no finished run below" in err and "--live" in err


def test_groups_are_settings_and_labels_say_what_differs(runs):
    from clkit.report.page import _entry

    entries = [_entry(RunResult.load(r)) for r in runs]
    groups = comparison.grouped(entries)
    assert [(g.label, len(g.entries)) for g in groups] == [("naive", 2), ("replay", 2)]
    third = _entry(RunResult.load(runs[1]))
    third.config["strategy"]["replay"]["size"] = 99
    assert [g.label for g in comparison.grouped([*entries, third])] == ["naive", "replay", "replay size=99"]


def test_runs_on_other_data_or_scored_otherwise_are_another_setting_and_no_pair(runs):
    from clkit.report.page import _entry

    def entry(run, section, **options):
        found = _entry(RunResult.load(run))
        found.config[section] |= options
        return found

    first = [entry(runs[0], "tasks"), entry(runs[2], "tasks", order_seed=3)]
    others = [entry(runs[0], "tasks", source="mnist-5k"), entry(runs[0], "tasks", train_limit=5)]
    others += [entry(runs[0], "eval", max_new_tokens=1), entry(runs[2], "eval", every_steps=7)]
    groups = comparison.grouped([*first, *others])
    assert [(g.label, len(g.entries)) for g in groups] == [
        ("naive", 3), ("naive source=mnist-5k", 1), ("naive train_limit=5", 1), ("naive max_new_tokens=1", 1)
    ]  # fmt: skip
    assert [label for label, _ in comparison.differences(groups, "forgetting")] == ["naive max_new_tokens=1"]
    reordered = comparison.grouped([entry(runs[0], "tasks", order_seed=1), entry(runs[1], "tasks", order_seed=2)])
    assert len(reordered) == 2 and not comparison.differences(reordered, "forgetting")


def test_differences_pair_runs_of_one_seed(runs):
    from clkit.report.page import _entry

    groups = comparison.grouped([_entry(RunResult.load(r)) for r in runs])
    ((label, found),) = comparison.differences(groups, "average_accuracy")
    each = [
        groups[1].entries[i].value("average_accuracy") - groups[0].entries[i].value("average_accuracy") for i in (0, 1)
    ]
    assert label == "replay" and found.n == 2
    assert found.mean == pytest.approx(np.mean(each))
    groups[1].entries[0].config["seed"] = 7  # no partner any more
    ((_, alone),) = comparison.differences(groups, "average_accuracy")
    assert alone.n == 1 and alone.half is None and alone.mean == pytest.approx(each[1])


def test_interval_is_students():
    from scipy import stats

    values = [0.2, 0.5, 0.9, 0.4]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    found = comparison.interval(values)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert comparison.interval([]) is None and comparison.interval([1.0]).half is None


def test_no_point_of_the_front_is_beaten_and_all_others_are():
    points = np.random.default_rng(0).random((40, 2)).tolist()
    kept = comparison.front([tuple(p) for p in points])

    def beaten(i):
        return any(x >= points[i][0] and y <= points[i][1] and (x, y) != tuple(points[i]) for x, y in points)

    assert kept and [i for i in range(40) if not beaten(i)] == sorted(kept)


def test_shades_follow_the_direction_of_a_score():
    rows = np.array([[0.25, 30.0], [1.0, 10.0], [np.nan, 20.0]])
    shown = shades(rows, [True, False])
    np.testing.assert_allclose(shown, [[0.25, 0.0], [1.0, 1.0], [np.nan, 0.5]])


def test_of_perplexities_the_lower_level_is_better_everywhere(runs, tmp_path):
    results = [RunResult.load(r) for r in runs[:2]]
    for result in results:
        result.higher_is_better = [False] * 3
    found = {name: better for name, _, better in compared(results)}
    assert found["average_accuracy"] == "lower" and found["bwt"] == "higher" and found["forgetting"] == "lower"
    assert "lower is better: mean over i of R[T,i]" in results[0]._repr_html_()
    write_report(results, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "average accuracy (lower is better)" in text and "Accuracy against" not in text
    assert "average accuracy</dt>" in text and "higher is better" in text.partition("transfer (BWT)</dt>")[2][:120]


def test_reading_a_report_needs_no_torch(runs, deletion, edited, tmp_path):
    paths = [str(p) for p in (runs[0], deletion, edited)]
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from clkit.cli import main\n"
        f"sys.exit(main(['report', *{paths!r}, '--no-figures', '--output', {str(tmp_path / 'r.html')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_long_curve_keeps_its_mean():
    series = [(i, float(i % 7)) for i in range(1000)]
    short = thinned(series)
    assert len(short) <= 300 and np.mean([v for _, v in short]) == pytest.approx(3.0, abs=0.05)


def test_a_run_that_goes_on_is_shown_as_far_as_it_went(runs, tmp_path):
    lines = (runs[0] / "events.jsonl").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if '"after task-2"' in line)
    (tmp_path / "events.jsonl").write_text("\n".join(lines[: first + 1]) + '\n{"event": "sc')
    found, whole = result_so_far(tmp_path), RunResult.load(runs[0])
    np.testing.assert_array_equal(found.matrix[0], whole.matrix[0])
    assert found.matrix[1, 0] == whole.matrix[1, 0] and np.isnan(found.matrix[1:]).sum() == 5
    np.testing.assert_array_equal(found.initial, whole.initial)
    (tmp_path / "status.json").write_text('{"state": "running"}')
    write_report([found], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "after task-2" in text and "<strong>running, at task-2 (2 of 3)</strong>" in text
    assert "They are known after the last task." in text and "mean over i of R[T,i]" not in text


def test_the_whole_history_gives_back_the_whole_matrix(runs):
    np.testing.assert_array_equal(result_so_far(runs[1]).matrix, RunResult.load(runs[1]).matrix)


def test_a_pause_between_two_processes_is_not_time_spent(tmp_path):
    events = [("start", 0, 100), ("step", 1, 110), ("resume", 1, 9000), ("step", 2, 9005), ("score", 2, 9007)]
    extra = {"step": {"losses": {"a": 1.0}}, "score": {"task": "t", "metric": "m", "value": 1.0}}
    rows = [{"event": k, "total_steps": s, "time": t, **extra.get(k, {})} for k, s, t in events]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, rows)))
    history = History.read(tmp_path)
    assert (history.training, history.scoring) == (15, 2)


def test_how_to_repeat_a_run_is_a_command_that_a_shell_takes(runs, tmp_path):
    folder = tmp_path / "two words & 'more'"
    shutil.copytree(runs[0], folder)
    write_report([RunResult.load(folder)], tmp_path / "r.html")
    told = re.search(r'aria-label="How to repeat the run">(.*?)</pre>', (tmp_path / "r.html").read_text())
    command = shlex.split(html.unescape(told[1]))
    assert command == ["clkit", "run", str(folder / "config.yaml"), f"output_dir={folder}-again"]
    assert main(["validate", *command[2:]]) == 0


def test_runs_that_diverged_to_an_infinite_perplexity_have_a_page(runs, tmp_path):
    results = [RunResult.load(r) for r in runs[:2]]
    for result in results:
        result.task_metrics, result.higher_is_better = ["perplexity"] * 3, [False] * 3
        result.matrix[1:, 0], result.matrix[0, 0], result.matrix[1, 1] = np.inf, 7.0, 4e160
        result.metrics = result.scores.metrics()
    assert results[0].metrics["average_accuracy"] == np.inf and "4e+160" in results[0].summary()
    rows = [line.removeprefix("after task-1").split() for line in results[0].matrix_text().splitlines()[-3:]]
    assert [len(row) for row in rows] == [3, 5, 5]  # numbers stand apart
    assert {len(line.split()) for line in compare_text(results).splitlines()[1:]} == {6}
    assert shades(results[0].matrix, [False] * 3)[:, 0].tolist()[1:] == [0, 0]
    for shown in (results, results[:1]):
        write_report(shown, tmp_path / "r.html", figures=tmp_path / "figures")
        text = (tmp_path / "r.html").read_text()
        assert "4e+160" in text and "inf<" not in text
    assert "4e+160" in results[0]._repr_html_()


@pytest.mark.parametrize(("count", "length"), [(5, 6), (5, 34), (8, 60), (40, 40)])
@pytest.mark.filterwarnings("error")
def test_a_legend_of_long_names_leaves_room_for_the_lines_and_tells_them_apart(count, length):
    def draw(axes):
        for name in names:
            axes.plot([0, 1], [0, 1], label=name)
        legend_below(axes, count)

    names = [f"task{i:02d}_".ljust(length, "x") for i in range(count)]
    drawing = Drawing("scores", "Scores", "", draw)
    drawing.svg("f1")  # warns where nothing is left for the axes
    texts = [text.get_text() for text in drawing.figure().axes[0].get_legend().get_texts()]
    assert len(set(texts)) == len(texts) == count


def test_a_line_separator_in_a_prompt_ends_no_event_and_a_half_written_letter_hides_no_other(tmp_path):
    edit = {"event": "edit", "total_steps": 1, "time": 1, "request": {"prompt": "one\u2028two\x85three"}}
    whole = json.dumps(edit, ensure_ascii=False).encode() + b"\n"
    (tmp_path / "events.jsonl").write_bytes(whole + whole + whole[: whole.index(b"\x80\xa8")])
    assert [e["request"]["prompt"] for e in History.read(tmp_path).edits] == ["one\u2028two\x85three"] * 2


def test_edits_are_shown_from_their_directory(tmp_path):
    entries = [
        {"number": i, "kind": "edit", "id": str(i), "request": {"prompt": f"<b>{i}", "target_new": "x"},
         "before": {"prompt": 0.0}, "after": {"prompt": 1.0, "rephrase": 0.5}, "memory": "shard-0", "steps": 3}
        for i in (1, 2)
    ]  # fmt: skip
    (tmp_path / "edits.json").write_text("{}")
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "Score right after each edit" in text and "Edits by memory" in text and "&lt;b&gt;1" in text
    assert len(Edits.read(tmp_path).made) == 2 and load([tmp_path])[0] == []


def test_a_result_shows_itself_in_a_notebook_and_as_frame_and_axes(runs):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    result = RunResult.load(runs[0])
    fragment = Page(result._repr_html_())
    assert not fragment.open and "average_accuracy" in fragment.text
    for name in ("matrix", "scores", "forgetting", "losses"):
        axes = getattr(result.plot, name)()
        assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()
        plt.close(axes.figure)
    axes = plt.figure().subplots()
    assert result.plot.matrix(axes) is axes
    shown = [t.get_text() for t in axes.texts]
    assert f"{result.matrix[0, 0]:.3f}" in shown
    plt.close("all")
    frame = pytest.importorskip("pandas") and result.to_frame()
    assert frame.loc["after task-1", "task-1"] == result.matrix[0, 0] and list(frame.columns) == result.tasks
