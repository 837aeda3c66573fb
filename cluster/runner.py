"""One attempt at one shard: its rows read, batched, made, encoded and committed. Knows no Ray.

    runner = Runner(spec, plan, store, engine, worker=3, epoch=7, node="a")
    for event in runner.attempt(assignment): ...     # events of cluster.dispatch, as they happen
    for event in runner.flush(): ...                 # wait for commits in the background

The calling thread does nothing but generate. Reading the next shard, encoding pictures and committing the
last shard go on in threads beside it. What an exception means is decided by `cluster.faults` alone; a row
that cannot be made becomes a reject here, anything else ends the attempt with a `ShardFailed`.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol
from uuid import uuid4

import numpy as np

from cluster.dispatch import (
    Assignment,
    Event,
    RowsDone,
    RowsStarted,
    ShardAlive,
    ShardCommitted,
    ShardFailed,
    ShardGenerated,
    ShardReturned,
    WorkerDraining,
)
from cluster.faults import Action, Failure, first_line
from cluster.logs import about
from jobs.errors import SizeError
from jobs.media import encode_media
from jobs.parts import Made, StageTime, Timing, build_part, commit_part
from jobs.plan import JobPlan
from jobs.prompts import ShardRows, read_shard
from jobs.rows import PROMPT_CUT, Reject, Row
from jobs.spec import JobSpec
from jobs.store import Store
from progressive.schedule import SamplingPlan
from progressive.settings import Sampling

ALIVE_S = 1.0
"""How often an attempt that waits for a thread says that it goes on."""
ENCODERS = 4
"""Threads that encode pictures, at most."""
CPU_BATCH = 4
"""Rows a batch where `batch_size: auto` runs on a CPU, which larger ones do not make faster."""
GPU_BATCH_MAX = 64
"""Largest batch that `batch_size: auto` tries."""
WORTH_IT = 1.05
"""A batch twice as large must make this many times as many rows a second to be kept."""

_log = logging.getLogger(__name__)


class StageReport(Protocol):
    """What an engine says about one stage of a batch; sizes in latent cells."""

    @property
    def kind(self) -> Literal["denoise", "expand"]: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def seconds(self) -> float: ...


class Engine(Protocol):
    """What a runner asks of `progressive.engine.Engine`; tests bring their own."""

    @property
    def device(self) -> Any: ...
    @property
    def family(self) -> Any: ...
    def plan(
        self, sampling: Sampling, *, height_px: int | None = None, width_px: int | None = None
    ) -> SamplingPlan: ...
    def encode(self, prompts: Sequence[str], negatives: Sequence[str | None], sampling: Sampling) -> Any: ...
    def denoise(
        self, plan: SamplingPlan, encoded: Any, seeds: Sequence[int], sampling: Sampling
    ) -> tuple[Any, Sequence[StageReport]]: ...
    def decode(self, plan: SamplingPlan, latents: Any) -> Sequence[Any]: ...


class BatchSizes:
    """How many rows to denoise together, by size in pixels. Remembers what ran out of memory.

    `auto` on a GPU doubles the batch while that makes more rows a second, then stays with the best.
    """

    def __init__(self, setting: int | Literal["auto"], *, gpu: bool) -> None:
        self._grows = setting == "auto" and gpu
        self._first = setting if isinstance(setting, int) else 1 if gpu else CPU_BATCH
        self._sizes: dict[Any, int] = {}
        self._limits: dict[Any, int] = {}
        self._rates: dict[Any, dict[int, float]] = {}
        self._settled: set[Any] = set()
        self._warm: set[tuple[Any, int]] = set()

    def next(self, key: Any) -> int:
        """Rows for the next batch of this size."""
        return self._sizes.setdefault(key, self._first)

    def done(self, key: Any, rows: int, seconds: float) -> None:
        """A batch was made."""
        if not self._grows or key in self._settled or rows != self._sizes.get(key):
            return
        if (key, rows) not in self._warm:  # the first of a size also compiles and plans memory
            self._warm.add((key, rows))
            return
        rates = self._rates.setdefault(key, {})
        rates[rows] = rows / max(seconds, 1e-9)
        larger = min(2 * rows, self._limits.get(key, GPU_BATCH_MAX), GPU_BATCH_MAX)
        if rates[rows] < WORTH_IT * rates.get(rows // 2, 0.0):
            self._sizes[key] = rows // 2
            self._settled.add(key)
        elif larger <= rows:
            self._settled.add(key)
        else:
            self._sizes[key] = larger

    def limit(self, key: Any, rows: int) -> int:
        """How many of these rows are not known to be too many."""
        return min(rows, self._limits.get(key, rows))

    def failed(self, key: Any, rows: int) -> int:
        """A batch of this many rows, above 1, ran out of memory; the size to go on with."""
        half = max(1, rows // 2)
        self._limits[key] = min(half, self._limits.get(key, half))
        self._sizes[key] = min(self._limits[key], self._sizes.get(key, half))
        self._settled.add(key)
        return self._sizes[key]


class _Returned(Exception):
    """The attempt was asked to stop."""


class _Failed(Exception):
    """The attempt cannot go on."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass
class _Picture:
    """A sample whose picture is being encoded."""

    row: Row
    plan: SamplingPlan
    batch: int
    stages: tuple[StageTime, ...]
    denoise_seconds: float
    latents: np.ndarray | None
    encoding: Future[tuple[bytes, float, float]]  # bytes, begin and end in seconds since 1970


@dataclass
class _Attempt:
    """What an attempt has gathered."""

    assignment: Assignment
    id: str
    cancelled: Callable[[], bool]
    started: float = field(default_factory=time.time)
    stage: str = "read"
    read: ShardRows | None = None
    pictures: list[_Picture] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    batches: int = 0

    @property
    def shard(self) -> int:
        return self.assignment.shard


class Runner:
    """A resident engine and the threads around it. One attempt at a time.

    Args:
        worker: the dispatcher's number of this worker, for its events.
        label: its name in the timings.
        node: where it runs, for the timings.
        epoch: of the driver, for the attempts' names.
        on_timings: told the timings of each batch, and of what is done once for a shard, from any thread.
    """

    def __init__(
        self,
        spec: JobSpec,
        plan: JobPlan,
        store: Store,
        engine: Engine,
        *,
        worker: int = 0,
        label: str | None = None,
        node: str = "",
        epoch: int = 0,
        on_timings: Callable[[Sequence[Timing]], None] = lambda timings: None,
    ) -> None:
        self.spec, self.plan, self.store, self.engine = spec, plan, store, engine
        self.worker, self.node, self.epoch = worker, node, epoch
        self.label = label or f"worker-{worker}"
        self._on_timings = on_timings
        self.draining = False
        """Set, from any thread or a signal's handler, to give the shard back after the batch in hand."""
        self._sizes = BatchSizes(spec.workers.batch_size, gpu=str(engine.device).startswith("cuda"))
        self._kind: Literal["image", "video"] = "video" if engine.family.default_frames else "image"
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode")
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._ahead: tuple[int, Future[tuple[ShardRows, Timing, float]]] | None = None
        self._commits: list[tuple[_Attempt, Future[tuple[int, list[Reject]]]]] = []
        self._told: deque[Event] = deque(maxlen=8)

    # The calls.

    def attempt(
        self, assignment: Assignment, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[Event]:
        """Make a shard. The last event about it is ShardGenerated (a later call tells of its commit),
        ShardCommitted, ShardReturned or ShardFailed; `cancelled` is asked between batches."""
        name = f"e{self.epoch}-w{self.worker}-s{assignment.shard}-a{assignment.attempt}-{uuid4().hex}"
        run = _Attempt(assignment, name, cancelled)
        with about(run.shard, assignment.attempt):
            try:
                yield from self._attempt(run)
            except _Returned:
                if self.draining:
                    yield WorkerDraining(self.worker)
                    yield from self.flush()
                _log.info("given back")
                yield ShardReturned(self.worker, run.shard, assignment.attempt)
            except _Failed as failed:
                yield self._failed(run, failed.failure)
            except Exception as error:  # noqa: BLE001 - it becomes data: the dispatcher decides
                yield self._failed(run, Failure.of(error, run.stage))

    def flush(self) -> Iterator[Event]:
        """Wait for the commits in the background and tell of them."""
        while self._commits:
            run, commit = self._commits[0]
            yield from self._wait(run, commit)
            yield from self._reap()

    def recall(self) -> list[Event]:
        """The last commits told of, for a driver that may have lost them with a call that it cancelled."""
        return list(self._told)

    def close(self) -> None:
        """Finish the commits in the background and end the threads."""
        for pool in (self._reader, self._encoders, self._committer):
            pool.shutdown(wait=True, cancel_futures=pool is self._reader)

    # One attempt, in call order.

    def _attempt(self, run: _Attempt) -> Iterator[Event]:
        assignment = run.assignment
        self._go_on(run)
        yield from self._read(run)
        assert run.read is not None
        rows = self._without_quarantined(run, run.read)
        for batch, plan in self._batches(run, rows):
            yield from self._batch(run, batch, plan)
            yield from self._reap()
        run.stage = "commit"
        while self._commits:  # one commit at a time: more would pile up pictures
            yield from self._wait(run, self._commits[0][1])
            yield from self._reap()
        commit = self._committer.submit(self._in_thread, run)
        self._commits.append((run, commit))
        if assignment.next_shard is not None and not self.draining:
            yield ShardGenerated(self.worker, run.shard, assignment.attempt)
        else:
            yield from self.flush()

    def _read(self, run: _Attempt) -> Iterator[Event]:
        ahead, self._ahead = self._ahead, None
        reading = ahead[1] if ahead and ahead[0] == run.shard else self._start_reading(run.shard)
        yield from self._wait(run, reading)
        read, timing, begin = reading.result()
        run.read = read
        run.timings.append(replace(timing, start_s=begin - run.started))
        self._on_timings(run.timings)
        run.rejects += read.rejects
        if run.assignment.next_shard is not None:
            self._ahead = (run.assignment.next_shard, self._start_reading(run.assignment.next_shard))
        yield self._alive(run)

    def _start_reading(self, index: int) -> Future[tuple[ShardRows, Timing, float]]:
        def read() -> tuple[ShardRows, Timing, float]:
            begin = time.time()
            shard = self.plan.shard(index)
            rows = read_shard(self.spec, self.plan.files[shard.file], shard.first_row, shard.num_rows)
            return rows, Timing(None, "read", len(rows.rows), seconds=time.time() - begin), begin

        return self._reader.submit(read)

    def _without_quarantined(self, run: _Attempt, read: ShardRows) -> list[Row]:
        known = {row.row_id: row for row in run.assignment.quarantined}
        for row in read.rows:
            if row.row_id in known:
                why = known[row.row_id]
                run.rejects.append(_reject(row, why.error_class, why.message, "generate", why.deaths))
        return [row for row in read.rows if row.row_id not in known]

    def _batches(self, run: _Attempt, rows: Sequence[Row]) -> Iterator[tuple[list[Row], SamplingPlan]]:
        """Rows to make together: suspects first, each alone, then runs of one size in source order."""
        first = set(run.assignment.suspects)
        alone = [row for row in rows if row.row_id in first]
        sizes: dict[tuple[int | None, int | None], list[Row]] = {}
        for row in rows:
            if row.row_id not in first:
                sizes.setdefault((row.height, row.width), []).append(row)
        for row in alone:
            plan = self._plan(run, [row])
            if plan is not None:
                yield [row], plan
        for same in sizes.values():
            plan = self._plan(run, same)
            while plan is not None and same:
                count = 1 if run.assignment.isolate else self._sizes.next(_key(plan))
                yield same[:count], plan
                same = same[count:]

    def _plan(self, run: _Attempt, rows: Sequence[Row]) -> SamplingPlan | None:
        """The stages of rows of one size; None, and the rows rejected, where the model cannot make it."""
        run.stage = "plan"
        try:
            return self.engine.plan(self.spec.sampling, height_px=rows[0].height, width_px=rows[0].width)
        except ValueError as error:
            self._reject(run, rows, SizeError(first_line(error)))
            return None

    def _batch(self, run: _Attempt, rows: list[Row], plan: SamplingPlan) -> Iterator[Event]:
        """Make rows together, or in ever smaller batches where that does not go; the others are rejected."""
        todo = [rows]
        while todo:
            self._go_on(run)
            rows = todo.pop()
            most = self._sizes.limit(_key(plan), len(rows))
            if most < len(rows):  # its other half was found not to fit
                todo.append(rows[most:])
                rows = rows[:most]
            ids = tuple(row.row_id for row in rows)
            yield RowsStarted(self.worker, run.shard, run.assignment.attempt, ids)
            try:
                self._make(run, rows, plan)
                ended = rows
            except Exception as error:  # noqa: BLE001 - the row boundary: it becomes data
                ended, again = self._after(run, rows, plan, error)
                todo += reversed(again)
            if ended:
                ids = tuple(row.row_id for row in ended)
                yield RowsDone(self.worker, run.shard, run.assignment.attempt, ids)

    def _make(self, run: _Attempt, rows: Sequence[Row], plan: SamplingPlan) -> None:
        sampling, count, begin = self.spec.sampling, len(rows), time.perf_counter()
        timings: list[Timing] = []
        full = plan.stages[-1]
        ids = tuple(row.row_id for row in rows)

        def note(stage: str, start: float, seconds: float, **grid: int) -> None:
            offset = start - begin + (begun - run.started)
            timings.append(
                Timing(
                    run.batches, stage, count, seconds=seconds, start_s=max(0.0, offset), row_ids=ids, **grid
                )
            )

        begun = time.time()
        run.stage = "text_encode"
        encoded = self.engine.encode(
            [row.prompt for row in rows], [row.negative_prompt for row in rows], sampling
        )
        then = time.perf_counter()
        note("text_encode", begin, then - begin)

        run.stage = "denoise"
        latents, reports = self.engine.denoise(plan, encoded, [row.seed for row in rows], sampling)
        for report in reports:
            grid = {"height": report.height, "width": report.width, "tokens": report.tokens}
            note(report.kind, then, report.seconds, steps=report.steps, **grid)
            then += report.seconds

        run.stage = "vae_decode"
        then = time.perf_counter()
        media = self.engine.decode(plan, latents)
        kept = _arrays(latents) if self.spec.output.latents else [None] * count
        assert len(media) == count, f"{len(media)} pictures of {count} rows"
        now = time.perf_counter()
        note("vae_decode", then, now - then, height=full.height, width=full.width, tokens=full.tokens)
        self._sizes.done(_key(plan), count, now - begin)

        run.timings += timings
        self._on_timings(timings)
        stages = tuple(
            StageTime(r.height, r.width, r.tokens, r.steps, r.seconds / count)
            for r in reports
            if r.kind == "denoise"
        )
        seconds = sum(report.seconds for report in reports) / count
        for row, medium, own in zip(rows, media, kept, strict=True):
            encoding = self._encoders.submit(self._encode, medium)
            run.pictures.append(_Picture(row, plan, run.batches, stages, seconds, own, encoding))
        run.batches += 1
        waiting = [picture.encoding for picture in run.pictures[: -2 * count]]
        if waiting:  # pictures not yet encoded are large: at most two batches of them
            wait(waiting)

    def _encode(self, medium: Any) -> tuple[bytes, float, float]:
        begin = time.time()
        return encode_media(medium, self.spec.output), begin, time.time()

    def _after(
        self, run: _Attempt, rows: list[Row], plan: SamplingPlan, error: Exception
    ) -> tuple[list[Row], list[list[Row]]]:
        """What a batch's exception asks for: (rows that it ended, batches to try again)."""
        failure = Failure.of(error, run.stage)
        if failure.action is Action.HALVE_BATCH:
            error.__traceback__ = None  # its frames hold the batch's tensors
            self._free_memory()
            if len(rows) > 1:
                size = self._sizes.failed(_key(plan), len(rows))
                _log.warning("out of memory with %d rows; %d a batch from now on", len(rows), size)
                return [], [rows[k : k + size] for k in range(0, len(rows), size)]
        elif failure.action is Action.REJECT_ROW:
            named = {k for k in getattr(error, "rows", ()) if 0 <= k < len(rows)}
            if named:
                bad = [row for k, row in enumerate(rows) if k in named]
                good = [row for k, row in enumerate(rows) if k not in named]
                self._reject(run, bad, error)
                return bad, [good] if good else []
            if len(rows) > 1:
                half = len(rows) // 2
                return [], [rows[:half], rows[half:]]
        else:
            raise _Failed(failure) from error
        self._reject(run, rows, error)
        return rows, []

    def _reject(self, run: _Attempt, rows: Iterable[Row], error: Exception) -> None:
        stage = getattr(error, "stage", None)
        stage = stage if isinstance(stage, str) else run.stage
        for row in rows:
            name, message = type(error).__name__, first_line(error)
            _log.info("row %r is rejected in %s: %s: %s", row.row_id, stage, name, message)
            run.rejects.append(_reject(row, name, message, stage, run.assignment.attempt))

    def _in_thread(self, run: _Attempt) -> tuple[int, list[Reject]]:
        with about(run.shard, run.assignment.attempt):
            return self._commit(run)

    def _commit(self, run: _Attempt) -> tuple[int, list[Reject]]:
        """In a thread: (rows, rejects) of the part, which is ours unless another was there first."""
        assert run.read is not None
        made: list[Made] = []
        spans: dict[int, list[tuple[str, float, float]]] = {}
        rejects = list(run.rejects)
        for picture in run.pictures:
            row, plan = picture.row, picture.plan
            try:
                data, begin, end = picture.encoding.result()
            except Exception as error:  # the row boundary again
                failure = Failure.of(error, "image_encode")
                if failure.action is not Action.REJECT_ROW:
                    raise
                attempt = run.assignment.attempt
                rejects.append(_reject(row, failure.error_class, failure.message, "image_encode", attempt))
                continue
            spans.setdefault(picture.batch, []).append((row.row_id, begin, end))
            made.append(
                Made(
                    row=row,
                    data=data,
                    height_px=plan.height_px,
                    width_px=plan.width_px,
                    num_steps=plan.num_steps,
                    stages=picture.stages,
                    denoise_seconds=picture.denoise_seconds,
                    latents=picture.latents,
                    delta=plan.delta,
                )
            )
        run.pictures.clear()
        before = len(run.timings)
        for batch, span in spans.items():
            begin = min(begin for _, begin, _ in span)
            seconds = max(end for _, _, end in span) - begin
            ids = tuple(row_id for row_id, _, _ in span)
            start_s = begin - run.started
            run.timings.append(
                Timing(batch, "image_encode", len(span), seconds=seconds, start_s=start_s, row_ids=ids)
            )
        part = build_part(
            self.spec,
            self.plan,
            self.plan.shard(run.shard),
            attempt=run.id,
            made=made,
            rejects=rejects,
            passthrough=run.read.passthrough,
            first_row=run.read.first_row,
            timings=run.timings,
            worker=self.label,
            device=str(self.engine.device),
            node=self.node,
            started=run.started,
            kind=self._kind,
        )
        once = part.footer.timings[before:]
        begin = time.time()
        ours = commit_part(self.store, part)
        self._on_timings((*once, Timing(None, "upload", len(made), seconds=time.time() - begin)))
        _log.info(
            "%d rows and %d rejects in %.1f s%s",
            len(made),
            len(rejects),
            time.time() - run.started,
            "" if ours else ", and another attempt was first",
        )
        return len(made) + len(rejects), rejects

    # Between batches.

    def _go_on(self, run: _Attempt) -> None:
        if self.draining or run.cancelled():
            raise _Returned

    def _alive(self, run: _Attempt) -> ShardAlive:
        return ShardAlive(self.worker, run.shard, run.assignment.attempt)

    def _failed(self, run: _Attempt, failure: Failure) -> ShardFailed:
        _log.warning("failed in %s: %s", failure.stage, failure.traceback.rstrip())
        return ShardFailed(self.worker, run.shard, run.assignment.attempt, failure)

    def _wait(self, run: _Attempt, future: Future[Any]) -> Iterator[Event]:
        """Until a thread is done, saying now and then that this attempt, and the commits, go on."""
        while not wait([future], timeout=ALIVE_S).done:
            yield self._alive(run)
            yield from (self._alive(other) for other, _ in self._commits if other is not run)

    def _reap(self) -> Iterator[Event]:
        """Tell of the commits that have ended."""
        for run, commit in [entry for entry in self._commits if entry[1].done()]:
            self._commits.remove((run, commit))
            error = commit.exception()
            event: Event
            if error is not None:
                event = self._failed(run, Failure.of(error, "commit"))
            else:
                rows, rejects = commit.result()
                reasons = tuple(sorted(Counter(reject.error_class for reject in rejects).items()))
                event = ShardCommitted(
                    self.worker, run.shard, run.assignment.attempt, rows, len(rejects), reasons
                )
            self._told.append(event)
            yield event

    def _free_memory(self) -> None:
        gc.collect()
        if str(self.engine.device).startswith("cuda"):
            import torch

            torch.cuda.empty_cache()


def _key(plan: SamplingPlan) -> tuple[int, int, int | None]:
    return plan.height_px, plan.width_px, plan.num_frames


def _reject(row: Row, error_class: str, message: str, stage: str, attempts: int) -> Reject:
    return Reject(
        row_id=row.row_id,
        error_class=error_class,
        message=message,
        stage=stage,
        attempts=attempts,
        source=row.source,
        prompt=row.prompt[:PROMPT_CUT],
    )


def _arrays(latents: Any) -> list[np.ndarray | None]:
    """Each row's latents, [C, H, W] or [C, T, H, W], as float32 on the CPU."""
    if hasattr(latents, "detach"):
        latents = latents.detach().float().cpu().numpy()
    return list(np.asarray(latents, np.float32))
