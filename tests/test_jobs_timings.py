"""The timings of a made-up job, whose figures are known beforehand."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone.jobs.columns import TIMINGS
from overtone.jobs.report import Timings
from overtone.jobs.report.timings import COLUMNS

START = 1_800_000_000.0
ROWS = 4
BATCH = (  # stage, grid, tokens, steps, seconds: 10 s in all, 8.5 s of them denoising
    ("text_encode", None, None, None, 0.5),
    ("denoise", (8, 8), 16, 6, 2.4),
    ("expand", (16, 16), 64, 0, 0.1),
    ("denoise", (16, 16), 64, 10, 6.0),
    ("vae_decode", (16, 16), 64, None, 1.0),
)


def attempt(
    shard: int, start: float, *, worker: str = "w0", batches: int = 2, slow: float = 1.0
) -> list[dict[str, Any]]:
    """An attempt's lines: a second of reading, its batches one after the other, each encoded in the two
    seconds after it, and half a second each of writing and uploading. `slow` stretches the first batch."""
    lines = []

    def note(batch: int | None, stage: str, at: float, seconds: float, rows: int = ROWS, **grid: Any) -> None:
        about = {"batch": batch, "stage": stage, "seconds": seconds, "rows": rows, "start_s": at}
        about |= {"shard": shard, "worker": worker, "device": "cuda:0", "node": "here"}
        about |= {"attempt": f"s{shard}-at-{start:.0f}"}
        lines.append(about | {"start": datetime.fromtimestamp(start + at, UTC)} | grid)

    note(None, "read", 0.0, 1.0)
    at = 1.0
    for batch in range(batches):
        for stage, grid, tokens, steps, seconds in BATCH:
            seconds *= slow if batch == 0 else 1
            height, width = grid or (None, None)
            note(batch, stage, at, seconds, height=height, width=width, tokens=tokens, steps=steps)
            at += seconds
        note(batch, "image_encode", at, 2.0)
    note(None, "part_write", at + 2.0, 0.5, rows=ROWS * batches)
    note(None, "upload", at + 2.5, 0.5, rows=ROWS * batches)
    return lines


def timings(*attempts: list[dict[str, Any]], weight: float = 1.0) -> Timings:
    lines = [line for one in attempts for line in one]
    return Timings(pa.Table.from_pylist(lines, schema=TIMINGS).select(COLUMNS), weight)


@pytest.fixture
def job() -> Timings:
    """Two workers, two shards each, one right after the other."""
    return timings(
        attempt(0, START, slow=3),
        attempt(1, START, worker="w1", slow=3),
        attempt(2, START + 44),
        attempt(3, START + 44, worker="w1"),
    )


def test_rows_and_working_time(job):
    assert (job.rows, job.began) == (32, START)
    assert job.elapsed_s == pytest.approx(68)
    assert job.batch_sizes() == {ROWS: 8}


def test_a_workers_time(job):
    one, other = job.workers()
    assert (one.worker, other.worker, one.device, one.rows) == ("w0", "w1", "cuda:0", 16)
    assert one.wall_s == pytest.approx(68)
    assert one.seconds["denoise", (16, 16)] == pytest.approx(6 * (3 + 1 + 1 + 1))
    assert one.of("denoise") == pytest.approx(8.4 * 6)
    assert one.of("image_encode") == pytest.approx(8)
    assert one.waiting_s == pytest.approx(68 - 60)  # reading, and the last commit of each shard


def test_the_first_batch_of_a_worker_does_not_count(job):
    small, large = job.grids()
    assert (small.height, small.tokens, small.steps, small.batches) == (8, 16, 6, 6)
    assert (large.step_s, large.step_row_s, large.row_s) == pytest.approx((0.6, 0.15, 1.5))
    assert small.share + large.share == pytest.approx(1)
    assert len(large.points) == 6


def test_saving(job):
    saving = job.saving()
    assert saving.ideal == pytest.approx(16 * 64 / (6 * 16 + 10 * 64))
    assert saving.measured == pytest.approx(16 * 0.6 / 8.5)
    assert saving.row_s == pytest.approx(
        {("denoise", (8, 8)): 0.6, ("expand", None): 0.025, ("denoise", (16, 16)): 1.5}
    )
    assert not saving.warming


def test_where_there_are_only_first_batches_they_count():
    saving = timings(attempt(0, START, batches=1)).saving()
    assert saving.measured == pytest.approx(16 * 0.6 / 8.5)
    assert saving.warming


def test_a_batch_may_be_denoised_in_several_goes():
    """Eight rows at once on the coarse grid, twice four on the full one."""
    lines = []
    for batch, at in enumerate((0.0, 100.0)):
        for stage, side, rows, steps, seconds, begin in (
            ("denoise", 8, 8, 6, 2.4, 0.0),
            ("expand", 16, 4, 0, 0.1, 2.4),
            ("denoise", 16, 4, 10, 6.0, 2.5),
            ("expand", 16, 4, 0, 0.1, 8.5),
            ("denoise", 16, 4, 10, 6.0, 8.6),
        ):
            about = {"shard": 0, "batch": batch, "stage": stage, "rows": rows, "seconds": seconds}
            about |= {"worker": "w0", "device": "cuda:0", "node": "here", "start_s": at + begin}
            about |= {"height": side, "width": side, "tokens": side * side // 4, "steps": steps}
            lines.append(about | {"start": datetime.fromtimestamp(START + at + begin, UTC)})
    job = timings(lines)
    small, large = job.grids()
    assert (small.batches, small.batch_rows, large.batches, large.batch_rows) == (1, 8, 2, 4)
    assert (small.row_s, large.row_s) == pytest.approx((0.3, 1.5))
    assert job.batch_sizes() == {4: 4}
    assert job.batches.rows.tolist() == [8, 8]
    saving = job.saving()
    assert saving.ideal == pytest.approx(16 * 64 / (6 * 16 + 10 * 64))
    assert saving.measured == pytest.approx(8 * 16 * 0.15 / 14.6)
    assert sum(saving.row_s.values()) == pytest.approx(14.6 / 8)


def test_what_goes_on_beside_the_denoiser_does_not_fill_the_wall_time():
    lines = attempt(0, START, batches=2)
    first = next(line for line in lines if line["stage"] == "vae_decode")
    first |= {"seconds": 5.0}  # four of them beside the next batch: half a second of text, 3.5 of denoising
    (worker,) = timings(lines).workers()
    assert worker.of("vae_decode") == pytest.approx(6)
    assert worker.exposed["vae_decode", None] == pytest.approx(6 - 3.5)
    assert worker.denoise_s == pytest.approx(2 * 8.5)
    assert worker.exposed["denoise", (16, 16)] == pytest.approx(12)


def test_a_retry_of_a_shard_is_an_attempt_of_its_own():
    """Its batches are numbered from 0 again, and an hour lies between."""
    first, retried = attempt(0, START), attempt(0, START + 3600, batches=1)
    job = timings(first, retried)
    assert len(job.batches.rows) == 3
    assert job.batches.seconds.tolist() == pytest.approx([8.5] * 3)
    (worker,) = job.workers()
    assert worker.wall_s == pytest.approx(24 + 14)
    assert worker.denoise_s == pytest.approx(3 * 8.5)
    assert worker.exposed["text_encode", None] == pytest.approx(3 * 0.5)
    assert sum(worker.exposed.values()) <= worker.wall_s
    assert job.batch_sizes() == {ROWS: 3}
    assert job.timeline().denoise_share <= 1


def test_some_of_the_shards_stand_for_all(job):
    many = timings(attempt(0, START, slow=3), attempt(2, START + 44), weight=5.0)
    few = timings(attempt(0, START, slow=3), attempt(2, START + 44))
    assert many.rows == 5 * few.rows
    assert many.batch_sizes() == {ROWS: 20}
    assert many.workers()[0].of("denoise") == pytest.approx(5 * few.workers()[0].of("denoise"))
    assert many.saving().row_s == pytest.approx(few.saving().row_s)
    assert many.throughput().rows_per_minute == pytest.approx(5 * few.throughput().rows_per_minute)


def test_a_pause_is_no_working_time():
    job = timings(attempt(0, START), attempt(1, START + 86_400))
    assert job.elapsed_s == pytest.approx(2 * 24)
    assert job.workers()[0].wall_s == pytest.approx(2 * 24)
    (pause,) = job.throughput().pauses
    assert pause == pytest.approx((24, 86_400 - 24))


def test_a_short_gap_is_working_time():
    job = timings(attempt(0, START), attempt(1, START + 50))
    assert job.elapsed_s == pytest.approx(74)
    assert job.throughput().pauses == ()


def test_the_timeline_is_of_later_batches_over_the_end_of_a_shard(job):
    shown = job.timeline()
    assert (shown.worker, shown.batches) == ("w0", 3)
    assert shown.seconds == pytest.approx(10 + 4 + 20)
    assert shown.denoise_share == pytest.approx(3 * 8.5 / 34)
    beside = {bar.what[0]: (bar.begin_s, bar.seconds) for bar in shown.bars if bar.batch is None}
    assert beside["part_write"] == pytest.approx((12, 0.5))
    assert beside["upload"] == pytest.approx((12.5, 0.5))
    assert beside["read"] == pytest.approx((13, 1))
    assert all(0 <= bar.begin_s <= bar.begin_s + bar.seconds <= shown.seconds + 1e-6 for bar in shown.bars)


def test_a_job_of_rejects_alone_denoised_nothing():
    job = timings(attempt(0, START, batches=0))
    assert len(job) == 3
    assert (job.rows, job.grids(), job.saving(), job.timeline(), job.batch_sizes()) == (0, [], None, None, {})
    assert job.throughput().rows_per_minute.sum() == 0


def test_lines_without_a_start_are_left_out():
    lines = [line | {"start": None, "start_s": None} for line in attempt(1, START)]
    assert timings(attempt(0, START), lines).rows == 2 * ROWS
    assert not len(timings(lines))


@given(
    starts=st.lists(
        st.tuples(st.integers(0, 500), st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=8
    )
)
def test_a_chart_over_time_loses_no_row_and_invents_no_worker(starts):
    job = timings(
        *(
            attempt(shard, START + begin, worker=f"w{worker}", batches=batches)
            for shard, (begin, worker, batches) in enumerate(starts)
        )
    )
    shown = job.throughput()
    length_s = np.diff(shown.edges_s)
    assert (shown.rows_per_minute * length_s / 60).sum() == pytest.approx(job.rows)
    assert shown.workers.max() <= len({worker for _, worker, _ in starts}) + 1e-6
    assert length_s.sum() == pytest.approx(job.elapsed_s)
