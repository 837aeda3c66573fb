"""A runner with an engine that has no model: batches, memory, rows that go wrong, and where the time went."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engine import FakeEngine

from cluster.dispatch import (
    Assignment,
    Quarantined,
    RowsDone,
    RowsStarted,
    ShardAlive,
    ShardCommitted,
    ShardFailed,
    ShardGenerated,
    ShardReturned,
    WorkerDraining,
)
from cluster.faults import Action
from cluster.runner import CPU_BATCH, BatchSizes, Runner
from jobs.plan import make_plan
from jobs.spec import JobSpec
from jobs.store import Store, open_store

SIDE_PX = 64


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

    def another(self, engine=None, store=None) -> Runner:
        return Runner(self.spec, self.plan, store or self.store, engine or self.engine, worker=7, epoch=3)

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


def test_rows_are_named_before_and_after_each_batch(bench):
    events = bench(plain(5)).attempt()
    named = [event for event in events if isinstance(event, RowsStarted | RowsDone)]
    assert [(type(event), event.rows) for event in named] == [
        (RowsStarted, ("r0", "r1", "r2", "r3")),
        (RowsDone, ("r0", "r1", "r2", "r3")),
        (RowsStarted, ("r4",)),
        (RowsDone, ("r4",)),
    ]


def test_rows_of_one_size_share_a_batch(bench):
    columns = {"height": [64, 128, 64, 128, None], "width": [64, 64, 64, 64, None]}
    job = bench(plain(5), columns=columns)
    job.attempt()
    assert [len(batch) for batch in job.engine.batches] == [2, 2, 1]
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
    first = job.attempt(0, next_shard=1)
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
    job.attempt(0, next_shard=1)
    told = list(job.runner.flush())
    assert of(ShardCommitted, told) == [ShardCommitted(7, 0, 1, rows=2, rejects=0)]
    assert job.runner.recall() == of(ShardCommitted, told)
    assert list(job.runner.flush()) == []


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

    def put(self, key, data, *, content_type=None):
        self.inner.put(key, data, content_type=content_type)

    def delete(self, key):
        self.inner.delete(key)

    def sweep(self, *, older_than_s=None):
        return self.inner.sweep(older_than_s=older_than_s)

    def _probe_limits(self):
        return False, 2**30


class BrokenStore(SlowStore):
    """A store that cannot be reached."""

    def create(self, key, data, *, attempt, content_type=None):
        raise ConnectionResetError("connection reset")


# Memory.


def test_a_batch_that_does_not_fit_is_halved_and_the_size_is_remembered(bench):
    job = bench(plain(20), workers={"batch_size": 8})
    job.engine.fits[SIDE_PX] = 3
    assert job.attempt()[-1].rejects == 0
    assert [len(batch) for batch in job.engine.batches] == [8, 4] + [2] * 10
    assert len(job.rows) == 20


def test_what_fits_is_known_by_size(bench):
    columns = {"height": [128] * 4 + [64] * 4, "width": [64] * 8}
    job = bench(plain(8), columns=columns)
    job.engine.fits[128] = 2
    job.attempt()
    assert [len(batch) for batch in job.engine.batches] == [4, 2, 2, 4]


def test_a_row_that_never_fits_is_rejected(bench):
    job = bench([*plain(3), "!huge"])
    assert job.attempt()[-1] == ShardCommitted(7, 0, 1, 4, 1, (("MemoryError", 1),))
    [reject] = job.rejects
    assert (reject["row_id"], reject["error_class"], reject["stage"]) == ("r3", "MemoryError", "denoise")
    assert [row["row_id"] for row in job.rows] == ["r0", "r1", "r2"]


def test_on_a_gpu_the_batch_grows_while_that_pays():
    sizes = BatchSizes("auto", gpu=True)
    used = []
    for _ in range(20):
        rows = sizes.next("1024")
        used.append(rows)
        sizes.done("1024", rows, {1: 1.0, 2: 1.2, 4: 2.0, 8: 4.0}[rows])  # 8 is no faster than 4
    assert used[:8] == [1, 1, 2, 2, 4, 4, 8, 8]
    assert set(used[8:]) == {4}


def test_growing_stops_below_what_ran_out_of_memory():
    sizes = BatchSizes("auto", gpu=True)
    for _ in range(12):
        rows = sizes.next("1024")
        if rows > 4:
            sizes.failed("1024", rows)
        else:
            sizes.done("1024", rows, 1.0)
    assert sizes.next("1024") == 4


def test_a_fixed_batch_and_a_cpu_do_not_grow():
    for sizes, size in ((BatchSizes(6, gpu=True), 6), (BatchSizes("auto", gpu=False), CPU_BATCH)):
        for _ in range(5):
            sizes.done("1024", sizes.next("1024"), 1.0)
        assert sizes.next("1024") == size


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
    assert [len(batch) for batch in job.engine.batches] == [4, 2]


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
    assert job.engine.batches[:2] == [("prompt 1",), ("prompt 4",)]
    assert len(job.engine.batches) == 3


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
    assert failed.failure.action is Action.FAIL_JOB
    assert 'raise TypeError("no such argument")' in failed.failure.traceback
    assert not (job.folder / "out" / "data").exists()


def test_a_store_that_cannot_be_reached_fails_the_attempt_to_be_retried(bench):
    job = bench(plain(2))
    job.runner.close()
    job.runner = job.another(store=BrokenStore(job.store, threading.Event()))
    failed = job.attempt()[-1]
    assert failed.failure.action is Action.RETRY
    assert failed.failure.stage == "commit"


def test_an_input_file_that_changed_ends_the_attempt(bench):
    job = bench(plain(4))
    pq.write_table(pa.table({"row_id": ["x"], "prompt": ["other"]}), job.folder / "prompts.parquet")
    failed = job.attempt()[-1]
    assert isinstance(failed, ShardFailed)
    assert failed.failure.action is Action.FAIL_JOB
    assert failed.failure.stage == "read"


# Giving back.


def test_a_cancelled_attempt_ends_after_the_batch_in_hand(bench):
    job = bench(plain(20))
    asked = iter([False, False, False, True])
    events = list(job.runner.attempt(Assignment(0, 1), lambda: next(asked)))
    assert events[-1] == ShardReturned(7, 0, 1)
    assert len(job.engine.batches) == 2
    assert not job.rows


def test_a_worker_that_drains_gives_its_shard_back_and_finishes_the_commit_before(bench):
    job = bench(plain(8), shards=4)
    job.attempt(0, next_shard=1)
    job.runner.draining = True
    events = job.attempt(1)
    assert of(WorkerDraining, events) == [WorkerDraining(7)]
    assert events[-1] == ShardReturned(7, 1, 1)
    assert of(ShardCommitted, events) == [ShardCommitted(7, 0, 1, 4, 0)]
    assert len(job.rows) == 4


# Where the time went.


def test_the_stages_of_a_batch_cover_its_time(bench):
    job = bench(plain(12))
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


def test_attempts_have_names_of_their_own(bench):
    job = bench(plain(2), shards=1)
    job.attempt(0)
    job.attempt(1)
    names = {line["attempt"] for line in job.timings}
    assert len(names) == 2
    assert all(name.startswith("e3-w7-s") for name in names)
    assert json.dumps(sorted(names))
