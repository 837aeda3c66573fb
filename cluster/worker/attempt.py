"""One attempt at a shard: what it has gathered so far, and its events. Knows no device and no store.

An `Attempt` goes through all hands of a runner: the reader gives it rows, the device takes them through the
stages as `Batch`es, `Picture`s are what is left to encode, and the commit makes a part of it all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from overtone.cluster.dispatch import Assignment, RowsDone, RowsStarted, ShardAlive, ShardFailed
from overtone.cluster.faults import Failure, first_line
from overtone.cluster.worker.protocol import Trajectories
from overtone.jobs.errors import RowError
from overtone.jobs.parts import StageTime, Timing
from overtone.jobs.prompts import ShardRows
from overtone.jobs.rows import PROMPT_CUT, Reject, Row
from overtone.progressive.schedule import SamplingPlan

ALIVE_S = 1.0
"""How often an attempt that waits for a thread reports that it continues."""
PAUSE_S = 1e-3
"""A thread that does nothing for longer than this has ended what its line of the timings is about."""

_log = logging.getLogger(__name__)


class Returned(Exception):
    """The attempt was asked to stop."""


class Failed(Exception):
    """The attempt cannot continue."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass
class Attempt:
    """One attempt at one shard, on its way."""

    assignment: Assignment
    id: str = ""
    """Unique; the store tells one attempt's part from another's by it."""
    worker: int = 0
    """The dispatcher's number of the worker, for the events."""
    asked_to_stop: Callable[[], bool] = lambda: False
    on_timings: Callable[[Sequence[Timing]], None] = lambda timings: None
    """Called with the timings of each batch, and of what is done once for a shard, from any thread."""
    started: float = field(default_factory=time.time)
    """Seconds since 1970."""
    phase: str = "read"
    """What the attempt is doing; a failure names it."""
    read: ShardRows | None = None
    """None: not yet."""
    num_batches: int = 0
    """Batches that were begun."""
    decoding: Decoding | None = None
    """The pictures that are being decoded."""
    pictures: list[Picture] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    named: tuple[str, ...] = ()
    """The rows that were last reported to be in flight."""
    trouble: str = ""
    """What keeps the commit waiting, not yet reported."""

    @property
    def shard(self) -> int:
        return self.assignment.shard

    @property
    def careful(self) -> bool:
        """Whether rows are made one at a time, and nothing beside them."""
        return self.assignment.isolate or bool(self.assignment.suspects)

    def stop_if_asked(self) -> None:
        if self.asked_to_stop():
            raise Returned

    def begin_rows(self, rows: Sequence[Row]) -> RowsStarted | ShardAlive:
        """Name the rows that are in flight from now on: these, and those whose pictures are being decoded.
        Where they are the same as before, report all the same that the attempt continues: what comes next
        takes time."""
        ids = (*(self.decoding.ids if self.decoding else ()), *ids_of(rows))
        if ids == self.named:
            return self.alive()
        self.named = ids
        return RowsStarted(self.worker, self.shard, self.assignment.attempt, ids)

    def end_rows(self, rows: Sequence[Row]) -> Iterator[RowsDone]:
        """Report that rows are made or rejected; where there are none, nothing."""
        if rows:
            ids = ids_of(rows)
            self.named = tuple(row_id for row_id in self.named if row_id not in ids)
            yield RowsDone(self.worker, self.shard, self.assignment.attempt, ids)

    def alive(self) -> ShardAlive:
        trouble, self.trouble = self.trouble, ""
        return ShardAlive(self.worker, self.shard, self.assignment.attempt, trouble)

    def wait(self, future: Future[Any]) -> Iterator[ShardAlive]:
        """Wait for a thread; until it is done, report now and then that the attempt continues."""
        while not wait([future], timeout=ALIVE_S).done:
            yield self.alive()

    def failed(self, failure: Failure) -> ShardFailed:
        _log.warning("failed in %s: %s", failure.phase, failure.traceback.rstrip())
        return ShardFailed(self.worker, self.shard, self.assignment.attempt, failure)

    def reject(self, rows: Iterable[Row], error: Exception) -> None:
        """Reject rows that an exception ended."""
        phase = error.phase if isinstance(error, RowError) else self.phase
        for row in rows:
            name, message = type(error).__name__, first_line(error)
            _log.info("row %r is rejected in %s: %s: %s", row.row_id, phase, name, message)
            self.add_reject(row, name, message, phase, self.assignment.attempt)

    def add_reject(self, row: Row, error_class: str, message: str, phase: str, attempts: int) -> None:
        self.rejects.append(
            Reject(
                row_id=row.row_id,
                error_class=error_class,
                message=message,
                stage=phase,
                attempts=attempts,
                source=row.source,
                prompt=row.prompt[:PROMPT_CUT],
            )
        )

    def timing(
        self,
        batch: int | None,
        stage: str,
        row_ids: tuple[str, ...],
        begin: float,
        seconds: float,
        **grid: int,
    ) -> Timing:
        """A line of the timings for some rows of a batch; `begin` in seconds since 1970."""
        start_s = begin - self.started  # below 0 where it began beside the shard before
        return Timing(batch, stage, len(row_ids), seconds=seconds, start_s=start_s, row_ids=row_ids, **grid)

    def timing_of_shard(self, stage: str, num_rows: int, begin: float, seconds: float) -> Timing:
        """A line of the timings for what is done once for all rows, which it does not name."""
        return Timing(None, stage, num_rows, seconds=seconds, start_s=begin - self.started)

    def timings_of_encoding(
        self, batch: int, encoded: Iterable[tuple[str, EncodedMedia]]
    ) -> Iterator[Timing]:
        """Lines of the timings for the pictures of a batch, by row_id: one for each unbroken run of a thread,
        with its time at work. A batch's pictures are encoded as its chunks are decoded, so that from the
        first to the last of them most of the time is denoising."""
        runs: list[list[tuple[str, EncodedMedia]]] = []
        for one in sorted(encoded, key=lambda one: (one[1].thread, one[1].begin)):
            last = runs[-1][-1][1] if runs else None
            if last is None or last.thread != one[1].thread or one[1].begin - last.end > PAUSE_S:
                runs.append([])
            runs[-1].append(one)
        for run in sorted(runs, key=lambda run: run[0][1].begin):
            ids = tuple(row_id for row_id, _ in run)
            seconds = sum(media.end - media.begin for _, media in run)
            yield self.timing(batch, "image_encode", ids, run[0][1].begin, seconds)

    def record(self, timings: Sequence[Timing]) -> None:
        self.timings += timings
        self.on_timings(timings)


@dataclass
class Batch:
    """Rows of one size that go through the stages together. A chunk of it, the rows that denoise together in
    one call, is a list of indices into `rows`."""

    number: int
    """In the attempt, from 0."""
    rows: list[Row]
    sampling_plan: SamplingPlan
    trajectories: Trajectories
    stages: list[list[StageTime]]
    """Of each row."""
    denoise_seconds: list[float]
    """Of each row, with the expansions."""
    truncated: Sequence[bool | None] | None = None
    """Of each row, whether its prompt was cut; None: not known."""

    def pick(self, chunk: Iterable[int]) -> list[Row]:
        return [self.rows[index] for index in chunk]

    def ids(self, chunk: Iterable[int]) -> tuple[str, ...]:
        return tuple(self.rows[index].row_id for index in chunk)


@dataclass
class Decoding:
    """A chunk whose pictures are being decoded."""

    batch: Batch
    chunk: list[int]
    future: Future[Decoded]

    @property
    def ids(self) -> tuple[str, ...]:
        return self.batch.ids(self.chunk)


@dataclass
class Decoded:
    """A chunk as the engine's decoder gave it."""

    media: Sequence[Any]
    latents: Sequence[np.ndarray | None]
    begin: float
    """Seconds since 1970."""
    seconds: float


@dataclass
class Picture:
    """A row whose picture is being encoded."""

    row: Row
    sampling_plan: SamplingPlan
    batch: int
    """The batch's number."""
    stages: tuple[StageTime, ...]
    denoise_seconds: float
    latents: np.ndarray | None
    prompt_truncated: bool | None
    encoding: Future[EncodedMedia]


@dataclass(frozen=True)
class EncodedMedia:
    """A picture or video as bytes of a file, and when its encoding began and ended, in seconds since 1970."""

    data: bytes
    begin: float
    end: float
    thread: int
    """Of the threads that encode, which one."""


def ids_of(rows: Iterable[Row]) -> tuple[str, ...]:
    return tuple(row.row_id for row in rows)
