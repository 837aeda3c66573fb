"""The report in a real browser: what it fetches, whether its charts and pictures are drawn, how it looks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Tab, find_browser
from fake_engine import FakeEngine
from small_jobs import prompt_table, small_job

from overtone.cluster.dispatch import Assignment
from overtone.cluster.worker import Runner
from overtone.jobs.folder import JobFolder
from overtone.jobs.plan import make_plan
from overtone.jobs.report import report
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import open_store

PAGE = "http://report.test/report.html"
LEAK = "http://elsewhere.test/leak"
CHARTS = ("throughput", "stages", "timeline", "sizes", "grids", "saving")
HOSTILE = f"<script>window.pwned = 1</script><img src={LEAK} onerror='window.pwned = 2'> & \"more\""

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="no Chromium here: `apt-get install chromium`, as .ci/run does"
)


class Server:
    """Serves one page under any name of any host, being the browser's proxy, and notes all that is asked."""

    def __init__(self) -> None:
        self.page = b""
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                found = self.path == PAGE
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.end_headers()
                self.wfile.write(outer.page if found else b"")

            def do_CONNECT(self) -> None:
                outer.asked.append(self.path)
                self.send_error(502)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def of_the_page(self) -> list[str]:
        """What was asked of the hosts of this test; what the browser asks for itself is not ours."""
        return [url for url in self.asked if ".test" in url]


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    """Of a job with rejects and hostile prompts, made by a real runner and an engine without a model."""
    prompts = [f"a picture of number {i}" for i in range(24)]
    prompts[1], prompts[3], prompts[7] = HOSTILE, "!nan", "!raise"
    spec, _ = small_job(tmp_path_factory.mktemp("report"), prompt_table(24, prompt=prompts))
    sampling = {"height": 256, "width": 192, "num_steps": 12, "levels": 2}
    changes = {"sampling": sampling, "shards": 8, "workers": {"count": 1, "batch_size": 4}}
    spec = JobSpec.model_validate(spec.model_dump() | changes)
    plan, store = make_plan(spec), open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    for worker, shards in enumerate(((0, 1), (2,))):
        runner = Runner(spec, plan, store, FakeEngine(step_s=0.002), worker=worker)
        for shard in shards:
            list(
                runner.attempt(
                    Assignment(shard, 1, read_ahead=1 if shard == 0 else None, commit_first=shard != 0)
                )
            )
        runner.close()
    return report(store.url)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def browser(server) -> Iterator[Browser]:
    with Browser(find_browser() or "", proxy=server.url) as running:
        yield running


@pytest.fixture
def show(server, browser):
    """Opens a page in the browser."""

    def open_page(page: str, **how: Any) -> Tab:
        server.page = page.encode()
        server.asked.clear()
        return browser.open(PAGE, **how)

    return open_page


def test_nothing_is_fetched_and_nothing_runs(show, server, html):
    tab = show(html)
    assert tab.requests == [PAGE]
    assert server.of_the_page() == [PAGE]
    assert tab.complaints == []
    assert tab.evaluate("window.pwned") is None
    assert HOSTILE in tab.evaluate("[...document.querySelectorAll('figcaption')].map(c => c.innerText)")


ATTACK = f"<script>window.pwned = 1</script><img src='{LEAK}'>"


def test_the_policy_holds_where_escaping_would_not(show, server, html):
    tab = show(html.replace("<h1>", ATTACK + "<h1>"))
    assert server.of_the_page() == [PAGE]
    assert tab.evaluate("window.pwned") is None
    assert len(tab.complaints) == 2  # the script, the picture


def test_without_the_policy_the_server_would_see_it(show, server, html):
    bare = html.replace('http-equiv="Content-Security-Policy"', 'name="nothing"')
    tab = show(bare.replace("<h1>", ATTACK + "<h1>"))
    assert LEAK in server.of_the_page()
    assert tab.evaluate("window.pwned") == 1


def test_pictures_are_drawn(show, html):
    tab = show(html)
    sizes = tab.evaluate(
        "[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight, i.width])"
    )
    assert len(sizes) == 22
    for complete, width_px, height_px, shown_px in sizes:
        assert complete
        assert (width_px, height_px) == (192, 256)
        assert shown_px > 90


TEXT_INSIDE = """(() => {
    const chart = document.querySelector("%s"), box = chart.getBoundingClientRect();
    return [...chart.querySelectorAll("text")].map(text => text.getBoundingClientRect()).every(
        t => t.left > box.left - 2 && t.right < box.right + 2 &&
             t.top > box.top - 2 && t.bottom < box.bottom + 2)
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_charts_are_drawn(show, html, dark):
    tab = show(html, dark=dark)
    labels = tab.evaluate("[...document.querySelectorAll('svg')].map(s => s.getAttribute('aria-label'))")
    assert sorted(labels) == sorted(f"chart of {name}" for name in CHARTS)
    for name in CHARTS:
        chart = f"svg[aria-label='chart of {name}']"
        drawn = tab.screenshot(chart)
        assert drawn.width > 400
        counts = sorted((n for n, _ in drawn.getcolors(2**20)), reverse=True)
        assert sum(counts[1:]) > 0.02 * sum(counts), f"{name} is next to empty"
        inside = tab.evaluate(TEXT_INSIDE % chart)
        assert inside, f"text of {name} is cut off"


@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read_in_light_and_in_dark(show, html, dark):
    tab = show(html, dark=dark)
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    ink, soft = (
        tab.evaluate(f"getComputedStyle(document.querySelector('{e}')).color") for e in ("h1", ".sub")
    )
    label = tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
    assert (luminance(paper) < luminance(ink)) is dark
    assert contrast(ink, paper) > 10
    assert contrast(soft, paper) > 4.5
    assert label == ink


@pytest.mark.parametrize("width_px", [360, 768, 1600])
def test_no_width_makes_it_scroll_sideways(show, html, width_px):
    tab = show(html, width_px=width_px)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width_px


def test_it_works_from_a_disk(browser, html, tmp_path):
    path: Path = tmp_path / "report.html"
    path.write_text(html)
    tab = browser.open(path.as_uri())
    assert tab.requests == [path.as_uri()]
    assert tab.complaints == []
    assert tab.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
    assert tab.evaluate("document.querySelectorAll('svg').length") == len(CHARTS)


def luminance(colour: str) -> float:
    """WCAG's relative luminance of `rgb(r, g, b)`, in [0, 1]."""
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio, from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
