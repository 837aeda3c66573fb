"""A runner with an engine that has no model: batches, memory, rows that go wrong, what overlaps what, and
where the time went."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engine import FakeEngine, FakeTrajectories

from overtone.cluster.dispatch import (
    Assignment,
    RowsDone,
    RowsStarted,
    ShardAlive,
    ShardCommitted,
    ShardFailed,
    ShardGenerated,
    ShardReturned,
    WorkerDraining,
)
from overtone.cluster.faults import Verdict
from overtone.cluster.worker import CPU_BATCH, Runner, in_lists
from overtone.cluster.worker.attempt import Attempt, EncodedMedia
from overtone.cluster.worker.batch_sizes import BATCH_MAX, BatchSizes
from overtone.cluster.worker.reader import Reader
from overtone.cluster.worker.texts import TEXTS
from overtone.jobs.errors import StoreError
from overtone.jobs.folder import JobFolder
from overtone.jobs.plan import make_plan
from overtone.jobs.rows import Quarantined
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import Store, open_store
from overtone.progressive.errors import NonFinitePixels
from overtone.progressive.schedule import Stage

SIDE_PX = 64
FULL = SIDE_PX // 8
"""Rows of the full latent grid."""


class Bench:
    """A job's folder with prompts, and runners on it."""

    def __init__(self, folder: Path, prompts: list[str], *, columns: dict | None = None, **sections):
        self.folder = folder
        folder.mkdir(exist_ok=True, parents=True)
        table = {"row_id": [f"r{k}" for k in range(len(prompts))], "prompt": prompts, **(columns or {})}
        pq.write_table(pa.table(table), folder / "prompts.parquet")
        self.spec = JobSpec.model_validate(
            {
                "model": "tiny",
                "prompts": str(folder / "prompts.parquet"),
                "sampling": {"height": SIDE_PX, "width": SIDE_PX, "num_steps": 4},
                "shards": 100,
                "output": str(folder / "out"),
                "workers": {"batch_size": 4},
                **sections,
            }
        )
        self.plan = make_plan(self.spec)
        self.store: Store = open_store(self.spec.output.path)
        self.engine = FakeEngine()
        self.runner = self.another()

    def another(self, store=None, reader=None) -> Runner:
        return Runner(
            self.spec, self.plan, store or self.store, self.engine, worker=7, epoch=3, reader=reader
        )

    def attempt(self, shard=0, **wishes):
        return list(self.runner.attempt(Assignment(shard, wishes.pop("attempt", 1), **wishes)))

    @property
    def rows(self) -> list[dict]:
        files = sorted((self.folder / "out" / "data").glob("*.parquet"))
        return [row for file in files for row in pq.read_table(file).to_pylist()]

    @property
    def rejects(self) -> list[dict]:
        files = sorted((self.folder / "out" / "rejects").glob("*.parquet"))
        return [row for file in files for row in pq.read_table(file).to_pylist()]

    @property
    def timings(self) -> list[dict]:
        files = sorted((self.folder / "out" / "timings").glob("*.parquet"))
        return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.fixture
def bench(tmp_path):
    made: list[Bench] = []

    def make(prompts, **wishes):
        made.append(Bench(tmp_path / f"job{len(made)}", prompts, **wishes))
        return made[-1]

    yield make
    for one in made:
        one.runner.close()


def plain(count: int) -> list[str]:
    return [f"prompt {k}" for k in range(count)]


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


# The usual course.


def test_a_shard_becomes_a_part_in_source_order(bench):
    job = bench(plain(6), columns={"score": [0.5 * k for k in range(6)]})
    events = job.attempt()
    assert events[-1] == ShardCommitted(7, 0, 1, rows=6, rejects=0)
    assert [row["row_id"] for row in job.rows] == [f"r{k}" for k in range(6)]
    assert [row["score"] for row in job.rows] == [0.5 * k for k in range(6)]
    assert job.engine.batches == [tuple(plain(6)[:4]), tuple(plain(6)[4:])]


def test_a_coarse_stage_takes_as_many_rows_as_have_no_more_tokens(bench):
    job = bench(plain(20))
    job.attempt()
    assert [(stage, len(prompts)) for stage, prompts in job.engine.runs] == [
        (-2, 16), (-1, 4), (-1, 4), (-1, 4), (-1, 4), (-2, 4), (-1, 4),
    ]  # fmt: skip
    assert [row["row_id"] for row in job.rows] == [f"r{k}" for k in range(20)]


def test_rows_are_named_before_and_after_each_batch_and_only_those_of_the_batch(bench):
    events = bench(plain(6), workers={"batch_size": 2}).attempt()
    named = [event for event in events if isinstance(event, RowsStarted | RowsDone)]
    together = tuple(f"r{k}" for k in range(6))
    assert (
        [(type(event), event.rows) for event in named]
        == [
            (RowsStarted, together),  # their prompts, then the coarse stage
            (RowsStarted, together[:2]),
            (RowsDone, together[:2]),
            (RowsStarted, together[2:4]),
            (RowsDone, together[2:4]),
            (RowsStarted, together[4:]),
            (RowsDone, together[4:]),
        ]
    )


def test_rows_of_one_size_share_a_batch(bench):
    columns = {"height": [64, 128, 64, 128, None], "width": [64, 64, 64, 64, None]}
    job = bench(plain(5), columns=columns)
    job.attempt()
    assert [len(batch) for batch in job.engine.batches] == [2, 2, 1]
    assert len(job.engine.encoded) == 3
    assert [(row["height"], row["width"]) for row in job.rows] == [
        (64, 64), (128, 64), (64, 64), (128, 64), (64, 64),
    ]  # fmt: skip


@pytest.mark.parametrize("shard_rows", [4, 7, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_same_rows_whatever_the_shards_and_batches(bench, shard_rows, batch_size):
    usual = bench(plain(10))
    usual.attempt()
    job = bench(plain(10), shards=shard_rows, workers={"batch_size": batch_size})
    for shard in job.plan.shards():
        job.attempt(shard.index)
    shown = ("row_id", "seed", "prompt", "image", "height", "width")
    assert [{k: row[k] for k in shown} for row in job.rows] == [
        {k: row[k] for k in shown} for row in usual.rows
    ]


def test_latents_are_kept_where_they_are_asked_for(bench, tmp_path):
    job = bench(plain(2), output={"path": str(tmp_path / "job0" / "out"), "latents": True})
    job.attempt()
    expected = np.random.default_rng(job.rows[0]["seed"]).standard_normal((4, 8, 8), np.float32)
    latents = job.rows[0]["latents"]
    assert latents["shape"] == [4, 8, 8]
    assert np.array_equal(np.array(latents["values"], np.float32).reshape(4, 8, 8), expected)


def test_the_commit_of_a_shard_goes_on_while_the_next_one_runs(bench):
    job = bench(plain(8), shards=4)
    gate = threading.Event()
    job.runner.close()
    job.runner = job.another(store=SlowStore(job.store, gate))
    first = job.attempt(0, read_ahead=1, commit_first=False)
    assert first[-1] == ShardGenerated(7, 0, 1)
    assert not job.rows
    events = job.runner.attempt(Assignment(1, 1))
    seen = []
    for event in events:
        seen.append(event)
        if isinstance(event, RowsDone):
            gate.set()
    assert of(ShardCommitted, seen) == [
        ShardCommitted(7, 0, 1, rows=4, rejects=0),
        ShardCommitted(7, 1, 1, rows=4, rejects=0),
    ]
    assert len(job.rows) == 8


def test_waiting_for_a_slow_store_shows_signs_of_life(bench):
    job = bench(plain(2))
    gate = threading.Event()
    job.runner.close()
    job.runner = job.another(store=SlowStore(job.store, gate))
    threading.Timer(2.5, gate.set).start()
    events = job.attempt()
    after = events[max(k for k, event in enumerate(events) if isinstance(event, RowsDone)) :]
    assert len(of(ShardAlive, after)) >= 2
    assert events[-1] == ShardCommitted(7, 0, 1, rows=2, rejects=0)


def test_flush_waits_for_the_last_commit_and_recall_tells_of_it_again(bench):
    job = bench(plain(4), shards=2)
    job.attempt(0, read_ahead=1, commit_first=False)
    told = list(job.runner.flush())
    assert of(ShardCommitted, told) == [ShardCommitted(7, 0, 1, rows=2, rejects=0)]
    assert job.runner.recall() == of(ShardCommitted, told)
    assert list(job.runner.flush()) == []


def test_timings_are_written_beside_the_next_shard_and_before_the_last_is_told_of(bench):
    job = bench(plain(4), shards=2)
    gate = threading.Event()
    job.runner.close()
    job.runner = job.another(store=SlowTables(job.store, gate))
    job.attempt(0, read_ahead=1, commit_first=False)
    for event in job.runner.attempt(Assignment(1, 1)):
        if isinstance(event, ShardCommitted):
            written = {line["shard"] for line in job.timings}
            assert written == ({0, 1} if event.shard else set())
            gate.set()


def test_timings_that_cannot_be_written_cost_no_row_and_are_made_again(bench):
    job = bench(plain(2))
    folder = JobFolder(job.store)
    folder.open(job.spec, job.plan)
    job.runner.close()
    job.runner = job.another(store=BrokenTables(job.store, threading.Event()))
    assert job.attempt()[-1] == ShardCommitted(7, 0, 1, rows=2, rejects=0)
    assert not job.timings
    assert folder.repair_derived() == 1
    assert {line["stage"] for line in job.timings} >= {"read", "denoise", "part_write"}


def test_of_two_attempts_the_first_part_stays(bench):
    job = bench(plain(2))
    job.attempt()
    before = (job.folder / "out" / "data").joinpath("train-00000-of-00001.parquet").read_bytes()
    assert job.attempt(attempt=2)[-1] == ShardCommitted(7, 0, 2, rows=2, rejects=0)
    assert (job.folder / "out" / "data").joinpath("train-00000-of-00001.parquet").read_bytes() == before


class SlowStore(Store):
    """A store whose creates wait for a gate."""

    def __init__(self, inner: Store, gate: threading.Event) -> None:
        super().__init__(inner.config)
        self.inner, self.gate = inner, gate

    def create(self, key, data, *, attempt, content_type=None):
        assert self.gate.wait(30)
        return self.inner.create(key, data, attempt=attempt, content_type=content_type)

    def read(self, key, start=None, length=None):
        return self.inner.read(key, start, length)

    def open(self, key):
        return self.inner.open(key)

    def list(self, prefix="", *, after=""):
        return self.inner.list(prefix, after=after)

    def head(self, key):
        return self.inner.head(key)

    def put(self, key, data, *, content_type=None, durable=True):
        self.inner.put(key, data, content_type=content_type, durable=durable)

    def delete(self, key):
        self.inner.delete(key)

    def sweep(self, *, older_than_s=None):
        return self.inner.sweep(older_than_s=older_than_s)

    def probe_limits(self):
        return False, 2**30


class BrokenStore(SlowStore):
    """A store that cannot be reached."""

    def create(self, key, data, *, attempt, content_type=None):
        raise ConnectionResetError("connection reset")


class PausingStore(SlowStore):
    """A store that takes no part for a while."""

    refusals = 3

    def create(self, key, data, *, attempt, content_type=None):
        if self.refusals and key.startswith("data/"):
            self.refusals -= 1
            raise StoreError(f"{key}: 503 SlowDown")
        return self.inner.create(key, data, attempt=attempt, content_type=content_type)


class SlowTables(SlowStore):
    """A store whose gate is for what is put."""

    def create(self, key, data, *, attempt, content_type=None):
        return self.inner.create(key, data, attempt=attempt, content_type=content_type)

    def put(self, key, data, *, content_type=None, durable=True):
        assert self.gate.wait(30)
        super().put(key, data, content_type=content_type, durable=durable)


class BrokenTables(SlowTables):
    """A store that takes no put."""

    def put(self, key, data, *, content_type=None, durable=True):
        raise StoreError(f"{key}: the disk is full")


# Memory.


def test_a_batch_that_does_not_fit_is_halved_at_that_stage_alone_and_the_size_is_remembered(bench):
    job = bench(plain(20), workers={"batch_size": 8})
    job.engine.fits[FULL] = 3
    assert job.attempt()[-1].rejects == 0
    assert [len(batch) for batch in job.engine.batches] == [8, 4] + [2] * 10
    assert [len(prompts) for stage, prompts in job.engine.runs if stage == -2] == [20]
    assert len(job.rows) == 20


def test_a_coarse_batch_that_does_not_fit_leaves_the_full_size_as_it_is(bench):
    job = bench(plain(20))
    job.engine.fits[FULL // 2] = 9
    assert job.attempt()[-1].rejects == 0
    assert [len(prompts) for stage, prompts in job.engine.runs if stage == -2] == [16, 8, 8, 4]
    assert {len(batch) for batch in job.engine.batches} == {4}


def test_what_fits_is_known_by_grid(bench):
    columns = {"height": [128] * 4 + [64] * 4, "width": [64] * 8}
    job = bench(plain(8), columns=columns)
    job.engine.fits[2 * FULL] = 2
    job.attempt()
    assert [len(batch) for batch in job.engine.batches] == [4, 2, 2, 4]


def test_a_row_that_never_fits_is_rejected(bench):
    job = bench([*plain(3), "!huge"])
    assert job.attempt()[-1] == ShardCommitted(7, 0, 1, 4, 1, (("MemoryError", 1),))
    [reject] = job.rejects
    assert (reject["row_id"], reject["error_class"], reject["stage"]) == ("r3", "MemoryError", "denoise")
    assert [row["row_id"] for row in job.rows] == ["r0", "r1", "r2"]


def stage(side: int) -> Stage:
    return Stage(side, side, 1, 0, 4, side * side // 4, (1.0, 0.5, 0.0))


def test_on_a_gpu_the_batch_grows_while_that_pays_at_each_stage_by_itself():
    sizes = BatchSizes("auto", gpu=True)
    full, coarse = stage(64), stage(32)
    took = {full: {1: 1.0, 2: 1.2, 4: 2.0, 8: 4.0}, coarse: {4: 1.0, 8: 1.5, 16: 2.5, 32: 5.0}}
    used: dict[Stage, list[int]] = {full: [], coarse: []}
    for _ in range(20):
        for one, seconds in took.items():
            rows = sizes.next(one, full)
            used[one].append(rows)
            sizes.done(one, rows, seconds[rows])
    assert used[full][:8] == [1, 1, 2, 2, 4, 4, 8, 8]
    assert set(used[full][8:]) == {4}  # 8 is no faster than 4
    assert used[coarse][:6] == [4, 4, 8, 8, 16, 16]
    assert set(used[coarse][8:]) == {16}


def test_rows_that_the_engine_takes_alone_are_chunks_of_one_everywhere(bench):
    """So that running out of memory is that row's, and not halved in vain."""
    job = bench([*plain(3), "!huge"], workers={"batch_size": 8})
    job.engine.alone = True
    job.runner = job.another()
    job.attempt()
    assert {len(prompts) for _, prompts in job.engine.runs} == {1}
    assert [row["row_id"] for row in job.rows] == ["r0", "r1", "r2"]
    assert not BatchSizes("auto", gpu=True, alone=True).grows


def test_growing_stops_below_what_ran_out_of_memory():
    sizes, full = BatchSizes("auto", gpu=True), stage(64)
    for _ in range(12):
        rows = sizes.next(full, full)
        if rows > 4:
            sizes.failed(full, rows)
        else:
            sizes.done(full, rows, 1.0)
    assert sizes.next(full, full) == 4


def test_a_fixed_batch_and_a_cpu_do_not_grow():
    full, coarse, tiny = stage(64), stage(32), stage(4)
    for sizes, size in ((BatchSizes(6, gpu=True), 6), (BatchSizes("auto", gpu=False), CPU_BATCH)):
        for _ in range(5):
            sizes.done(full, sizes.next(full, full), 1.0)
        assert sizes.next(full, full) == size
        assert sizes.next(coarse, full) == 4 * size
        assert sizes.next(tiny, full) == BATCH_MAX
    assert BatchSizes(100, gpu=True).next(coarse, full) == 100


# Rows that go wrong.


def test_a_row_that_raises_is_found_by_halving_and_the_others_are_made(bench):
    job = bench([*plain(6), "!raise", "prompt 7"], workers={"batch_size": 8})
    events = job.attempt(attempt=2)
    assert events[-1] == ShardCommitted(7, 0, 2, 8, 1, (("RuntimeError", 1),))
    [reject] = job.rejects
    assert reject["row_id"] == "r6"
    assert reject["message"] == "this prompt raises"
    assert reject["stage"] == "denoise"
    assert reject["attempts"] == 2
    assert reject["prompt"] == "!raise"
    assert Counter(row for event in of(RowsDone, events) for row in event.rows) == Counter(
        f"r{k}" for k in range(8)
    )


def test_rows_with_nan_latents_are_rejected_at_once_and_the_rest_of_the_batch_is_kept(bench):
    job = bench(["prompt 0", "!nan", "prompt 2", "!nan"])
    job.attempt()
    assert [row["row_id"] for row in job.rows] == ["r0", "r2"]
    assert [(r["row_id"], r["error_class"]) for r in job.rejects] == [
        ("r1", "NotFinite"),
        ("r3", "NotFinite"),
    ]
    assert [(stage, len(prompts)) for stage, prompts in job.engine.runs] == [(-2, 4), (-2, 2), (-1, 2)]


def test_a_row_that_goes_wrong_costs_the_others_one_stage(bench):
    """Found at the first stage: no row of it goes through again what it has behind it."""
    job = bench([*plain(3), "!raise"])
    job.attempt()
    assert len(job.engine.encoded) == 1
    assert [len(prompts) for stage, prompts in job.engine.runs if stage == -1] == [3]


def test_a_picture_that_cannot_be_decoded_is_found_without_denoising_again(bench):
    tried: list[int] = []

    def fail(rows: int) -> None:
        tried.append(rows)
        if rows > 1:
            raise MemoryError("out of memory")
        if tried.count(1) == 2:
            raise ValueError("no such colour")

    job = bench(plain(4))
    job.engine.on_decode = fail
    assert job.attempt()[-1].rejects == 1
    assert tried == [4, 2, 1, 1, 2, 1, 1]
    assert len(job.engine.runs) == 2
    assert [(r["row_id"], r["stage"]) for r in job.rejects] == [("r1", "vae_decode")]


def test_black_pictures_are_rejected_and_the_good_ones_beside_them_stay(bench):
    """The engine counts the rows that it was given to decode, which are not all of the batch's."""

    class Overflows(FakeEngine):
        def decode(self, plan, latents):
            bad = [row for row in range(len(latents)) if latents[row][0, 0, 0] == 0]
            if bad:
                raise NonFinitePixels(bad)
            return super().decode(plan, latents)

    class Zero(FakeTrajectories):
        def latents(self, rows):
            latents = super().latents(rows)
            latents[[row for row, k in enumerate(rows) if self.prompts[k] == "black"]] = 0
            return latents

    job = bench(["!nan", "prompt 1", "black", "prompt 3", "black"], workers={"batch_size": 8})
    job.engine = Overflows()
    job.engine.begin = lambda plan, encoded, seeds, sampling: Zero(job.engine, plan, encoded, list(seeds))
    job.runner = job.another()
    job.attempt()
    assert [row["row_id"] for row in job.rows] == ["r1", "r3"]
    assert [(r["row_id"], r["error_class"], r["stage"]) for r in job.rejects] == [
        ("r0", "NotFinite", "denoise"),
        ("r2", "NonFinitePixels", "vae_decode"),
        ("r4", "NonFinitePixels", "vae_decode"),
    ]
    assert "bfloat16" in job.rejects[1]["message"]


def test_a_prompt_that_the_tokenizer_refuses(bench):
    job = bench([*plain(3), "!words"])
    job.attempt()
    assert [(r["row_id"], r["stage"]) for r in job.rejects] == [("r3", "text_encode")]
    assert len(job.rows) == 3


def test_a_size_that_the_model_cannot_make_rejects_the_row(bench):
    job = bench(plain(3), columns={"height": [64, 100, 64]})
    job.attempt()
    [reject] = job.rejects
    assert (reject["row_id"], reject["error_class"]) == ("r1", "SizeError")
    assert "96" in reject["message"]
    assert "112" in reject["message"]


def test_a_row_that_the_reader_refuses_stays_a_reject(bench):
    job = bench(["prompt 0", None, "prompt 2"])
    assert job.attempt()[-1].rejects == 1
    assert [(r["row_id"], r["attempts"], r["stage"]) for r in job.rejects] == [("r1", 0, "read")]


def test_a_shard_of_rejects_alone_is_committed_too(bench):
    job = bench(["!raise", "!nan"])
    assert job.attempt()[-1].rejects == 2
    assert job.rows == []
    assert list((job.folder / "out" / "data").iterdir())


def test_suspects_run_first_and_alone(bench):
    job = bench(plain(6))
    job.attempt(suspects=("r4", "r1"))
    assert job.engine.batches == [("prompt 1",), ("prompt 4",), tuple(plain(6)[k] for k in (0, 2, 3, 5))]


def test_isolated_rows_run_alone(bench):
    job = bench(plain(5))
    job.attempt(isolate=True)
    assert [len(batch) for batch in job.engine.batches] == [1] * 5
    assert len(job.rows) == 5


def test_quarantined_rows_are_rejected_without_being_run(bench):
    job = bench(["prompt 0", "!exit", "prompt 2"])
    why = Quarantined(0, "r1", "WorkerDied", "the process died", deaths=2)
    assert job.attempt(quarantined=(why,))[-1] == ShardCommitted(7, 0, 1, 3, 1, (("WorkerDied", 1),))
    [reject] = job.rejects
    assert (reject["row_id"], reject["error_class"], reject["attempts"]) == ("r1", "WorkerDied", 2)
    assert [row["row_id"] for row in job.rows] == ["r0", "r2"]


def test_a_bug_ends_the_attempt_with_its_traceback(bench):
    job = bench([*plain(2), "!bug"])
    failed = job.attempt()[-1]
    assert isinstance(failed, ShardFailed)
    assert failed.failure.verdict is Verdict.FAIL_JOB
    assert 'raise TypeError("no such argument")' in failed.failure.traceback
    assert not (job.folder / "out" / "data").exists()


def test_a_store_that_cannot_be_reached_fails_the_attempt_to_be_retried(bench):
    job = bench(plain(2))
    job.runner.close()
    job.runner = job.another(store=BrokenStore(job.store, threading.Event()))
    failed = job.attempt()[-1]
    assert failed.failure.verdict is Verdict.RETRY
    assert failed.failure.phase == "commit"


def test_a_part_that_the_store_does_not_take_for_a_while_is_kept_and_its_rows_are_made_once(bench):
    job = bench(plain(2))
    job.runner.close()
    job.runner = job.another(store=PausingStore(job.store, threading.Event()))
    events = job.attempt()
    assert events[-1] == ShardCommitted(7, 0, 1, rows=2, rejects=0)
    assert job.engine.batches == [tuple(plain(2))]
    assert "503 SlowDown" in "".join(event.trouble for event in of(ShardAlive, events))


def test_an_input_file_that_changed_ends_the_attempt(bench):
    job = bench(plain(4))
    pq.write_table(pa.table({"row_id": ["x"], "prompt": ["other"]}), job.folder / "prompts.parquet")
    failed = job.attempt()[-1]
    assert isinstance(failed, ShardFailed)
    assert failed.failure.verdict is Verdict.FAIL_JOB
    assert failed.failure.phase == "read"


# Giving back.


def test_a_cancelled_attempt_ends_after_the_batch_in_hand(bench):
    job = bench(plain(20))
    events = list(job.runner.attempt(Assignment(0, 1), lambda: len(job.engine.batches) == 2))
    assert events[-1] == ShardReturned(7, 0, 1)
    assert len(job.engine.batches) == 2
    assert not job.rows


def test_a_worker_that_drains_gives_its_shard_back_and_finishes_the_commit_before(bench):
    job = bench(plain(8), shards=4)
    job.attempt(0, read_ahead=1, commit_first=False)
    job.runner.draining = True
    events = job.attempt(1)
    assert of(WorkerDraining, events) == [WorkerDraining(7)]
    assert events[-1] == ShardReturned(7, 1, 1)
    assert of(ShardCommitted, events) == [ShardCommitted(7, 0, 1, 4, 0)]
    assert len(job.rows) == 4


# What overlaps what.


def test_identical_prompts_are_encoded_once(bench):
    job = bench(["a", "b", "a", "a", "b", "c"] * 2, workers={"batch_size": 1})
    job.attempt()
    assert job.engine.encoded == [("a", "b"), ("c",)]
    assert len(job.rows) == 12


def test_as_many_prompts_are_remembered_as_were_used_last(bench):
    once = [f"prompt {k}" for k in range(TEXTS)]
    prompts = ["usual", *once[:-1], "usual", once[-1], "usual", once[0]]
    job = bench(prompts, sampling={"mode": "fullres", "num_steps": 1}, workers={"batch_size": 1})
    job.attempt()
    encoded = [text for texts in job.engine.encoded for text in texts]
    assert encoded == ["usual", *once, once[0]]


def test_with_offloading_a_shards_prompts_are_encoded_before_any_row_is_denoised(bench):
    prompts = plain(TEXTS + 6)
    job = bench(prompts, model={"id": "tiny", "offload": "model"})
    job.engine.on_run = lambda *_: job.engine.encoded == [tuple(prompts)] or pytest.fail("still encoding")
    job.attempt()
    assert job.engine.encoded == [tuple(prompts)]
    assert len(job.rows) == len(prompts)


def test_with_offloading_a_prompt_that_the_tokenizer_refuses_is_still_found(bench):
    job = bench([*plain(3), "!words"], model={"id": "tiny", "offload": "model"})
    job.attempt()
    assert [(r["row_id"], r["stage"]) for r in job.rejects] == [("r3", "text_encode")]
    assert len(job.rows) == 3


def test_on_a_gpu_prompts_and_pictures_are_done_beside_the_denoising(bench):
    """Each denoising but the first waits until the batch before it is being decoded and the prompts of the
    next group are encoded: the other way round none of them would begin."""
    job = bench(plain(12), sampling={"mode": "fullres", "height": SIDE_PX, "width": SIDE_PX})
    decoding, encoded = threading.Semaphore(0), threading.Semaphore(0)
    decoded = threading.Semaphore(0)

    def run(stage: int, prompts: tuple[str, ...]) -> None:
        if prompts[0] != "prompt 8":
            assert encoded.acquire(timeout=30), "the next group's prompts wait for this one"
        if prompts[0] != "prompt 0":
            assert decoding.acquire(timeout=30), "the pictures before wait for this batch"
            decoded.release()

    def decode(rows: int) -> None:
        decoding.release()
        if len(job.engine.runs) < 3:
            assert decoded.acquire(timeout=30), "the next batch waits for these pictures"

    job.engine.overlaps = True
    job.engine.on_run, job.engine.on_decode = run, decode
    job.engine.on_encode = lambda texts: None if texts[0] == "prompt 0" else encoded.release()
    job.runner.close()
    job.runner = job.another()
    events = job.attempt()
    assert events[-1] == ShardCommitted(7, 0, 1, rows=12, rejects=0)
    assert job.engine.encoded == [tuple(plain(12)[k : k + 4]) for k in (0, 4, 8)]
    assert len(job.rows) == 12
    in_flight = [event.rows for event in of(RowsStarted, events)]
    ids = [f"r{k}" for k in range(12)]
    assert in_flight == [tuple(ids[:4]), tuple(ids[:8]), tuple(ids[4:])]  # those being decoded too


def test_the_prompts_of_the_next_shard_are_encoded_beside_the_end_of_this_one(bench):
    job = bench(plain(8), shards=4, sampling={"mode": "fullres", "height": SIDE_PX, "width": SIDE_PX})
    job.engine.overlaps = True
    read, encoded = threading.Event(), threading.Event()
    job.engine.on_encode = lambda texts: encoded.set() if "prompt 4" in texts else None
    job.engine.on_run = lambda *_: encoded.wait(30)

    class QuickReader(Reader):
        def start(self, index: int):
            future = super().start(index)
            future.result(30)  # as long as the shard before takes, or less
            read.set()
            return future

    job.runner.close()
    job.runner = job.another(reader=QuickReader(job.spec, job.plan, job.store))
    job.attempt(0, read_ahead=1, commit_first=False)
    assert read.is_set()
    assert encoded.is_set()
    job.attempt(1)
    assert job.engine.encoded == [tuple(plain(8)[:4]), tuple(plain(8)[4:])]


def test_under_suspicion_nothing_goes_on_beside(bench):
    job = bench(plain(4))
    job.engine.overlaps = True
    job.runner.close()
    job.runner = job.another()
    events = job.attempt(isolate=True)
    assert [event.rows for event in of(RowsStarted, events)] == [(f"r{k}",) for k in range(4)]
    assert [len(texts) for texts in job.engine.encoded] == [1] * 4


# Where the time went.


def test_the_stages_of_a_batch_cover_its_time(bench):
    job = bench(plain(24), workers={"batch_size": 2})
    job.engine.step_s = 0.1
    job.attempt()
    batches = {line["batch"] for line in job.timings} - {None}
    assert batches == {0, 1, 2}
    for batch in batches:
        spans = [
            (line["start_s"], line["start_s"] + line["seconds"])
            for line in job.timings
            if line["batch"] == batch
        ]
        begin_s, end_s = min(spans)[0], max(end for _, end in spans)
        assert covered(spans) >= 0.95 * (end_s - begin_s)


def test_encoding_is_timed_at_work_and_not_from_first_to_last(bench):
    """Between the chunks of a batch the others are denoised, which is no encoding."""
    job = bench(plain(6), workers={"batch_size": 2})
    job.engine.step_s = 0.1
    job.attempt()
    lines = [line for line in job.timings if line["stage"] == "image_encode"]
    assert sorted(row_id for line in lines for row_id in line["row_ids"]) == [f"r{k}" for k in range(6)]
    assert all(line["rows"] == len(line["row_ids"]) for line in lines)
    assert {line["batch"] for line in lines} == {0}
    first, last = min(line["start_s"] for line in lines), max(line["start_s"] for line in lines)
    assert last - first > 0.2  # two more chunks were denoised on the full grid meanwhile
    assert sum(line["seconds"] for line in lines) < 0.1


def test_a_line_of_encoding_is_a_run_of_one_thread():
    attempt = Attempt(Assignment(0, 1), started=100.0)
    encoded = [
        ("a", EncodedMedia(b"", 101.0, 101.5, thread=1)),
        ("b", EncodedMedia(b"", 101.2, 101.4, thread=2)),
        ("c", EncodedMedia(b"", 101.5, 101.75, thread=1)),
        ("d", EncodedMedia(b"", 103.0, 103.125, thread=1)),
    ]
    lines = list(attempt.timings_of_encoding(7, encoded[::-1]))
    assert [(line.batch, line.row_ids, line.rows) for line in lines] == [
        *((7, ("a", "c"), 2), (7, ("b",), 1), (7, ("d",), 1)),
    ]
    assert [line.start_s for line in lines] == pytest.approx([1.0, 1.2, 3.0])
    assert [line.seconds for line in lines] == pytest.approx([0.75, 0.2, 0.125])


def covered(spans):
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def test_every_stage_is_in_the_timings_with_its_grid(bench):
    job = bench(plain(2))
    job.attempt()
    stages = [line["stage"] for line in job.timings]
    assert {
        "read",
        "text_encode",
        "denoise",
        "expand",
        "vae_decode",
        "image_encode",
        "part_write",
        "upload",
    } == set(stages)
    denoise = [line for line in job.timings if line["stage"] == "denoise"]
    assert [(line["height"], line["tokens"]) for line in denoise] == [(4, 4), (8, 16)]
    assert sum(line["steps"] for line in denoise) == 4
    assert all(line["rows"] == 2 and line["device"] == "cpu" for line in denoise)
    [row] = [row for row in job.rows if row["row_id"] == "r0"]
    assert [stage["steps"] for stage in row["stages"]] == [line["steps"] for line in denoise]


def test_a_rows_seconds_are_its_share_of_its_own_batches(bench):
    job = bench(plain(5), workers={"batch_size": 2})
    job.engine.step_s = 0.01
    job.attempt()
    lines = [line for line in job.timings if line["stage"] == "denoise"]
    assert [(line["batch"], line["height"], line["rows"]) for line in lines] == [
        (0, 4, 5), (0, 8, 2), (0, 8, 2), (0, 8, 1),
    ]  # fmt: skip
    for row in job.rows:
        own = [line for line in lines if row["row_id"] in line["row_ids"]]
        assert [stage["seconds"] for stage in row["stages"]] == [
            pytest.approx(line["seconds"] / line["rows"]) for line in own
        ]
    assert sum(row["denoise_seconds"] for row in job.rows) == pytest.approx(
        sum(line["seconds"] for line in lines), rel=1e-3
    )


def test_attempts_have_names_of_their_own(bench):
    job = bench(plain(2), shards=1)
    job.attempt(0)
    job.attempt(1)
    names = {line["attempt"] for line in job.timings}
    assert len(names) == 2
    assert all(name.startswith("e3-w7-s") for name in names)
    assert json.dumps(sorted(names))


# What a worker sends


def test_events_go_out_together_but_never_later_than_what_takes_time():
    done = [RowsDone(7, 0, 1, ("r0",)), ShardCommitted(7, 0, 1, rows=1, rejects=0)]
    events = [
        RowsStarted(7, 1, 1, ("r1",)),  # must be known before r1 can kill the process
        ShardAlive(7, 1, 1),  # just told by the one above
        *done,
        ShardAlive(7, 1, 1),  # the next batch, of the same rows, takes its time
        RowsDone(7, 1, 1, ("r1",)),
        ShardGenerated(7, 1, 1),
    ]
    lists = list(in_lists(iter(events)))
    assert lists == [events[:1], events[2:5], events[5:]]


def test_a_small_shard_takes_two_messages(bench):
    job = bench(plain(1), workers={"batch_size": 1})
    events = job.runner.attempt(Assignment(0, 1))
    assert [type(sent[-1]) for sent in in_lists(events)] == [RowsStarted, ShardCommitted]
