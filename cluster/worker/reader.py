"""The rows of a shard, and in a thread of its own those of the next one ahead. Knows no device and no commit.

    reader = Reader(spec, job_plan, store, retry_plan)
    yield from reader.read(attempt)     # then attempt.read has the rows
    reader.upcoming(8)                  # the first rows of the next shard, as far as they are known

The tour of a row's way continues in worker/device.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from overtone.cluster.dispatch import Event
from overtone.cluster.worker.attempt import Attempt
from overtone.jobs.plan import JobPlan
from overtone.jobs.prompts import ShardRows, read_shard
from overtone.jobs.retry import read_rejected
from overtone.jobs.retry_plan import RetryPlan
from overtone.jobs.rows import Row
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import Store


@dataclass(frozen=True)
class Reading:
    """A shard as it was read."""

    shard: ShardRows
    begin: float
    """Seconds since 1970."""
    seconds: float


class Reader:
    """Reads the shards of a job, or of a retry where there is a `retry_plan`, one after the other."""

    def __init__(
        self,
        spec: JobSpec,
        job_plan: JobPlan | None,
        store: Store | None,
        retry_plan: RetryPlan | None = None,
    ) -> None:
        self._spec, self._job_plan, self._store, self._retry_plan = spec, job_plan, store, retry_plan
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._ahead: tuple[int, Future[Reading]] | None = None
        """The shard that is read ahead, or was."""

    def read(self, attempt: Attempt) -> Iterator[Event]:
        """Give an attempt its rows, which may have been read ahead, and begin on those of the shard after."""
        ahead, self._ahead = self._ahead, None
        future = ahead[1] if ahead and ahead[0] == attempt.shard else self.start(attempt.shard)
        yield from attempt.wait(future)
        reading = future.result()
        num_rows = len(reading.shard.rows)
        attempt.record([attempt.timing_of_shard("read", num_rows, reading.begin, reading.seconds)])
        attempt.rejects += reading.shard.rejects
        attempt.read = reading.shard
        following = attempt.assignment.read_ahead
        if following is not None:
            self._ahead = following, self.start(following)

    def upcoming(self, count: int) -> list[Row]:
        """The first `count` rows of the shard that is read ahead; none while they are not known."""
        if self._ahead is None or not self._ahead[1].done() or self._ahead[1].exception():
            return []
        return self._ahead[1].result().shard.rows[:count]

    def start(self, index: int) -> Future[Reading]:
        """Begin to read a shard."""
        return self._thread.submit(self._read, index)

    def _read(self, index: int) -> Reading:
        assert self._job_plan is not None
        assert self._store is not None
        begin = time.time()
        shard = self._job_plan.shard(index)
        if self._retry_plan is not None:
            rows = read_rejected(self._store, self._spec, self._job_plan, self._retry_plan, index)
        else:
            file = self._job_plan.files[shard.file]
            rows = read_shard(self._spec, file, shard.first_row, shard.num_rows)
        return Reading(rows, begin, time.time() - begin)

    def close(self) -> None:
        """End the thread; what was to be read is not."""
        self._thread.shutdown(wait=True, cancel_futures=True)
