"""One run of a job, from its spec to a summary: feeds events to the dispatcher and executes its actions.
Knows stores and shards; what is Ray's is `cluster.fleet`'s.

    summary = run_job(spec)                          # Ray is started here
    summary = run_job(spec, address="auto")          # on a cluster
    summary = retry_job("s3://bucket/run-7")         # once more those that were rejected

Whatever the user got wrong is found before anything is written. The job's folder is the only state: a run
that ends in any way at all is gone on with by the next.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from overtone.cluster.dispatch import (
    Abort,
    Action,
    Assign,
    Cancel,
    Dispatcher,
    Done,
    Event,
    FailShard,
    Flush,
    Quarantine,
    RetireSlot,
    Retry,
    RowsDone,
    Rules,
    ShardCommitted,
    StartWorker,
    StopWorker,
    WorkerDied,
    WorkerDraining,
    WorkerReady,
)
from overtone.cluster.driver.summary import SHEET, SHEET_PICTURES, Summary, short, summary_of
from overtone.cluster.submit import use_token
from overtone.jobs.errors import JobError, NoWorkersLeft, StaleDriver, StoreError, TooManyRejects, VerifyError
from overtone.jobs.folder import JobFolder
from overtone.jobs.plan import JobPlan
from overtone.jobs.report import CARD, contact_sheet, first_pictures, write_card
from overtone.jobs.retry_plan import RetryPlan
from overtone.jobs.rows import Quarantined
from overtone.jobs.spec import JobSpec
from overtone.jobs.status import Snapshot

if TYPE_CHECKING:
    from overtone.cluster.fleet import Fleet
    from overtone.cluster.metrics import JobMetrics
    from overtone.cluster.worker import EngineFactory


TICK_S = 0.5
"""How often time passes for the dispatcher."""
STALE_EVERY_S = 5.0
"""How often a driver looks whether a newer one took the job over."""
CAPACITY_EVERY_S = 2.0
"""How often the cluster's size is asked for, where the number of workers follows it."""


class Run:
    """What one driver keeps while a job, or a retry of its rejects, runs."""

    def __init__(
        self,
        spec: JobSpec,
        plan: JobPlan,
        folder: JobFolder,
        retry: RetryPlan | None,
        epoch: int,
        on_event: Callable[[Snapshot], None],
    ) -> None:
        self.spec, self.plan, self.folder, self.store = spec, plan, folder, folder.store
        self.retry, self.epoch, self.on_event = retry, epoch, on_event
        self.work = plan if retry is None else retry  # what is counted: a retry's shards and rows are its own
        self.finished = folder.finished(retry)
        self.error: JobError | None = None
        self.traceback = ""
        self.rows = self.rejects = self.retries = self.lost = 0
        self.reasons: Counter[str] = Counter()
        self.notes: list[str] = []
        self._rows_finished = sum(map(self._rows_of, self.finished))
        self._in_hand: Counter[int] = Counter()  # rows made of shards that are not committed
        self._ready: set[int] = set()  # workers that had their engine at some time
        self._leaving: dict[int, float] = {}  # workers whose machine goes: when they are killed
        self._unkept: list[Quarantined] = []  # quarantines that the store did not take yet
        self._stale_at = self._capacity_at = time.monotonic()
        self._ended = False
        self._metrics: JobMetrics | None = None
        workers, faults = spec.workers, spec.faults
        self.dispatcher = Dispatcher(
            num_shards=plan.num_shards,
            num_rows=self.work.num_rows,
            done=chain(self.finished, self._others()),
            rules=Rules(
                min_workers=workers.min,
                max_workers=workers.max or workers.min,
                max_attempts=faults.max_attempts,
                row_deaths=faults.row_deaths,
                worker_failures=faults.worker_failures,
                max_reject_fraction=faults.max_reject_fraction,
                silence_s=faults.row_timeout_s,
            ),
            quarantine=folder.quarantined(self._number),
            rows_of=self._rows_of,
        )

    @property
    def _number(self) -> int:
        return 0 if self.retry is None else self.retry.number

    def _others(self) -> list[int]:
        """The shards of which a retry has no row."""
        if self.retry is None:
            return []
        return np.setdiff1d(np.arange(self.plan.num_shards), self.retry.shards).tolist()

    def _rows_of(self, shard: int) -> int:
        return self.plan.shard(shard).num_rows if self.retry is None else self.retry.rows_of(shard)

    # The loop.

    def go(
        self, address: str | None, engine_factory: EngineFactory | None, interrupted: threading.Event
    ) -> None:
        """Until every shard is done or the job has to end. KeyboardInterrupt once `interrupted` is set."""
        self._tell()
        if address is not None:
            use_token()
        # Ray prints a paragraph for each worker that dies; the dispatcher's line says more.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
        from overtone.cluster.fleet import (
            Fleet,  # only now: a run without work needs no Ray, and Ray reads the above
        )
        from overtone.cluster.metrics import JobMetrics

        fleet = Fleet(
            self.spec,
            self.plan,
            self.store,
            epoch=self.epoch,
            address=address,
            engine_factory=engine_factory,
            retry=self.retry,
        )
        self._metrics = JobMetrics(self.spec.name)
        try:
            self._fit(fleet)
            self._execute(fleet, self.dispatcher.begin(time.monotonic()))
            ticked = time.monotonic()
            while not self._ended:
                if interrupted.is_set():
                    raise KeyboardInterrupt
                for event in fleet.poll(TICK_S):
                    self._note(event)
                    self._execute(fleet, self.dispatcher.handle(event, time.monotonic()))
                if time.monotonic() - ticked >= TICK_S:
                    ticked = time.monotonic()
                    self._regularly(fleet, ticked)
                    self._execute(fleet, self.dispatcher.tick(ticked))
                    self._tell()
            self._tell()
        finally:
            self._metrics.close()
            fleet.close()

    def _regularly(self, fleet: Fleet, now: float) -> None:
        for worker in [worker for worker, at in self._leaving.items() if now > at]:
            del self._leaving[worker]
            fleet.stop(worker, kill=True)
            gone = WorkerDied(worker, "its machine went away", preempted=True)
            self._execute(fleet, self.dispatcher.handle(gone, now))
        self._keep_quarantines()
        if now - self._capacity_at > CAPACITY_EVERY_S:
            self._capacity_at = now
            self._fit(fleet)
        if now - self._stale_at > STALE_EVERY_S:
            self._stale_at = now
            self._check_epoch()

    def _fit(self, fleet: Fleet) -> None:
        """Where the spec leaves the number of workers open, as many as the cluster has room for."""
        if self.spec.workers.max is None:
            rules = self.dispatcher.rules
            most = max(rules.min_workers, fleet.capacity())
            self.dispatcher.rules = replace(rules, max_workers=most)

    def _check_epoch(self) -> None:
        try:
            newest = self.folder.newest_epoch()
        except StoreError:
            return  # the next look will tell; workers that cannot reach the store say so themselves
        if newest > self.epoch:
            self.error = StaleDriver(f"another driver, number {newest}, took the job over")
            self._ended = True

    def _keep_quarantines(self) -> None:
        try:
            while self._unkept:
                self.folder.add_quarantine(self._unkept[0], self._number)
                self._unkept.pop(0)
        except StoreError:
            pass  # tried again at the next tick

    # Events, for the numbers.

    def _note(self, event: Event) -> None:
        match event:
            case WorkerReady():
                self._ready.add(event.worker)
            case RowsDone():
                self._in_hand[event.shard] += len(event.rows)
            case ShardCommitted():
                self._in_hand.pop(event.shard, None)
                if event.shard not in self.finished:
                    self.finished.add(event.shard)
                    self._rows_finished += self._rows_of(event.shard)
                    self.rows += event.rows - event.rejects
                    self.rejects += event.rejects
                    self.reasons.update(dict(event.reasons))
            case WorkerDied():
                self.lost += 1
                self._leaving.pop(event.worker, None)
            case WorkerDraining():
                self._leaving[event.worker] = time.monotonic() + self.spec.faults.grace_s

    # Actions.

    def _execute(self, fleet: Fleet, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StartWorker():
                    fleet.start(action.worker, action.avoid)
                case StopWorker():
                    self._leaving.pop(action.worker, None)
                    self.lost += action.kill and action.worker in self._ready
                    fleet.stop(action.worker, kill=action.kill)
                case Assign():
                    self._in_hand.pop(action.assignment.shard, None)
                    fleet.assign(action.worker, action.assignment)
                case Cancel():
                    fleet.cancel(action.worker, action.shard)
                case Flush():
                    fleet.flush(action.worker)
                case Quarantine():
                    self._unkept.append(action.row)
                    self._keep_quarantines()
                    self._tell(
                        f"row {action.row.row_id!r} kills workers and is rejected: {action.row.message}"
                    )
                case RetireSlot():
                    where = f" on node {action.node[:12]}" if action.node else ""
                    note = f"a worker{where} is given up after {action.failures} failures: {action.message}"
                    self.notes.append(note)
                    self._tell(note)
                case FailShard():
                    note = f"shard {action.shard} is given up: {action.message}"
                    self.notes.append(note)
                    self._tell(note)
                case Retry():
                    self.retries += 1
                    self._tell(f"shard {action.shard} is tried again: {action.message}")
                case Done():
                    self._ended = True
                    if action.failed:
                        self.error = JobError(f"{len(action.failed)} shards could not be made")
                case Abort():
                    self._ended = True
                    kinds = {"no_workers": NoWorkersLeft, "rejects": TooManyRejects}
                    self.error = kinds.get(action.kind, JobError)(action.message)
                    if action.failure is not None:
                        self.traceback = action.failure.traceback

    # For people.

    def _tell(self, note: str | None = None) -> None:
        work = self.work
        done = min(self._rows_finished + self._in_hand.total(), work.num_rows)
        rejected = min(self.rejects, done)
        self.on_event(
            Snapshot(
                rows_total=work.num_rows,
                rows_done=done - rejected,
                rows_rejected=rejected,
                shards_total=work.num_shards,
                shards_done=len(self.finished),
                workers_ready=self.dispatcher.ready,
                workers_starting=self.dispatcher.starting,
                retries=self.retries,
                note=note,
            )
        )
        if self._metrics is not None:
            dispatcher = self.dispatcher
            running = dispatcher.busy
            self._metrics.show(
                rows=self.rows,
                rejects=self.reasons,
                retries=self.retries,
                workers_lost=self.lost,
                shards={
                    "waiting": dispatcher.left - running,
                    "running": running,
                    "done": len(self.finished),
                },
                workers={"ready": dispatcher.ready, "starting": dispatcher.starting},
            )

    def summary(self, began: float) -> Summary:
        """The end of the run, and a sheet of the first pictures where the output is a local folder."""
        if len(self.finished) == self.work.num_shards:
            self.folder.repair_derived()
            other = self.folder.unfinished_retry()
            if other is not None:
                self.notes.append(f"retry {other.number} lacks parts: the same command again goes on with it")
            try:
                write_card(self.store, self.spec, self.plan)
            except (StoreError, VerifyError) as error:
                self.notes.append(f"{CARD} is not written, `overtone card` tries again: {error}")
        summary = summary_of(self.spec, self.work, self.store, began, done=len(self.finished))
        sheet = summary.sheet
        if self.error is None and not self.store.url.startswith("s3://"):
            pictures = list(first_pictures(self.store, SHEET_PICTURES))
            if pictures:
                self.store.put(SHEET, contact_sheet(pictures), content_type="image/png")
                sheet = short(self.store.where(SHEET))
        return replace(
            summary,
            rows=self.rows,
            rejects=self.rejects,
            reasons=tuple(sorted(self.reasons.items())),
            workers_lost=self.lost,
            notes=tuple(self.notes),
            error=self.error,
            traceback=self.traceback,
            sheet=sheet,
        )
