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
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from cluster.dispatch import (
    Abort,
    Assign,
    Cancel,
    Dispatcher,
    Do,
    Done,
    Event,
    FailShard,
    Flush,
    Quarantine,
    Quarantined,
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
from cluster.submit import use_token
from cluster.summary import Summary, short, timings_query
from jobs.card import CARD, card_rows, write_card
from jobs.errors import (
    JobError,
    NoWorkersLeft,
    SpecError,
    StaleDriver,
    StoreError,
    TooManyRejects,
    VerifyError,
)
from jobs.folder import JobFolder
from jobs.plan import JobPlan, RetryPlan, make_plan
from jobs.preview import checkpoint_of, sampling_plan
from jobs.progress import Snapshot
from jobs.prompts import check_row_ids
from jobs.retry import bearing_rejects, find_rejects, retry_plan
from jobs.sheet import contact_sheet, first_pictures
from jobs.spec import JobSpec
from jobs.store import Store, open_store, probed

if TYPE_CHECKING:
    from cluster.fleet import Fleet
    from cluster.metrics import JobMetrics
    from cluster.worker import EngineFactory

TICK_S = 0.5
"""How often time passes for the dispatcher."""
STALE_EVERY_S = 5.0
"""How often a driver looks whether a newer one took the job over."""
CAPACITY_EVERY_S = 2.0
"""How often the cluster's size is asked for, where the number of workers follows it."""
SHEET = "contact-sheet.png"
SHEET_PICTURES = 48


def run_job(
    spec: JobSpec,
    *,
    address: str | None = None,
    on_event: Callable[[Snapshot], None] = lambda snapshot: None,
    engine_factory: EngineFactory | None = None,
) -> Summary:
    """Run a job, or what earlier runs and retries of it left, to its end.

    Args:
        address: of a Ray cluster, as `ray.init` takes it; None: Ray is started on this machine, unless this
            process is connected to one already.
        on_event: told how far the job is, a few times a second.
        engine_factory: makes a worker's engine from the spec, in the worker; None: the spec's model.

    Raises UserError for a spec, prompt table, size, store or folder that cannot be used, having written
    nothing; StoreError where the store cannot be reached. Everything after that ends in a Summary, Ctrl-C and
    SIGTERM too.
    """
    began = time.monotonic()
    _check_model(spec)
    plan = make_plan(spec)
    folder = JobFolder(_store(spec))
    if not folder.exists():
        check_row_ids(spec, plan)  # reads the row_id columns, so once a job, before anything is written
    folder.open(spec, plan)
    retry = None
    if len(folder.finished()) == plan.num_shards:
        retry = folder.unfinished_retry()
        if retry is None:
            folder.repair_derived()
            if card_rows(folder.store) is None:  # the run that finished the job ended before its card
                write_card(folder.store, spec, plan)
            return _summary(spec, plan, folder.store, began, done=plan.num_shards)
        spec = bearing_rejects(spec)
    return _run(spec, plan, folder, retry, began, address, on_event, engine_factory)


def retry_job(
    output: str,
    overrides: Sequence[str] = (),
    *,
    endpoint_url: str | None = None,
    region: str | None = None,
    address: str | None = None,
    on_event: Callable[[Snapshot], None] = lambda snapshot: None,
    engine_factory: EngineFactory | None = None,
) -> Summary:
    """Try the rejects of a finished job once more, or go on with a retry that was begun.

    What is made is committed in parts of its own beside the old ones; what fails again stays a reject, with
    its newest reason. Rows that killed workers are tried like all others.

    Args:
        output: the job's folder or s3:// URL.
        overrides: `key=value` of the job's spec, of what does not change samples.

    The others, and what is raised, are those of `run_job`.
    """
    began = time.monotonic()
    spec, plan = retry_plan(open_store(output, endpoint_url=endpoint_url, region=region), overrides)
    _check_model(spec)
    folder = JobFolder(_store(spec))
    folder.repair_derived()
    found = find_rejects(folder, spec, plan)
    if not found.retry.num_shards:
        summary = _summary(spec, plan, folder.store, began, done=plan.num_shards)
        return replace(summary, notes=(found.text(),))
    retry = folder.begin_retry(found.retry)
    return _run(spec, plan, folder, retry, began, address, on_event, engine_factory)


def _store(spec: JobSpec) -> Store:
    output = spec.output
    return probed(
        open_store(
            output.path,
            endpoint_url=output.endpoint_url,
            region=output.region,
            retries=spec.faults.store_retries,
            unsafe_overwrite=output.unsafe_overwrite,
        )
    )


def _run(
    spec: JobSpec,
    plan: JobPlan,
    folder: JobFolder,
    retry: RetryPlan | None,
    began: float,
    address: str | None,
    on_event: Callable[[Snapshot], None],
    engine_factory: EngineFactory | None,
) -> Summary:
    epoch = folder.take_epoch(f"{socket.gethostname()}:{os.getpid()}")
    with suppress(StoreError):  # tidiness: not worth a job, nor a right that its writers do not need
        folder.store.sweep()
    # Only now: the driver before may have committed until it saw the new epoch.
    run = Run(spec, plan, folder, retry, epoch, on_event)
    with _interrupts() as interrupted:
        try:
            run.go(address, engine_factory, interrupted)
        except KeyboardInterrupt:
            run.error = JobError("stopped")
    return run.summary(began)


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
        from cluster.fleet import Fleet  # only now: a run without work needs no Ray, and Ray reads the above
        from cluster.metrics import JobMetrics

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

    def _execute(self, fleet: Fleet, actions: list[Do]) -> None:
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
        summary = _summary(self.spec, self.work, self.store, began, done=len(self.finished))
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


def _check_model(spec: JobSpec) -> None:
    """SpecError or SizeError where the model cannot make what the spec asks for, as far as is known without
    loading it: what a hub model that we have no settings of can do, only its workers find out."""
    try:
        checkpoint = checkpoint_of(spec)
    except SpecError:
        if spec.model.id.count("/") == 1 and not spec.model.id.startswith((".", "/", "~")):
            return
        raise
    sampling_plan(spec, checkpoint)


def _summary(spec: JobSpec, work: JobPlan | RetryPlan, store: Store, began: float, *, done: int) -> Summary:
    """What holds for any end."""
    return Summary(
        name=spec.name if isinstance(work, JobPlan) else f"{spec.name}, retry {work.number}",
        output=short(store.url),
        shards_total=work.num_shards,
        shards_done=done,
        rows=0,
        rejects=0,
        seconds=time.monotonic() - began,
        sheet=short(store.where(SHEET)) if store.head(SHEET) is not None else None,
        timings_query=timings_query(store.config),
    )


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C, and SIGTERM as `overtone stop` and Kubernetes send it, end the run.

    The exception ends whatever waits; where it falls into a callback of somebody else's and is lost there,
    the event still says so.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def interrupt(*_: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
