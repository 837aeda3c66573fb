"""The loop of one run: feeds the workers' events to the dispatcher and executes its actions. Knows stores and
shards; what is Ray's is `cluster.fleet`'s.

    loop = DriverLoop(spec, job_plan, work, folder, on_event)
    loop.go(address, engine_factory, interrupts)         # until the work is done or has to end
    loop.tally, loop.ending                              # what was made, and why it ended

It takes the job over from an older driver only once a worker of its own has its model: a run that cannot
begin ends none that works.

Next stop of the tour: cluster/dispatch/dispatcher.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

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
    Rules,
    ShardAlive,
    StartWorker,
    StopWorker,
    WorkerDied,
    WorkerDraining,
    WorkerFailed,
)
from overtone.cluster.driver.interrupts import Interrupts
from overtone.cluster.driver.summary import Ending
from overtone.cluster.driver.tally import Tally
from overtone.cluster.submit import use_token
from overtone.jobs.errors import JobError, NoWorkersLeft, StaleDriver, StoreError, TooManyRejects, UserError
from overtone.jobs.folder import JobFolder
from overtone.jobs.plan import JobPlan, Work
from overtone.jobs.retry_plan import RetryPlan
from overtone.jobs.rows import Quarantined
from overtone.jobs.spec import JobSpec
from overtone.jobs.status import Snapshot
from overtone.jobs.words import counted

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
PLACED_WITHIN_S = 10.0
"""How long a worker may wait for a place before somebody is told why."""
HEAD_WITHIN_S = 20.0
"""How long the cluster's head may be silent before the run ends; Ray itself would end it without a word."""


class DriverLoop:
    """What one driver keeps while its work, a job or a retry of its rejects, is done."""

    def __init__(
        self,
        spec: JobSpec,
        job_plan: JobPlan,
        work: Work,
        folder: JobFolder,
        on_event: Callable[[Snapshot], None],
    ) -> None:
        self.tally = Tally(work, folder.finished(work), unit=job_plan.unit)
        self.ending = Ending()
        self.epoch: int | None = None
        """This driver's number, once it has taken the job up."""
        self._spec, self._job_plan, self._work, self._folder = spec, job_plan, work, folder
        self._on_event = on_event
        self._told: set[str] = set()  # what is said once, however often it happens
        self._leaving: dict[int, float] = {}  # workers whose machine goes: when they are killed
        self._unkept: list[Quarantined] = []  # quarantines that the store did not take yet
        self._stale_at = self._capacity_at = time.monotonic()
        self._ended = False
        self._metrics: JobMetrics | None = None
        workers, faults = spec.workers, spec.faults
        self._dispatcher = Dispatcher(
            num_shards=job_plan.num_shards,
            num_rows=work.num_rows if job_plan.unit == "row" else None,
            done=chain(self.tally.finished, work.left_out(job_plan.num_shards)),
            rules=Rules(
                min_workers=workers.min,
                max_workers=workers.max or workers.min,
                max_attempts=faults.max_attempts,
                row_deaths=faults.row_deaths,
                worker_failures=faults.worker_failures,
                max_reject_fraction=faults.max_reject_fraction,
                silence_s=faults.row_timeout_s,
            ),
            quarantine=folder.quarantined(work.number),
            rows_of=work.rows_of,
        )

    def go(self, address: str | None, engine_factory: EngineFactory | None, interrupts: Interrupts) -> None:
        """Until every shard is done or the job has to end. KeyboardInterrupt where it is interrupted."""
        self._tell()
        fleet = self._start(address, engine_factory)
        try:
            interrupts.install()  # again: Ray has put its own handlers in their place
            self._fit(fleet)
            self._execute(fleet, self._dispatcher.begin(time.monotonic()))
            ticked = time.monotonic()
            while not self._ended:
                interrupts.check()
                for event in fleet.poll(TICK_S):
                    self._note(event)
                    self._execute(fleet, self._dispatcher.handle(event, time.monotonic()))
                self._listen(fleet)
                if self.epoch is None and fleet.loaded and not self._ended:
                    self._take_up(fleet)
                if time.monotonic() - ticked >= TICK_S:
                    ticked = time.monotonic()
                    self._regularly(fleet, ticked)
                    self._execute(fleet, self._dispatcher.tick(ticked))
                    self._tell()
            self._tell()
        finally:
            if self._metrics is not None:
                self._metrics.close()
            fleet.close()

    def _take_up(self, fleet: Fleet) -> None:
        """Become the job's one live driver, and see what the one before has done until now: it may have
        committed until it saw the new number."""
        folder, work = self._folder, self._work
        folder.check(self._job_plan)
        self.epoch = folder.take_epoch()
        with suppress(StoreError):  # tidiness: not worth a job, nor a right that its writers do not need
            folder.store.sweep()
        self.tally.found(folder.finished(work))
        done = chain(self.tally.finished, work.left_out(self._job_plan.num_shards))
        quarantine = folder.quarantined(work.number)
        self._execute(fleet, self._dispatcher.take_up(done, quarantine, time.monotonic()))
        fleet.take_up(self.epoch)

    def _listen(self, fleet: Fleet) -> None:
        """Tell once that the cluster's head is silent, and end the run where it stays so."""
        connection = fleet.connection
        if connection.silent_s > HEAD_WITHIN_S:
            raise JobError(f"the head of the Ray cluster has been silent for {connection.silent_s:.0f} s")
        if connection.silent_s > 0:
            self._tell_once("the head of the Ray cluster does not answer; waiting for it")

    def _execute(self, fleet: Fleet, actions: list[Action]) -> None:
        """Do what the dispatcher decided, in its order."""
        for action in actions:
            self.tally.record(action)
            match action:
                case StartWorker():
                    fleet.start(action.worker, action.avoid)
                case StopWorker():
                    self._leaving.pop(action.worker, None)
                    fleet.stop(action.worker, kill=action.kill)
                case Assign():
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
                    self.ending.notes.append(note)
                    self._tell(note)
                case FailShard():
                    note = f"shard {action.shard} is given up: {action.message}"
                    self.ending.notes.append(note)
                    self._tell(note)
                case Retry():
                    self._tell(f"shard {action.shard} is tried again: {action.message}")
                case Done():
                    self._ended = True
                    if action.failed:
                        self.ending.error = JobError(
                            f"{counted(len(action.failed), 'shard')} could not be made"
                        )
                case Abort():
                    self._ended = True
                    kinds = {"no_workers": NoWorkersLeft, "rejects": TooManyRejects}
                    self.ending.error = kinds.get(action.kind, JobError)(action.message)
                    if action.failure is not None and action.failure.mistake:
                        self.ending.error = UserError(action.failure.message)
                    elif action.failure is not None:
                        self.ending.traceback = action.failure.traceback

    def _start(self, address: str | None, engine_factory: EngineFactory | None) -> Fleet:
        """Connect to Ray or start it, and count for Prometheus from now on."""
        if address is not None:
            use_token()
        # Ray prints a paragraph for each worker that dies; the dispatcher's line says more.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
        # Only now: a run without work needs no Ray, and Ray reads the environment when it is imported.
        from overtone.cluster.connection import Connection
        from overtone.cluster.fleet import Fleet
        from overtone.cluster.metrics import JobMetrics

        connection = Connection(self._spec, address)
        if connection.name:
            self._tell(f"working on {connection.name}")
        fleet = Fleet(
            connection,
            self._spec,
            self._job_plan,
            self._folder.store,
            engine_factory=engine_factory,
            retry_plan=self._work if isinstance(self._work, RetryPlan) else None,
        )
        self._metrics = JobMetrics(self._spec.name)
        return fleet

    def _note(self, event: Event) -> None:
        """Count an event, and remember until when a worker may stay whose machine goes."""
        self.tally.record(event)
        match event:
            case ShardAlive() if event.trouble:
                self._tell_once(f"shard {event.shard} is made, and its commit waits: {event.trouble}")
            case WorkerFailed() if not (event.failure.mistake and self.epoch is None):
                self._tell_once(f"a worker could not start: {event.failure.message}")
            case WorkerDied():
                self._leaving.pop(event.worker, None)
                if event.squeezed:
                    self._tell_once("a node is low on memory and ended a worker; another starts when it can")
            case WorkerDraining():
                self._leaving[event.worker] = time.monotonic() + self._spec.faults.grace_s

    def _regularly(self, fleet: Fleet, now: float) -> None:
        """What each tick does besides the dispatcher's own: late workers, quarantines, capacity, epoch."""
        for worker in [worker for worker, at in self._leaving.items() if now > at]:
            del self._leaving[worker]
            fleet.stop(worker, kill=True)
            gone = WorkerDied(worker, "its machine went away", preempted=True)
            self._execute(fleet, self._dispatcher.handle(gone, now))
        self._keep_quarantines()
        if now - self._capacity_at > CAPACITY_EVERY_S and fleet.connection.answers():
            self._capacity_at = now
            self._fit(fleet)
            self._look_for_room(fleet)
        if now - self._stale_at > STALE_EVERY_S:
            self._stale_at = now
            self._check_epoch()

    def _fit(self, fleet: Fleet) -> None:
        """Where the spec leaves the number of workers open, as many as the cluster has room for."""
        if self._spec.workers.max is None:
            rules = self._dispatcher.rules
            most = max(rules.min_workers, fleet.connection.capacity())
            self._dispatcher.rules = replace(rules, max_workers=most)

    def _look_for_room(self, fleet: Fleet) -> None:
        """Say what a worker waits for that has found no place for a while."""
        if fleet.unplaced_s > PLACED_WITHIN_S:
            self._tell_once(f"waiting for a place for a worker: {fleet.connection.room()}")

    def _check_epoch(self) -> None:
        """End where a newer driver took the job over."""
        if self.epoch is None:
            return
        try:
            newest = self._folder.newest_epoch()
        except StoreError:
            return  # the next look decides; workers that cannot reach the store report that themselves
        if newest > self.epoch:
            self.ending.error = StaleDriver(f"another driver, number {newest}, took the job over")
            self._ended = True

    def _keep_quarantines(self) -> None:
        """Write the quarantines that the store has not taken yet."""
        try:
            while self._unkept:
                self._folder.add_quarantine(self._unkept[0], self._work.number)
                self._unkept.pop(0)
        except StoreError:
            pass  # the next tick tries again

    def _tell_once(self, note: str) -> None:
        if note not in self._told:
            self._told.add(note)
            self._tell(note)

    def _tell(self, note: str | None = None) -> None:
        """Report how far the run is, to whoever called and to Prometheus."""
        self._on_event(self.tally.snapshot(self._dispatcher, note))
        if self._metrics is not None:
            self.tally.show(self._metrics, self._dispatcher)
