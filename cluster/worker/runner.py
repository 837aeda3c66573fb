"""One attempt at one shard: its rows read, made, encoded and committed. Knows no Ray.

    runner = Runner(spec, job_plan, store, engine, worker=3, epoch=7, node="a")
    for event in runner.attempt(assignment): ...     # events of overtone.cluster.dispatch, as they happen
    for event in runner.flush(): ...                 # wait for commits in the background
    made, rejects = Runner(spec, None, None, engine).make(rows)     # the same, of rows without a shard

The calling thread does nothing but generate. Reading the next shard, encoding pictures, committing the last
shard and then writing its timings happen in threads beside it; on a GPU, encoding the next batch's prompts
and decoding the last chunk do, too. A row that cannot be made becomes a reject; anything else ends the
attempt with a `ShardFailed`.

The tour of a row's way continues in worker/reader.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from uuid import uuid4

from overtone.cluster.dispatch import (
    Assignment,
    Event,
    ShardAlive,
    ShardGenerated,
    ShardReturned,
    WorkerDraining,
)
from overtone.cluster.faults import Failure
from overtone.cluster.logs import about
from overtone.cluster.worker.attempt import Attempt, Failed, Returned
from overtone.cluster.worker.commits import Commits, made_of
from overtone.cluster.worker.device import Device
from overtone.cluster.worker.model import loaded_commit
from overtone.cluster.worker.protocol import Engine, Guided, device_name
from overtone.cluster.worker.reader import Reader
from overtone.jobs.media import Kind
from overtone.jobs.parts import AttemptFacts, Made, Timing
from overtone.jobs.plan import JobPlan
from overtone.jobs.retry_plan import RetryPlan
from overtone.jobs.rows import Reject, Row
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import Store
from overtone.progressive.schedule import SamplingPlan

_log = logging.getLogger(__name__)


class Runner:
    """A resident engine and the threads around it. One attempt at a time.

    Args:
        job_plan, store: None for a runner that is only asked to `make` rows.
        worker: the dispatcher's number of this worker, for its events.
        node: where it runs, for the timings.
        epoch: of the driver, for the attempts' names; it may be set later.
        retry_plan: whose rows to make, instead of all rows of a shard.
        on_timings: called with the timings of each batch, and of what is done once for a shard, from any
            thread.
        reader: reads the shards; None: one of this job.
    """

    def __init__(
        self,
        spec: JobSpec,
        job_plan: JobPlan | None,
        store: Store | None,
        engine: Engine,
        *,
        worker: int = 0,
        node: str = "",
        epoch: int = 0,
        retry_plan: RetryPlan | None = None,
        on_timings: Callable[[Sequence[Timing]], None] = lambda timings: None,
        reader: Reader | None = None,
    ) -> None:
        self._worker, self.epoch, self._on_timings = worker, epoch, on_timings
        self.draining = False
        """Set, from any thread or a signal's handler, to give the shard back after the chunk in hand."""
        self.kind: Kind = "video" if engine.family.default_frames else "image"
        """What the model makes."""
        facts = AttemptFacts(
            id="",
            worker=f"worker-{worker}",
            device=str(engine.device),
            node=node,
            retry=0 if retry_plan is None else retry_plan.number,
            device_name=device_name(engine),
            model_commit=loaded_commit(spec),
        )
        self._guidance = engine.guidance(spec.sampling) if isinstance(engine, Guided) else {}
        self._reader = reader or Reader(spec, job_plan, store, retry_plan)
        self._device = Device(spec, engine)
        self._commits = Commits(spec, job_plan, store, facts, self.kind, self._guidance)

    def attempt(
        self, assignment: Assignment, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[Event]:
        """Make a shard. The last event about it is ShardGenerated (a later call reports its commit),
        ShardCommitted, ShardReturned or ShardFailed; `cancelled` is asked between chunks."""
        shard, number = assignment.shard, assignment.attempt
        attempt = Attempt(
            assignment,
            id=f"e{self.epoch}-w{self._worker}-s{shard}-a{number}-{uuid4().hex}",
            worker=self._worker,
            asked_to_stop=lambda: self.draining or cancelled(),
            on_timings=self._on_timings,
        )
        with about(shard, number):
            try:
                yield from self._attempt(attempt)
            except Returned:
                if self.draining:
                    yield WorkerDraining(self._worker)
                    yield from self.flush()
                _log.info("given back")
                yield ShardReturned(self._worker, shard, number)
            except Failed as failed:
                yield attempt.failed(failed.failure)
            except Exception as error:  # noqa: BLE001 - it becomes data: the dispatcher decides
                yield attempt.failed(Failure.of(error, attempt.phase))

    def _attempt(self, attempt: Attempt) -> Iterator[Event]:
        attempt.stop_if_asked()
        yield from self._beside_commits(self._reader.read(attempt))
        rows = reject_quarantined(attempt)
        yield from self._beside_commits(self._device.generate(attempt, rows, self._reader.upcoming))
        yield from self._commits.commit(attempt)
        if attempt.assignment.commit_first or self.draining:
            yield from self.flush()
        else:
            yield ShardGenerated(self._worker, attempt.shard, attempt.assignment.attempt)

    def _beside_commits(self, events: Iterable[Event]) -> Iterator[Event]:
        """An attempt's events, and those of the commits that run beside it. A commit that has ended is
        reported before the event at hand, for after that something takes time."""
        for event in events:
            yield from self._commits.reap()
            yield event
            if isinstance(event, ShardAlive):
                yield from self._commits.alive()

    def make(self, rows: Sequence[Row]) -> tuple[list[Made], list[Reject]]:
        """Make rows that are no shard's; each ends in one of the lists. Raises what is not a row's fault."""
        attempt = Attempt(Assignment(shard=0, attempt=1), on_timings=self._on_timings)
        try:
            for _ in self._device.generate(attempt, rows):
                pass  # nobody waits for these events
        except Failed as failed:
            raise failed.__cause__ or failed from None
        return made_of(attempt, self._guidance), attempt.rejects

    def warm_up(self, sampling_plan: SamplingPlan) -> Iterator[None]:
        """Let an engine that compiles do so for every chunk that rows with this plan can come in."""
        return self._device.warm_up(sampling_plan)

    def flush(self) -> Iterator[Event]:
        """Wait for the commits in the background and report them."""
        return self._commits.flush()

    def recall(self) -> list[Event]:
        """The last commits that were reported, for a driver that may have lost them with a call that it
        cancelled."""
        return list(self._commits.recent_events)

    def close(self) -> None:
        """Finish the commits in the background and end the threads."""
        self._reader.close()
        self._device.close()
        self._commits.close()


def reject_quarantined(attempt: Attempt) -> list[Row]:
    """The rows to make: all but those that killed workers before, which are rejected without being run."""
    assert attempt.read is not None
    known = {row.row_id: row for row in attempt.assignment.quarantined}
    for row in attempt.read.rows:
        if row.row_id in known:
            why = known[row.row_id]
            attempt.add_reject(row, why.error_class, why.message, "generate", why.deaths)
    return [row for row in attempt.read.rows if row.row_id not in known]
