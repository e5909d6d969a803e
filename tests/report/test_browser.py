"""The page in a real browser: Chromium without a window, through Playwright; axe-core looks for barriers."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from clkit.report import write_report
from clkit.report.live import make_server
from clkit.report.sections import Edits
from clkit.result import RunResult

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the browser tests need Playwright: pip install playwright"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="the browser tests need Chromium: apt-get install chromium"),
]
PAGES = ("compare", "one", "deletion", "edits")
SIZES = [(360, 740), (1600, 1000)]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def files(runs, deletion, edited, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    results = [RunResult.load(r) for r in runs]
    write_report(results, folder / "compare.html")
    write_report(results[1:2], folder / "one.html")
    write_report([RunResult.load(deletion)], folder / "deletion.html")
    write_report([], folder / "edits.html", edits=[Edits.read(edited)])
    return {name: folder / f"{name}.html" for name in PAGES}


class Visit:
    """A page that was opened, and what it did meanwhile."""

    def __init__(self, browser, url: str, size=SIZES[1], scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url, timeout=120_000)  # of a machine that does much else

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_the_page_opens_without_errors_requests_or_sideways_scrolling(browser, files, name, size, scheme):
    with Visit(browser, files[name].as_uri(), size, scheme) as visit:
        assert visit.errors == []
        assert [r for r in visit.requests if not r.startswith("data:")] == [files[name].as_uri()]
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= size[0]
        background = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(int(part) for part in background[4:-1].split(","))
        assert (brightness < 200) == (scheme == "dark")


@pytest.mark.parametrize("name", ["one", "deletion", "edits"])
def test_figures_are_seen_with_title_and_axis_labels(browser, files, name):
    with Visit(browser, files[name].as_uri()) as visit:
        figures = visit.page.locator("figure svg")
        assert figures.count() >= 3
        for i in range(figures.count()):
            box = figures.nth(i).bounding_box()
            assert box["width"] > 200 and box["height"] > 100
            texts = figures.nth(i).locator("text").all_text_contents()
            title = figures.nth(i).get_attribute("aria-label").split(".")[0]
            assert title in texts
        first = figures.first.locator("text").all_text_contents()
        axes = {"edits": {"edits", "mean score so far"}}.get(name, {"optimiser steps", "accuracy"})
        assert axes <= set(first)


def names(page):
    return page.locator("#runs tbody tr:visible th").all_text_contents()


def test_sorting_by_mouse_and_keyboard(browser, files, runs):
    results = [RunResult.load(r) for r in runs]
    with Visit(browser, files["compare"].as_uri()) as visit:
        head = visit.page.locator("#runs thead th", has_text="average accuracy")
        up = [r.name for r in sorted(results, key=lambda r: r.metrics["average_accuracy"])]
        head.get_by_role("button").click()
        assert names(visit.page) == up and head.get_attribute("aria-sort") == "ascending"
        head.get_by_role("button").focus()
        visit.page.keyboard.press("Enter")
        assert names(visit.page) == up[::-1] and head.get_attribute("aria-sort") == "descending"
        assert visit.errors == []


def test_filtering_shows_the_runs_that_contain_every_word(browser, files):
    with Visit(browser, files["compare"].as_uri()) as visit:
        box = visit.page.get_by_label("Show runs that contain")
        box.fill("replay <1>")
        assert names(visit.page) == ["replay <1> & co"]
        assert visit.page.locator("output").text_content() == "1 of 4 runs"
        box.fill("")
        assert len(names(visit.page)) == 4


def test_everything_is_reached_by_keyboard(browser, files):
    with Visit(browser, files["compare"].as_uri()) as visit:
        reached = set()
        for _ in range(200):
            visit.page.keyboard.press("Tab")
            tag = visit.page.evaluate("document.activeElement.tagName")
            if tag == "BODY":
                break
            reached.add(tag)
        assert {"A", "BUTTON", "INPUT", "SUMMARY", "DIV", "PRE"} <= reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_no_barrier(browser, files, name, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    with Visit(browser, files[name].as_uri(), scheme=scheme) as visit:
        visit.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        found = axe.Axe().run(visit.page)
        assert not found.response["violations"], found.generate_report()
        assert any(rule["id"] == "color-contrast" for rule in found.response["passes"])


def test_fifty_runs_open_within_two_seconds(browser, runs, tmp_path):
    results = [RunResult.load(runs[i % 4]) for i in range(50)]
    write_report(results, tmp_path / "fifty.html")
    page = browser.new_page()
    devtools = page.context.new_cdp_session(page)
    # The work of the page's thread, so that other programs on the machine do not count.
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto((tmp_path / "fifty.html").as_uri())
    metrics = {m["name"]: m["value"] for m in devtools.send("Performance.getMetrics")["metrics"]}
    page.close()
    assert 0 < metrics["TaskDuration"] < 2, metrics


def test_the_live_page_follows_the_run(browser, runs, tmp_path):
    lines = (runs[0] / "events.jsonl").read_text().splitlines(keepends=True)
    middle = next(i for i, line in enumerate(lines) if '"after task-1"' in line) + 1
    run_dir = tmp_path / "runs" / "later"  # is not there yet when the page is opened
    with make_server(run_dir) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}/"
            with Visit(browser, address) as visit:
                assert "Nothing was written down yet" in visit.page.locator("main").inner_text()
                assert visit.page.title() == "clkit: A run that has not begun"
                time.sleep(1)  # until the script has asked for the first version
                run_dir.mkdir(parents=True)
                (run_dir / "events.jsonl").write_text("".join(lines[:middle]))
                visit.page.get_by_role("rowheader", name="after task-1").first.wait_for(timeout=30_000)
                (run_dir / "events.jsonl").write_text("".join(lines))
                visit.page.get_by_role("rowheader", name="after task-3").first.wait_for(timeout=30_000)
                assert visit.page.title() == "clkit: later" and visit.page.locator("h1").inner_text() == "later"
                assert visit.errors == []
                assert all(url.startswith((address, "data:")) for url in visit.requests)
        finally:
            server.shutdown()


def test_what_is_open_in_the_live_page_stays_open_and_damage_is_told(browser, runs, tmp_path):
    run_dir = shutil.copytree(runs[0], tmp_path / "run")
    samples = json.loads((run_dir / "samples.json").read_text())
    (run_dir / "samples.json").write_text(json.dumps({k: samples[k] for k in list(samples)[:1]}))
    with make_server(run_dir) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with Visit(browser, f"http://127.0.0.1:{server.server_port}/") as visit:
                visit.page.locator("summary", has_text="Configuration").click()
                time.sleep(1)  # until the script has asked for the first version
                (run_dir / "samples.json").write_text(json.dumps(samples))
                visit.page.locator("summary", has_text="task-3").wait_for(timeout=30_000)
                shown = visit.page.locator("details[open] > summary").all_inner_texts()
                assert shown == ["task-1", "Configuration"]
                (run_dir / "samples.json").write_text("{")
                visit.page.locator("#live", has_text="samples.json: can't be read").wait_for(timeout=30_000)
        finally:
            server.shutdown()


def test_a_browser_that_goes_away_leaves_no_traceback(runs, capfd):
    with make_server(runs[0]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with socket.create_connection(("127.0.0.1", server.server_port)) as client:
                client.sendall(b"GET / HTTP/1.0\r\n\r\n")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes by a reset
            urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/").read()  # waits for the first answer
        finally:
            server.shutdown()
    assert capfd.readouterr().err == ""
