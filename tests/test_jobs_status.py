"""Status tells from the folder alone how far a job is; progress tells it while it runs."""

from __future__ import annotations

import io
import json
import os
import re
import time

import pytest
from PIL import Image
from small_jobs import commit_part, finish, prompt_table, small_job, small_part

from overtone.cluster.dispatch import Dispatcher, RowsDone, ShardCommitted
from overtone.cluster.driver.tally import Tally
from overtone.jobs.errors import UserError
from overtone.jobs.folder import JobFolder
from overtone.jobs.preview import preview
from overtone.jobs.report import contact_sheet, first_pictures, report
from overtone.jobs.rows import Quarantined
from overtone.jobs.shard_set import ShardSet
from overtone.jobs.status import Progress, Snapshot, status
from overtone.jobs.status.sums import Pace
from overtone.jobs.store import open_store
from overtone.jobs.verify import verify
from overtone.jobs.words import duration

NOW = 1_800_000_000.0
NOBODY = Dispatcher(num_shards=1, num_rows=1)


@pytest.fixture
def job(tmp_path):
    """A job of five shards of four rows."""
    prompts = [None if i == 6 else f"a picture of {i}" for i in range(20)]
    spec, plan = small_job(tmp_path, prompt_table(20, prompt=prompts))
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    return spec, plan, store


def commit_at(job, index: int, time_s: float, **settings) -> None:
    spec, plan, store = job
    part = small_part(spec, plan, index, **settings)
    assert commit_part(store, part)
    os.utime(f"{store.url}/{part.key}", (time_s, time_s))


def test_a_job_that_just_began(job):
    found = status(job[2].url, now=NOW)
    assert (found.rows_total, found.rows_done, found.rows_left, found.shards_done) == (20, 0, 20, 0)
    assert (found.rows_per_second, found.eta_s, found.last_part_s, found.epoch) == (None, None, None, 0)
    assert "0 of 20 rows done, 0 rejected, 20 left (0%)" in found.text()
    assert "no part yet" in found.text()


def drive_at(job, time_s: float) -> None:
    """A driver takes the job up."""
    store = job[2]
    epoch = JobFolder(store).take_epoch("a")
    os.utime(f"{store.url}/_job/epochs/{epoch:06d}.json", (time_s, time_s))


def test_a_job_in_the_middle(job):
    folder = JobFolder(job[2])
    drive_at(job, NOW - 60)
    folder.add_quarantine(Quarantined(1, "../row/7", "WorkerDied", "", 2))
    commit_at(job, 0, NOW - 50, worker="w0")
    commit_at(job, 1, NOW - 30, worker="w1", bad=["../row/7"])
    commit_at(job, 3, NOW - 10, worker="w1")
    found = status(job[2].url, now=NOW)
    assert (found.rows_done, found.rows_rejected, found.rows_left) == (10, 2, 8)
    assert (found.shards_done, found.shards_total, found.finished) == (3, 5, False)
    assert (found.epoch, found.rows_quarantined) == (1, 1)
    assert found.rows_per_second == pytest.approx(12 / 50)
    assert found.eta_s == pytest.approx(8 / (12 / 50))
    assert found.last_part_s == pytest.approx(10)
    assert found.seconds_by_stage["denoise"] == pytest.approx(5 * 0.5)
    assert set(found.seconds_by_stage) == {
        *("read", "text_encode", "denoise", "expand", "part_write", "upload"),
    }
    workers = [(worker.worker, worker.parts, worker.rows) for worker in found.workers]
    assert workers == [("w0", 1, 4), ("w1", 2, 6)]
    assert "0.24 rows/s, ETA 33s; last part 10s ago" in found.text()
    assert "rejects: 1 InvalidRow, 1 RowError\n" in found.text()
    assert found.line() == "12 of 20 rows (60%), 2 rejected; 0.24 rows/s, ETA 33s; last part 10s ago"
    assert [(reject.row_id, reject.error_class) for reject in found.newest_rejects] == [
        ("../row/7", "RowError"),
        ("../row/6", "InvalidRow"),
    ]
    assert json.loads(json.dumps(found.as_dict()))["workers"][1]["rows"] == 6


def test_the_rate_is_of_the_newest_driver(job):
    drive_at(job, NOW - 90_000)
    commit_at(job, 0, NOW - 89_990)
    commit_at(job, 1, NOW - 89_980)
    drive_at(job, NOW - 100)
    found = status(job[2].url, now=NOW)
    assert (found.rows_per_second, found.eta_s, found.epoch) == (None, None, 2)
    assert "rate not known yet; last part 1d 0h ago" in found.text()
    commit_at(job, 2, NOW - 60)
    found = status(job[2].url, now=NOW)
    assert found.rows_per_second == pytest.approx(4 / 40)  # the night in between does not count


def test_workers_that_commit_at_the_same_time_are_not_taken_for_fast_ones(job):
    drive_at(job, NOW - 100)
    for index in range(4):
        commit_at(job, index, NOW - 1 + index / 10)
    assert status(job[2].url, now=NOW).rows_per_second == pytest.approx(16 / 99.3)


def test_the_rate_is_of_the_last_minutes_of_work(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(50), shard_rows=1)
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    job = spec, plan, store
    drive_at(job, NOW - 10_000)
    for index in range(3):
        commit_at(job, index, NOW - 9_000 + index)
    assert status(store.url, now=NOW).rows_per_second == pytest.approx(3 / 1_002)  # few parts: all of them
    for index in range(3, 28):
        commit_at(job, index, NOW - 30 * (27 - index))
    assert status(store.url, now=NOW).rows_per_second == pytest.approx(20 / 600)


def test_a_job_that_stands_still_has_no_eta(job):
    commit_at(job, 0, NOW - 9000)
    commit_at(job, 1, NOW - 8990)
    found = status(job[2].url, now=NOW)
    assert found.rows_per_second == pytest.approx(0.4)
    assert found.eta_s is None
    assert "nothing has been written for a while" in found.text()


def test_a_finished_job(job):
    spec, plan, store = job
    finish(store, spec, plan)
    found = status(store.url)
    assert found.finished
    assert (found.rows_done, found.rows_rejected, found.rows_left, found.eta_s) == (19, 1, 0, None)
    assert "19 of 20 rows done, 1 rejected, 0 left (100%)" in found.text()
    assert "\nfinished\n" in found.text()
    assert found.size_bytes == sum(info.size_bytes for info in store.list("data/"))


def test_a_copied_folder_has_no_pace(job, tmp_path):
    """All its parts seem to have come within the moment of the copying."""
    spec, plan, store = job
    made = time.time()
    for index in range(2):
        assert commit_part(store, small_part(spec, plan, index))
    copied = made + 7200
    for path in (tmp_path / "out").rglob("*"):
        os.utime(path, (copied, copied))
    found = status(store.url, now=copied + 60)
    assert (found.rows_per_second, found.eta_s, found.shards_done) == (None, None, 2)
    assert found.last_part_s == pytest.approx(7260, abs=30)
    assert "rate not known yet; last part 2h 0" in found.text()


def test_no_job_no_status(tmp_path):
    with pytest.raises(UserError, match="holds no job"):
        status(str(tmp_path))


def test_a_contact_sheet_shows_the_first_pictures(job):
    spec, plan, store = job
    assert list(first_pictures(store, 3)) == []
    finish(store, spec, plan)
    pictures = list(first_pictures(store, 5))
    assert [prompt for prompt, _ in pictures] == [f"a picture of {i}" for i in range(5)]
    sheet = Image.open(io.BytesIO(contact_sheet(pictures, columns=3, cell_px=16)))
    assert sheet.width == 3 * (16 + 8) + 8
    drawn = sheet.crop((8, 8, 24, 24))
    assert drawn.tobytes() == pictures[0][1].tobytes()
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])


# Input rows that ask for several


def test_rows_and_input_rows_are_two_counts_and_the_same_everywhere(tmp_path):
    """Of seven rows to make one is a bad one, and three rows are asked for without a prompt."""
    counts, prompts = [1, 3, 1, 3, 1, 2], ["a", "b", "c", None, "d", "e"]
    ids = [str(i) for i in range(6)]
    spec, plan = small_job(tmp_path, prompt_table(6, row_id=ids, prompt=prompts, num_images=counts))
    assert plan.unit == "input row"
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    tally = Tally(plan, ShardSet(plan.num_shards), unit=plan.unit)
    log = io.StringIO()
    with Progress(stream=log) as progress:
        tally.record(RowsDone(0, 0, 1, ("0", "1#0", "1#1", "1#2", "2")))
        assert tally.snapshot(NOBODY).rows_done == 4  # the whole shard at most
        for shard in range(plan.num_shards):
            footer = small_part(spec, plan, shard, bad=["1#1"]).footer
            tally.record(ShardCommitted(0, shard, 1, footer.rows + len(footer.rejects), len(footer.rejects)))
        progress(tally.snapshot(NOBODY))
    finish(store, spec, plan, bad=["1#1"])
    assert log.getvalue() == "6 of 6 input rows (100%), 0 workers, 4 rejected\n"
    assert (tally.rows, tally.rejects) == (7, 4)

    found = status(store.url)
    assert found.text().startswith("small: 7 rows made, 4 rejected, 0 of 6 input rows left (100%)\n")
    assert found.line() == "6 of 6 input rows (100%), 4 rejected; finished"
    assert (found.as_dict()["rows_made"], found.as_dict()["unit"]) == (7, "input row")
    assert "7 rows and 4 rejects in 2 of 2 parts, for 11 rows asked for" in verify(store.url).text()
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", report(store.url)))
    assert "rows made 7 of 6 input rows rejected 4 left 0 " in page
    assert preview(spec).text().startswith("small: 6 input rows in 2 shards from 1 file\n")


# Progress


def snapshot(done: int, *, note: str | None = None, rejected: int = 0, retries: int = 0) -> Snapshot:
    return Snapshot(100, done + rejected, rejected, 10, done // 10, 2, 1, retries, note)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_now_and_then():
    clock, log = Clock(), io.StringIO()
    with Progress(stream=log, clock=clock) as progress:
        for second in range(31):
            clock.now = second
            progress(snapshot(second, note="a worker died" if second == 15 else None))
        progress(snapshot(33, rejected=2, retries=1))
    assert log.getvalue().splitlines() == [
        "0 of 100 rows (0%), 2 workers (+1 starting)",
        "10 of 100 rows (10%), 1 rows/s, ETA 1m 30s, 2 workers (+1 starting)",
        "a worker died",
        "20 of 100 rows (20%), 1 rows/s, ETA 1m 20s, 2 workers (+1 starting)",
        "30 of 100 rows (30%), 1 rows/s, ETA 1m 10s, 2 workers (+1 starting)",
        "35 of 100 rows (35%), 1.17 rows/s, ETA 56s, 2 workers (+1 starting), 2 rejected, 1 retry",
    ]


def test_the_rate_is_of_the_last_minutes():
    clock, log = Clock(), io.StringIO()
    with Progress(stream=log, clock=clock) as progress:
        for minute in range(11):
            clock.now = 60 * minute
            progress(snapshot(0 if minute < 6 else (minute - 5) * 12))
    assert "0.2 rows/s, ETA 3m 20s" in log.getvalue().splitlines()[-1]


def test_quiet_is_quiet():
    log = io.StringIO()
    with Progress(enabled=False, stream=log) as progress:
        progress(snapshot(1, note="x"))
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    with Progress(stream=terminal) as progress:
        progress(snapshot(40))
        progress(snapshot(60, note="a worker [died]"))
    assert "60/100" in terminal.getvalue()
    assert "a worker [died]" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m 00s"), (185, "3m 05s"), (7800, "2h 10m"), (273_600, "3d 4h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("behind_s", [0.0, 180.0, -180.0])
def test_parts_that_appear_are_news_whatever_the_stores_clock_says(behind_s):
    pace = Pace()
    begin = 1_000_000.0
    for minute in range(6):
        now = begin + 60 * minute
        pace.add([(now - 1 - behind_s, 10)])  # written a second ago, by the store's clock
        _, last_part_s, going = pace.recent(since=begin - 600 - behind_s, now=now)
        if minute:
            assert last_part_s <= 60
            assert going
    _, last_part_s, going = pace.recent(since=begin - 600 - behind_s, now=now + 3600)
    assert 3600 <= last_part_s <= 3660  # that nothing came for an hour is still seen
    assert not going
