"""The report is one page that stands alone, for a job in any state, and reads little of it."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from s3_server import KEYS, S3Server
from small_jobs import SIDE_PX, commit_part, finish, prompt_table, small_job, small_part

from overtone.cluster.cli import main
from overtone.jobs.errors import UserError
from overtone.jobs.folder import JobFolder
from overtone.jobs.media import encode_media
from overtone.jobs.parts import AttemptFacts, Made, build_part, timings_name
from overtone.jobs.prompts import read_shard
from overtone.jobs.report import charts, report
from overtone.jobs.report.charts import Palette
from overtone.jobs.report.pages import COARSE_TO_FULL
from overtone.jobs.report.times import WorkerTime
from overtone.jobs.sampling import checkpoint_of, sampling_plan
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import open_store

NOW = 1_800_000_000.0
HOSTILE = "</figcaption><script>alert(1)</script><img src=\"http://evil.example/x.png\" onerror='alert(2)'>"


class Page(HTMLParser):
    """What a browser would see of a page: its tags, its pictures, its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self._text.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._text).split())

    def pictures(self) -> list[tuple[str, Image.Image]]:
        """(prompt, picture) of each."""
        found = []
        for tag, attributes in self.tags:
            if tag == "img":
                data = attributes["src"].removeprefix("data:image/jpeg;base64,")
                found.append((attributes["alt"], Image.open(io.BytesIO(base64.b64decode(data)))))
        return found

    def charts(self) -> set[str]:
        return {attributes["aria-label"] for tag, attributes in self.tags if tag == "svg"}

    def standalone(self) -> None:
        """Nothing in it names another resource, runs, or could do either."""
        policy = [a["content"] for tag, a in self.tags if a.get("http-equiv") == "Content-Security-Policy"]
        assert len(policy) == 1
        assert policy[0].startswith(
            "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
        )
        for tag, attributes in self.tags:
            assert tag not in {
                "script",
                "link",
                "iframe",
                "object",
                "embed",
                "base",
                "form",
                "audio",
                "video",
            }
            for name, value in attributes.items():
                assert not name.startswith("on"), f"{tag} {name}"
                if name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster"):
                    assert (value or "").startswith(("data:image/jpeg;base64,", "#")), f"{tag} {name}={value}"
                assert "url(http" not in (value or "")


def figures(page: Page) -> dict[str, str]:
    """The headline: label to figure."""
    text = re.findall(r"(rows made|rejected|left|rows an hour|denoising speed-up) ([\d.,]+)", page.text)
    return dict(reversed(text))


@pytest.fixture
def job(tmp_path):
    """Five shards of four rows, one prompt of them hostile."""
    prompts = [None if i == 6 else HOSTILE if i == 1 else f"a picture of {i}" for i in range(20)]
    spec, plan = small_job(tmp_path, prompt_table(20, prompt=prompts))
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    return spec, plan, store


def commit(job, *shards: int, **settings) -> None:
    """Two workers, a shard after another."""
    spec, plan, store = job
    for k, index in enumerate(shards):
        part = small_part(spec, plan, index, started=NOW - 100 + k // 2 * 3, worker=f"w{k % 2}", **settings)
        assert commit_part(store, part)


def test_a_finished_job(job):
    commit(job, 0, 1, 2, 3, 4, bad=["../row/9"])
    html = report(job[2].url, now=NOW)
    page = Page(html)
    page.standalone()
    assert figures(page) == {
        "rows made": "18",
        "rejected": "2",
        "left": "0",
        "rows an hour": f"{3600 * 18 / 8.01:,.0f}",
        "denoising speed-up": "0.67",  # expansions that take as long as a stage are not worth it
    }
    assert "Finished: 5 of 5 shards" in page.text
    assert "As of 2027-01-15 08:00 UTC" in page.text
    assert page.charts() == {
        f"chart of {name}" for name in ("throughput", "stages", "timeline", "sizes", "grids", "saving")
    }
    step = sampling_plan(job[0], checkpoint_of(job[0])).step_cost.step
    ideal = 2 * step(4) / (step(1) + step(4))  # as many steps on either grid
    assert f"by FLOPs it would be {ideal:.2f}\N{MULTIPLICATION SIGN}" in page.text
    prompts = [prompt for prompt, _ in page.pictures()]
    assert prompts == [HOSTILE if i == 1 else f"a picture of {i}" for i in range(20) if i not in (6, 9)]
    assert all(picture.size == (SIDE_PX, SIDE_PX) for _, picture in page.pictures())
    assert "../row/9 RowError was bad denoise 1" in page.text
    assert "InvalidRow" in page.text
    assert "model: id: tiny" in page.text
    assert "pyarrow" in page.text
    assert html == report(job[2].url, now=NOW)


def test_prompts_are_data(job):
    commit(job, 0)
    html = report(job[2].url, now=NOW)
    assert "evil.example" in html
    assert "<script" not in html
    assert html.count("<img") == 4
    Page(html).standalone()


def test_a_job_that_just_began(job):
    page = Page(report(job[2].url, now=NOW))
    page.standalone()
    assert "Not finished: 0 of 5 shards, no part yet" in page.text
    assert "No pictures yet" in page.text
    assert "Nothing is timed yet" in page.text
    assert "predicted speed-up" in page.text
    assert page.charts() == set()
    assert figures(page) == {"rows made": "0", "rejected": "0", "left": "20"}


def test_a_job_on_its_way(job):
    commit(job, 0, 2)
    page = Page(report(job[2].url, now=NOW))
    assert "Not finished: 2 of 5 shards" in page.text
    assert figures(page)["left"] == "12"
    assert "4 batches of 2 rows" in page.text
    assert len(page.pictures()) == 8


def test_a_job_of_rejects_alone(job):
    commit(job, 0, bad=[f"../row/{i}" for i in range(4)])
    page = Page(report(job[2].url, now=NOW))
    page.standalone()
    assert figures(page)["rejected"] == "4"
    assert "No pictures yet" in page.text
    assert page.charts() == {"chart of throughput", "chart of stages"}


def test_webdataset(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(8), format="webdataset")
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    finish(store, spec, plan)
    page = Page(report(store.url, now=NOW))
    assert [prompt for prompt, _ in page.pictures()] == [f"a picture of number {i}" for i in range(8)]


def test_videos_show_their_first_frame(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(2))
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    read = read_shard(spec, plan.files[0], 0, 2)
    frames = np.zeros((5, 64, 48, 3), np.uint8)  # [T, H, W, 3]
    frames[0, ..., 0] = 255
    data = encode_media(frames, spec.output)
    made = [Made(row, data, 64, 48, 10, (), 0.0) for row in read.rows]
    part = build_part(
        spec, plan, plan.shard(0), attempt=AttemptFacts("a", "w", "cpu"), made=made, rejects=[],
        passthrough=read.passthrough, first_row=0, timings=[], kind="video",
    )  # fmt: skip
    assert commit_part(store, part)
    page = Page(report(store.url, now=NOW))
    assert "2 videos by their first frames" in page.text
    picture = page.pictures()[0][1]
    assert picture.size == (48, 64)
    assert picture.getpixel((24, 32))[0] > 200


def test_a_full_resolution_job_saves_nothing(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(4))
    spec = JobSpec.model_validate(spec.model_dump() | {"sampling": {"mode": "fullres"}})
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    finish(store, spec, plan)
    text = Page(report(store.url, now=NOW)).text
    assert "there is nothing that it saves" in text
    assert "denoising speed-up" not in text


def test_what_is_missing_or_broken_is_said_and_the_rest_is_shown(job):
    _, plan, store = job
    commit(job, 0, 1, 2)
    store.delete(timings_name(plan, 0))
    store.put("data/train-00001-of-00005.parquet", b"PAR1 not really")
    page = Page(report(store.url, now=NOW))
    assert "The timings of 1 of 3 parts are missing" in page.text
    assert "Pictures of data/train-00001-of-00005.parquet cannot be shown" in page.text
    assert len(page.pictures()) == 8


def test_a_long_table_of_rejects_is_cut_and_says_so(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(300, prompt=[None] * 300), shard_rows=300)
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    finish(store, spec, plan)
    page = Page(report(store.url, now=NOW))
    assert "300: 300 InvalidRow. The first 200 are shown" in page.text
    assert "../row/199" in page.text
    assert "../row/200" not in page.text


@pytest.fixture
def bucket(monkeypatch):
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    with S3Server() as server:
        yield server, f"s3://{server.bucket()}/job"


def test_of_many_parts_few_are_read(tmp_path, bucket):
    server, url = bucket
    place = {"endpoint_url": server.endpoint_url, "region": "us-east-1"}
    spec, plan = small_job(tmp_path, prompt_table(60), shard_rows=1, output=url, **place)
    store = open_store(url, **place)
    JobFolder(store).open(spec, plan)
    finish(store, spec, plan, bad=["../row/5"])
    server.requests.clear()
    page = Page(report(url, **place, pictures=4, tables=10, now=NOW))
    page.standalone()
    assert len(page.pictures()) == 4
    assert "stand for all" in page.text
    read = [
        path.split("/job/")[1] for method, path, _ in server.requests if method == "GET" and "/job/" in path
    ]
    parts = {key for key in read if key.startswith("data/")}
    assert parts == {f"data/train-{k:05}-of-00060.parquet" for k in (0, 15, 30, 45)}
    assert all(method in ("GET", "HEAD") for method, _, _ in server.requests)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 20])
def test_the_largest_grid_has_the_strongest_shade(count):
    palette = Palette((4 * i, 4 * i) for i in range(1, count + 1))
    shades = [COARSE_TO_FULL.index(palette.name(("denoise", grid))) for grid in palette.grids]
    assert shades == sorted(shades)
    assert shades[-1] == len(COARSE_TO_FULL) - 1
    assert len(set(shades)) == min(count, len(COARSE_TO_FULL))
    assert len(palette.legend(["denoise", "expand"])) == len(set(shades)) + 1


def test_workers_of_one_name_are_told_by_their_nodes():
    """As those of a job and of its retry, each with a Ray of its own."""
    spent = {("denoise", (2, 2)): 0.5}
    workers = [
        WorkerTime(name, "cpu", node, 1.0, 1.0, spent, spent)
        for name, node in (("w0", "a" * 56), ("w1", "b" * 56), ("w0", "c" * 56))
    ]
    figure = charts.stages(workers, Palette([(2, 2)]))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["all workers", "w0 on aaaaaa", "w1", "w0 on cccccc"]


def test_no_pictures_if_none_are_wanted(job):
    commit(job, 0)
    assert Page(report(job[2].url, pictures=0, now=NOW)).pictures() == []


def test_the_command(job, tmp_path):
    commit(job, 0)
    shown = CliRunner().invoke(main, ["report", job[2].url, "--to", str(tmp_path / "r.html"), "--rows", "3"])
    assert shown.exit_code == 0
    assert "report in" in shown.output
    assert len(Page((tmp_path / "r.html").read_text()).pictures()) == 3


def test_no_job_no_report(tmp_path):
    with pytest.raises(UserError, match="holds no job"):
        report(str(tmp_path))
