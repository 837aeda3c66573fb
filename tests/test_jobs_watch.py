"""A job seen live: what is shown, when it ends, and how little is asked of the store."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from foreground import interruptible
from rich.console import Console
from small_jobs import commit_part, finish, prompt_table, small_job, small_part

from overtone.jobs.errors import StoreError, UserError
from overtone.jobs.folder import JobFolder
from overtone.jobs.parts import part_name, timings_name
from overtone.jobs.plan import JobPlan
from overtone.jobs.status import status, watch
from overtone.jobs.status.reader import StatusReader
from overtone.jobs.store import ObjectInfo, Store, open_store


class CountingStore(Store):
    """Passes on what readers ask for, and keeps it. `away`: every request fails. `broken`: a listing of this
    prefix breaks off after its first name."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner.config)
        self._inner = inner
        self.asked: list[str] = []
        self.listed: list[str] = []
        self.away = False
        self.broken = ""

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if self.away:
            raise StoreError("the store cannot be reached")

    def read(self, key: str, start: int | None = None, length: int | None = None) -> bytes:
        self._ask(f"read {key}")
        return self._inner.read(key, start, length)

    def open(self, key: str) -> BinaryIO:
        self._ask(f"open {key}")
        return self._inner.open(key)

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
        self._ask(f"list {prefix}")
        for info in self._inner.list(prefix, after=after):
            self.listed.append(info.key)
            yield info
            if prefix == self.broken:
                raise StoreError("the listing broke off")

    def head(self, key: str) -> ObjectInfo | None:
        self._ask(f"head {key}")
        return self._inner.head(key)

    def create(self, key: str, data: bytes | Path, *, attempt: str, content_type: str | None = None) -> bool:
        raise AssertionError("a reader writes nothing")

    def put(
        self, key: str, data: bytes | Path, *, content_type: str | None = None, durable: bool = True
    ) -> None:
        raise AssertionError("a reader writes nothing")

    def delete(self, key: str) -> None:
        raise AssertionError("a reader writes nothing")

    def sweep(self, *, older_than_s: float | None = None) -> int:
        raise AssertionError("a reader writes nothing")

    def probe_limits(self) -> tuple[bool, int]:
        raise AssertionError("a reader writes nothing")


@pytest.fixture
def job(tmp_path):
    """A job of five shards of four rows."""
    spec, plan = small_job(tmp_path, prompt_table(20))
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    return spec, plan, store


def commit(job, *indexes: int, **settings) -> None:
    spec, plan, store = job
    for index in indexes:
        assert commit_part(store, small_part(spec, plan, index, **settings))


def steps(*todo):
    """What happens at each pause; a pause too many is an error."""
    left = list(todo)
    return lambda seconds: left.pop(0)()


def test_a_log_gets_lines_until_the_job_is_done(job):
    out = io.StringIO()
    commit(job, 0)
    shown = watch(
        job[2],
        console=Console(file=out, width=40),
        pause=steps(
            lambda: commit(job, 1, bad=["../row/7"]),
            lambda: None,
            lambda: commit(job, 2, 3, 4),
        ),
    )
    assert shown.finished
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("4 of 20 rows (20%); ")
    assert lines[1] == "rejected ../row/7: RowError: was bad"
    assert lines[2].startswith("8 of 20 rows (40%), 1 rejected; ")
    assert lines[3:] == ["20 of 20 rows (100%), 1 rejected; finished"]


def test_a_terminal_gets_a_view(job):
    out = io.StringIO()
    commit(job, 0, 1, bad=["../row/7"])
    console = Console(file=out, force_terminal=True, width=100, height=60, color_system=None)
    shown = watch(job[2], console=console, pause=steps(lambda: commit(job, 2, 3, 4, worker="w1")))
    assert shown.finished
    first, last = out.getvalue().split("20/20 rows (100%)", 1)
    assert "8/20 rows (40%)" in first
    assert "7 of 20 rows done, 1 rejected, 12 left; 2 of 5 shards" in first
    assert "19 of 20 rows done, 1 rejected, 0 left; 5 of 5 shards" in last
    assert "finished" in last
    for text in ("denoise", "text_encode", "part_write", "w0", "w1", "../row/7", "RowError: was bad"):
        assert text in last
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")  # the cursor is back


def test_many_workers_and_strange_rows_fit_a_screen(tmp_path):
    spec, plan = small_job(
        tmp_path, prompt_table(12, row_id=[f"\x1b[2J{i}" for i in range(12)]), shard_rows=1
    )
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    for index in range(12):
        part = small_part(spec, plan, index, worker=f"w{index:02}", bad=["\x1b[2J3"])
        assert commit_part(store, part)
    for terminal in (True, False):
        out = io.StringIO()
        watch(store, console=Console(file=out, force_terminal=terminal, width=100, height=60))
        assert "\x1b[2J" not in out.getvalue()
        assert " [2J3" in out.getvalue()
        assert ("and 4 more" in out.getvalue()) is terminal


def test_a_store_that_is_away_for_a_while(job):
    store, out = CountingStore(job[2]), io.StringIO()

    def leave() -> None:
        store.away = True

    def come_back() -> None:
        store.away = False
        finish(job[2], *job[:2])

    watch(store, console=Console(file=out), pause=steps(leave, lambda: None, come_back))
    assert out.getvalue().splitlines()[1:] == [
        "the store cannot be reached",
        "20 of 20 rows (100%); finished",
    ]


def test_no_job_nothing_to_watch(tmp_path):
    with pytest.raises(UserError, match="holds no job"):
        watch(open_store(str(tmp_path)), console=Console(file=io.StringIO()))


def test_a_look_costs_what_is_new(job):
    store = CountingStore(job[2])
    reader = StatusReader(store)
    commit(job, 0, 1, 3, bad=["../row/7"])
    reader.read()
    store.asked.clear()
    store.listed.clear()
    commit(job, 2)
    found = reader.read()
    assert store.asked == [
        "list _job/epochs/",
        "list data/",
        "list timings/",
        "read timings/part-00002.parquet",
        "list rejects/",
        "list _job/quarantine/",
    ]
    assert store.listed == [  # no name from before the first shard that was missing
        *("data/train-00002-of-00005.parquet", "data/train-00003-of-00005.parquet"),
        *("timings/part-00002.parquet", "timings/part-00003.parquet"),
    ]
    assert (found.rows_done, found.rows_rejected, found.shards_done) == (15, 1, 4)
    assert found.seconds_by_stage == status(job[2].url).seconds_by_stage


def calls_of(function: Callable, work: Callable[[], object]) -> int:
    """How often this thread calls a Python function while it works."""
    calls = 0

    def note(frame, event, argument):
        nonlocal calls
        calls += event == "call" and frame.f_code is function.__code__

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def test_a_look_asks_nothing_about_parts_that_were_there(job):
    reader = StatusReader(job[2])
    commit(job, 1, 2, 3)  # the first one is missing, so that every look lists all names
    assert calls_of(JobPlan.shard, reader.read) == 3
    assert calls_of(JobPlan.shard, reader.read) == 0
    commit(job, 4)
    assert calls_of(JobPlan.shard, reader.read) == 1
    assert calls_of(JobPlan.shard, reader.read) == 0
    assert reader.read(now=0.0) == status(job[2].url, now=0.0)


def test_a_part_that_was_made_again_counts_once(job):
    _, plan, store = job
    commit(job, 1, 2)
    reader = StatusReader(store)
    reader.read()
    store.delete(part_name(plan, 1))
    commit(job, 1, bad=["../row/5"])
    assert reader.read(now=0.0) == status(store.url, now=0.0)


def test_a_listing_that_breaks_off_is_made_up_for(job):
    store = CountingStore(job[2])
    reader = StatusReader(store)
    commit(job, 0, 1, 2, bad=["../row/2", "../row/9"])
    for store.broken in ("data/", "timings/", "rejects/"):
        with pytest.raises(StoreError, match="broke off"):
            reader.read()
    store.broken = ""
    found = reader.read(now=0.0)
    assert (found.rows_done, found.rows_rejected, found.rows_left) == (10, 2, 8)
    assert found == status(job[2].url, now=0.0)


def test_timings_that_were_lost_are_passed_over(job):
    _, plan, store = job
    commit(job, 0, 1)
    whole = status(store.url).seconds_by_stage
    store.put(timings_name(plan, 0), b"")  # its machine lost power
    found = status(store.url)
    assert found.seconds_by_stage["denoise"] == whole["denoise"] / 2
    assert found.shards_done == 2


def test_rejects_of_a_shard_that_came_late_are_seen(job):
    reader = StatusReader(job[2])
    commit(job, 1)
    assert reader.read().rows_rejected == 0
    commit(job, 0, bad=["../row/2"])
    assert reader.read().rows_rejected == 1
    commit(job, 2, bad=["../row/9", "../row/10"])
    found = reader.read()
    assert (found.rows_rejected, found.rejects_by_class) == (3, {"RowError": 3})
    assert [reject.row_id for reject in found.newest_rejects] == ["../row/10", "../row/9", "../row/2"]


def test_ctrl_c_on_a_terminal_leaves_it_as_it_was(job):
    commit(job, 0)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "overtone.cluster.cli", "watch", job[2].url, "--every", "60"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
        preexec_fn=interruptible,
    )
    os.close(theirs)
    shown = _read(ours, until=b"4/20 rows")
    process.send_signal(signal.SIGINT)
    shown += _read(ours, until=None)
    os.close(ours)
    assert process.wait(timeout=30) == 130
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
    assert b"Traceback" not in shown
    assert b"Aborted" not in shown


def _read(terminal: int, until: bytes | None) -> bytes:
    """What a terminal shows up to some text, or until nobody writes to it any more."""
    shown = b""
    while until is None or until not in shown:
        try:
            shown += os.read(terminal, 4096)
        except OSError:
            assert until is None, shown.decode()
            break
    return shown
