"""Which worker does which shard next: a pure state machine. Knows no Ray, no files and no clock.

    dispatcher = Dispatcher(num_shards=plan.num_shards, num_rows=plan.num_rows, done=finished, rules=Rules())
    actions = dispatcher.begin(now)
    actions = dispatcher.handle(WorkerReady(worker=0, node="a"), now)      # what happened in, what to do out
    actions = dispatcher.tick(now)                                          # let time pass

A shard is *fresh* (never given out: no object at all, so ten million cost ten megabytes), *reserved* for a
worker (its reading may begin), *running*, *committing* (generated; its upload overlaps the worker's next
shard), *waiting* for another attempt, *failed*, or *done*. One dict holds all but the fresh and the done.

Blame. A worker names the rows it has in flight. When it dies they become suspects, and the next attempt runs
suspects first and alone; after two such deaths, or one with nothing in flight, a shard runs every row alone.
A row that was alone in flight at `row_deaths` deaths, on different nodes where there are several, is
quarantined: later attempts skip it and it ends as a reject. A death with nothing in flight is charged to the
shard; `max_attempts` charges fail it, which ends the job at its end, not the other shards. Preemption and
lost nodes are charged to nobody.

A slot is a worker's place: its successive processes. A slot whose processes fail `worker_failures` times
without making a row in between is retired and its node avoided, and what it charged to rows and shards is
taken back: the machine was to blame. A quarantine is therefore only announced (to be kept for good) once one
of the slots that witnessed it has shown that it can make rows, or two witnessed it.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from overtone.cluster.dispatch.board import Death, Run, Shard, Slot, Worker
from overtone.cluster.dispatch.messages import (
    Abort,
    Action,
    Assign,
    Assignment,
    Cancel,
    Done,
    Event,
    FailShard,
    Flush,
    OfAttempt,
    Quarantine,
    RetireSlot,
    Retry,
    RowsDone,
    RowsStarted,
    Rules,
    ShardAlive,
    ShardCommitted,
    ShardFailed,
    ShardGenerated,
    ShardReturned,
    StartWorker,
    StopWorker,
    WorkerDied,
    WorkerDraining,
    WorkerFailed,
    WorkerReady,
)
from overtone.cluster.faults import Failure, Verdict
from overtone.jobs.rows import Quarantined

SCAN = 64
"""How many waiting shards one search looks at, at most."""


class Dispatcher:
    """The state of a job's dispatch. Not thread-safe; every call returns what to do now, in order.

    Args:
        num_shards: shards of the plan.
        num_rows: rows of the plan, for `max_reject_fraction`.
        done: shards that are committed already.
        rules: the job's numbers.
        quarantine: rows known to kill, by shard.
        rows_of: rows of a shard, for counting the rows of failed shards against `max_reject_fraction`.
    """

    def __init__(
        self,
        *,
        num_shards: int,
        num_rows: int,
        done: Iterable[int] = (),
        rules: Rules | None = None,
        quarantine: Mapping[int, Sequence[Quarantined]] | None = None,
        rows_of: Callable[[int], int] = lambda shard: 0,
    ) -> None:
        self.rules = rules or Rules()
        self.num_shards = num_shards
        self.num_rows = num_rows
        self.ended = False
        self._rows_of = rows_of
        self._known = dict(quarantine or {})
        self._is_done = bytearray(num_shards)
        for index in done:
            self._is_done[index] = 1
        self._left = self._fresh = self._is_done.count(0)
        self._cursor = 0
        self._shards: dict[int, Shard] = {}
        self._waiting: list[tuple[float, int, int]] = []  # heap of (not before, sequence, shard)
        self._sequence = 0
        self._workers: dict[int, Worker] = {}
        self._next_worker = 0
        self._starting = 0
        self._slots: list[Slot] = []
        self._open = 0  # slots neither retired nor closed
        self._vacant: set[int] = set()  # open slots without a worker
        self._vacancies: list[tuple[float, int]] = []  # heap of (not before, vacant slot), some outdated
        self._closed: list[int] = []
        self._avoid: frozenset[str] = frozenset()  # nodes of retired slots
        self._able: Counter[str] = Counter()  # workers that are ready and stay, by node
        self._loose: dict[int, None] = {}  # workers to settle: without a shard, they commit or drain
        self._idle: dict[int, None] = {}  # ready workers without a running shard, in order
        self._reserved: dict[int, int] = {}  # shard -> worker
        self._single: dict[int, None] = {}  # shards with one run
        self._busy = 0  # shards with a run
        self._unproved: set[int] = set()  # shards with quarantines that are not announced yet
        self._timed = 0  # commits with a usual duration
        self._timed_s = 0.0  # the sum of these durations
        self._failed: list[FailShard] = []
        self._streak = 0
        self._rows_seen = 0
        self._rejects = 0
        self._condemned = 0  # quarantined rows of shards that are not committed
        self._retirements: list[RetireSlot] = []
        self._quiet_since = -math.inf  # nobody was silent before that
        self._actions: list[Action] = []

    # Numbers for whoever watches.

    @property
    def left(self) -> int:
        """Shards that are neither done nor failed."""
        return self._left

    @property
    def tracked(self) -> int:
        """Shards that have an object: reserved, running, committing, waiting or failed."""
        return len(self._shards)

    @property
    def waiting(self) -> int:
        """Shards that wait for another attempt."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Workers with a shard running."""
        return sum(worker.run is not None for worker in self._workers.values())

    @property
    def busy(self) -> int:
        """Shards that some worker runs or commits."""
        return self._busy

    @property
    def ready(self) -> int:
        """Workers that have their model."""
        return len(self._workers) - self._starting

    @property
    def starting(self) -> int:
        """Workers asked for that are not ready."""
        return self._starting

    # The three entry points.

    def begin(self, now: float) -> list[Action]:
        """Start: ask for workers, or say at once that nothing is left."""
        return self._act(now)

    def tick(self, now: float) -> list[Action]:
        """Let time pass: timeouts, pauses that end, copies, workers given back. To be called every second."""
        if not self.ended:
            self._silences(now)
            self._give_back(now)
        return self._act(now, copies=self.rules.copies)

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take in one event. Events of workers that are gone and of shards not theirs are ignored."""
        worker = self._workers.get(event.worker)
        if self.ended or worker is None:
            return []
        if isinstance(event, OfAttempt):
            run = self._run_of(worker, event.shard, event.attempt)
            if run is None:
                return []
            run.heard = now
            self._shard_event(worker, run, event, now)
            if not self._actions and isinstance(event, (ShardAlive, RowsStarted, RowsDone)):
                return []  # most events, and none that frees a worker or a shard
            return self._act(now)
        match event:
            case WorkerReady():
                self._ready(worker, event.node, now)
            case WorkerDied():
                self._died(worker, event, now)
            case WorkerFailed():
                self._start_failed(worker, event.failure, now)
            case WorkerDraining():
                self._drain(worker)
        return self._act(now)

    # Events.

    def _ready(self, worker: Worker, node: str, now: float) -> None:
        if worker.node is not None:
            return
        self._starting -= 1
        worker.node = node
        worker.idle_since = now
        self._slots[worker.slot].node = node
        if not worker.draining:
            self._able[node] += 1
            self._idle[worker.id] = None

    def _shard_event(self, worker: Worker, run: Run, event: Event, now: float) -> None:
        shard = self._shards.get(run.shard)  # None: committed by another run meanwhile
        match event:
            case ShardAlive():
                pass
            case RowsStarted():
                run.rows = event.rows
            case RowsDone():
                run.rows = tuple(row for row in run.rows if row not in event.rows)
                self._made_rows(worker)
                if shard is not None and shard.suspects:
                    for row in event.rows:
                        shard.suspects.pop(row, None)
            case ShardGenerated():
                if worker.run is run:
                    run.rows = ()
                    worker.committing[run.shard] = run
                    worker.flushing = False  # a flush before this does not cover it
                    self._free(worker, now)
            case ShardCommitted():
                self._made_rows(worker)
                self._committed(worker, run, event, now)
            case ShardReturned():
                self._end_run(worker, run, now)
                if shard is not None and not shard.runs:
                    self._wait(shard, now)
            case ShardFailed():
                self._shard_failed(worker, run, event.failure, now)

    def _committed(self, worker: Worker, run: Run, event: ShardCommitted, now: float) -> None:
        self._end_run(worker, run, now)
        shard = self._shards.pop(run.shard, None)
        if shard is None:
            return  # a copy was first
        self._is_done[run.shard] = 1
        self._busy -= bool(shard.runs)
        self._unproved.discard(run.shard)
        self._single.pop(run.shard, None)
        for other in shard.runs:
            self._cancel(other)
        self._left -= 1
        self._streak = 0
        self._rows_seen += event.rows
        self._rejects += event.rejects
        self._condemned -= len(shard.quarantined)
        if not run.isolated:
            self._timed += 1
            self._timed_s += now - run.started

    def _shard_failed(self, worker: Worker, run: Run, failure: Failure, now: float) -> None:
        shard = self._shards.get(run.shard)
        text = f"{failure.phase}: {failure.error_class}: {failure.message}"
        if shard is None:  # nobody needs it any more, whatever it met
            self._end_run(worker, run, now)
        elif failure.verdict is Verdict.FAIL_JOB:
            self._abort("failure", text, failure)
        elif failure.verdict is Verdict.REPLACE_WORKER:
            self._actions.append(StopWorker(worker.id, kill=True, reason=text))
            self._died(worker, WorkerDied(worker.id, text, failure.error_class), now)
        else:
            slot = self._slots[worker.slot]
            self._end_run(worker, run, now)
            shard.deaths.append(Death(slot.id, worker.node, (), failure.error_class, text))
            slot.failures.append(frozenset())
            self._again(shard, text, now)
            self._judge(slot, text, now)

    def _start_failed(self, worker: Worker, failure: Failure, now: float) -> None:
        text = f"{failure.phase}: {failure.error_class}: {failure.message}"
        if failure.verdict is Verdict.FAIL_JOB:
            self._abort("failure", text, failure)
            return
        slot = self._slots[worker.slot]
        self._remove(worker, now)
        slot.failures.append(frozenset())
        self._judge(slot, text, now)

    def _drain(self, worker: Worker) -> None:
        self._unable(worker)
        worker.draining = True
        self._loose[worker.id] = None
        self._idle.pop(worker.id, None)
        self._release(worker)
        if worker.run is not None:
            self._cancel(worker.run)

    def _died(self, worker: Worker, event: WorkerDied, now: float) -> None:
        slot, run = self._slots[worker.slot], worker.run
        self._remove(worker, now)
        shard = self._shards.get(run.shard) if run is not None else None
        preempted = event.preempted or worker.draining
        starting = worker.node is None
        if run is not None and shard is not None:
            if not preempted:
                slot.failures.append(frozenset(run.rows))
                where = (slot.id, worker.node, run.rows)
                self._blame(shard, Death(*where, event.error_class, event.message, died=True))
            self._again(shard, event.message, now, at_once=preempted or bool(run.rows))
        elif starting and not preempted:
            slot.failures.append(frozenset())
        if not preempted:
            self._judge(slot, event.message, now)

    # Blame.

    def _blame(self, shard: Shard, death: Death) -> None:
        shard.deaths.append(death)
        for row in death.rows:
            if row not in shard.quarantined:
                shard.suspects[row] = None
        if len(death.rows) != 1:
            return
        [row] = death.rows
        deaths = shard.deaths_of(row)
        nodes = {d.node for d in deaths}
        wanted = min(self.rules.row_deaths, len(nodes | self._able.keys()))
        if len(deaths) < self.rules.row_deaths:
            return
        if len(nodes) < wanted and len(deaths) < 3 * self.rules.row_deaths:
            return
        slots = {d.slot for d in deaths}
        shard.suspects.pop(row, None)
        shard.quarantined[row] = Quarantined(shard.index, row, death.error_class, death.message, len(deaths))
        self._condemned += 1
        if len(slots) > 1 or any(self._slots[slot].proved for slot in slots):
            self._actions.append(Quarantine(shard.quarantined[row]))
        else:
            shard.unproved[row] = slots
            self._unproved.add(shard.index)
        for slot in map(self._slots.__getitem__, slots):
            # The row explains these failures; but a slot that never made a row is believed only once.
            if slot.proved or not slot.refunded:
                slot.refunded = True
                slot.failures = [rows for rows in slot.failures if row not in rows]

    def _acquit(self, shard: Shard, row: str) -> None:
        """Take back a quarantine that only doubtful slots witnessed."""
        del shard.unproved[row]
        del shard.quarantined[row]
        self._condemned -= 1
        shard.suspects[row] = None
        if not shard.unproved:
            self._unproved.discard(shard.index)

    def _made_rows(self, worker: Worker) -> None:
        slot = self._slots[worker.slot]
        slot.failures.clear()
        slot.refunded = False
        if slot.proved:
            return
        slot.proved = True
        for shard in [self._shards[index] for index in self._unproved]:
            for row in [row for row, slots in shard.unproved.items() if slot.id in slots]:
                del shard.unproved[row]
                self._actions.append(Quarantine(shard.quarantined[row]))
            if not shard.unproved:
                self._unproved.discard(shard.index)

    def _judge(self, slot: Slot, message: str, now: float) -> None:
        """After a failure: when the slot's next process starts, or whether it gets none."""
        slot.not_before = now + self._pause(len(slot.failures))
        if slot.id in self._vacant:
            heapq.heappush(self._vacancies, (slot.not_before, slot.id))
        if len(slot.failures) < self.rules.worker_failures or slot.retired:
            return
        common = frozenset.intersection(*slot.failures)
        if any(row in shard.suspects for shard in self._shards.values() for row in common):
            return  # one row explains them all, and is about to be decided
        self._retire(slot, message, now)

    def _retire(self, slot: Slot, message: str, now: float) -> None:
        slot.retired = True
        self._open -= 1
        self._vacant.discard(slot.id)
        if slot.node is not None:
            self._avoid |= {slot.node}
        if slot.worker is not None:
            worker = self._workers[slot.worker]
            self._actions.append(StopWorker(worker.id, kill=True, reason=message))
            self._remove(worker, now)
        retirement = RetireSlot(slot.id, slot.node, len(slot.failures), message)
        self._retirements.append(retirement)
        self._actions.append(retirement)
        for shard in self._shards.values():
            shard.deaths = [death for death in shard.deaths if death.slot != slot.id]
            for row in [row for row, slots in shard.unproved.items() if slot.id in slots]:
                self._acquit(shard, row)

    # Shards.

    def _again(self, shard: Shard, message: str, now: float, *, at_once: bool = False) -> None:
        """Another attempt, or the end of the shard if it had all of them."""
        if shard.runs:
            return
        if shard.charged < self.rules.max_attempts:
            self._actions.append(Retry(shard.index, message))
            self._wait(shard, now if at_once else now + self._pause(shard.charged))
            return
        shard.failed = True
        failed = FailShard(shard.index, message)
        self._failed.append(failed)
        self._actions.append(failed)
        self._left -= 1
        self._streak += 1
        self._rows_seen += self._rows_of(shard.index)
        self._rejects += self._rows_of(shard.index)
        self._condemned -= len(shard.quarantined)

    def _pause(self, failures: int) -> float:
        if failures < 1:
            return 0.0
        return min(self.rules.backoff_s * 2.0 ** min(failures - 1, 32), self.rules.backoff_max_s)

    def _wait(self, shard: Shard, not_before: float) -> None:
        self._sequence += 1
        heapq.heappush(self._waiting, (not_before, self._sequence, shard.index))

    def _end_run(self, worker: Worker, run: Run, now: float) -> None:
        """Take a run off its worker and its shard."""
        if worker.run is run:
            self._free(worker, now)
        worker.committing.pop(run.shard, None)
        if not worker.committing:
            worker.flushing = False
            if worker.draining:
                self._loose[worker.id] = None
        self._detach(run)

    def _detach(self, run: Run) -> None:
        shard = self._shards.get(run.shard)
        if shard is None or run not in shard.runs:
            return
        shard.runs.remove(run)
        if shard.runs:
            self._single[run.shard] = None
        else:
            self._single.pop(run.shard, None)
            self._busy -= 1

    def _free(self, worker: Worker, now: float) -> None:
        worker.run = None
        worker.idle_since = now
        if worker.committing or worker.draining:
            self._loose[worker.id] = None
        if not worker.draining:
            self._idle[worker.id] = None

    def _release(self, worker: Worker) -> None:
        """Take a worker's reserved shard back."""
        if worker.reserved is not None:
            shard = self._shards[worker.reserved]
            del self._reserved[shard.index]
            worker.reserved = shard.reserved_by = None
            self._wait(shard, 0.0)

    def _remove(self, worker: Worker, now: float) -> None:
        """A worker that is gone: its commits in the background are lost, its running shard is the caller's"""
        self._release(worker)
        if worker.run is not None:
            self._detach(worker.run)
        for run in worker.committing.values():
            self._detach(run)
            shard = self._shards.get(run.shard)
            if shard is not None:
                shard.losses += 1
                if not shard.runs:
                    self._wait(shard, now)
        worker.committing = {}
        self._unable(worker)
        del self._workers[worker.id]
        self._idle.pop(worker.id, None)
        self._loose.pop(worker.id, None)
        self._starting -= worker.node is None
        slot = self._slots[worker.slot]
        slot.worker = None
        slot.not_before = now
        if not slot.retired:
            self._vacate(slot)

    def _vacate(self, slot: Slot) -> None:
        self._vacant.add(slot.id)
        heapq.heappush(self._vacancies, (slot.not_before, slot.id))

    def _unable(self, worker: Worker) -> None:
        """It takes no more shards."""
        if worker.node is None or worker.draining:
            return
        self._able[worker.node] -= 1
        if not self._able[worker.node]:
            del self._able[worker.node]

    def _cancel(self, run: Run) -> None:
        worker = self._workers.get(run.worker)
        if worker is not None and worker.run is run and not run.cancelled:
            run.cancelled = True
            self._actions.append(Cancel(run.worker, run.shard, run.attempt))

    def _run_of(self, worker: Worker, shard: int, attempt: int) -> Run | None:
        for run in (worker.run, worker.committing.get(shard)):
            if run is not None and run.shard == shard and run.attempt == attempt:
                return run
        return None

    # What follows from the state.

    def _act(self, now: float, *, copies: bool = False) -> list[Action]:
        """Everything that the state asks for, given out once."""
        if not self.ended:
            self._limits()
        if not self.ended:
            self._fill(now, copies)
            self._settle(now)
            self._staff(now)
            self._finish()
        actions, self._actions = self._actions, []
        return actions

    def _limits(self) -> None:
        if self._streak >= self.rules.failed_streak and self._left:
            last = self._failed[-1].message
            self._abort("shards", f"{self._streak} shards in a row failed, the last one with: {last}")
            return
        rejects, limit = self._rejects + self._condemned, self.rules.max_reject_fraction
        # A fraction of a few rows says little: at least 100, or all there are.
        seen = max(self._rows_seen + self._condemned, min(100, self.num_rows))
        if rejects > limit * min(seen, self.num_rows):
            self._abort("rejects", f"{rejects} of the first {seen} rows cannot be made")

    def _fill(self, now: float, copies: bool) -> None:
        """Give idle workers something to do."""
        if not self._idle:
            return
        if self._work_now(now):
            for index in list(self._idle):
                worker = self._workers[index]
                shard = self._next(worker, now)
                if shard is not None:
                    self._assign(worker, shard, now)
                elif not self._work_now(now):
                    break
        if copies and self._idle and self._timed:
            self._copy(now)

    def _work_now(self, now: float) -> bool:
        return bool(self._fresh or self._reserved or (self._waiting and self._waiting[0][0] <= now))

    def _next(self, worker: Worker, now: float) -> Shard | None:
        shard = self._pop_waiting(worker, now)
        if shard is not None:
            return shard
        if worker.reserved is None and not self._fresh and self._reserved:
            index, other = self._reserved.popitem()  # the last one reserved: its owner has the most to do
            self._workers[other].reserved = None
            self._shards[index].reserved_by = None
            return self._shards[index]
        if worker.reserved is not None:
            shard = self._shards[worker.reserved]
            del self._reserved[shard.index]
            worker.reserved = shard.reserved_by = None
            return shard
        return self._take_fresh() if self._fresh else None

    def _pop_waiting(self, worker: Worker, now: float) -> Shard | None:
        passed: list[tuple[float, int, int]] = []
        found = None
        while self._waiting and self._waiting[0][0] <= now and len(passed) < SCAN:
            entry = heapq.heappop(self._waiting)
            shard = self._shards[entry[2]]
            if self._suits(shard, worker):
                found = shard
                break
            passed.append(entry)
        for entry in passed:
            heapq.heappush(self._waiting, entry)
        return found

    def _suits(self, shard: Shard, worker: Worker) -> bool:
        """Not where it died before, while there is a worker elsewhere that will be free some time."""
        if not shard.deaths:
            return True
        nodes = {death.node for death in shard.deaths}
        if worker.node not in nodes:
            return True
        if any(node not in nodes for node in self._able):
            return False
        slots = {death.slot for death in shard.deaths}
        return worker.slot not in slots or self._able.total() == sum(map(self._is_able, slots))

    def _is_able(self, slot: int) -> bool:
        """Whether a worker is there that takes shards."""
        number = self._slots[slot].worker
        worker = None if number is None else self._workers[number]
        return worker is not None and worker.node is not None and not worker.draining

    def _take_fresh(self) -> Shard:
        index = self._is_done.find(0, self._cursor)
        self._cursor = index + 1
        self._fresh -= 1
        shard = self._shards[index] = Shard(index)
        for known in self._known.pop(index, ()):
            shard.quarantined[known.row_id] = known
            self._condemned += 1
        return shard

    def _copy(self, now: float) -> None:
        """Idle workers make second attempts at shards that take long, the oldest first."""
        since = now - self.rules.copy_after * self._timed_s / self._timed
        late = []
        for index in self._single:
            shard = self._shards[index]
            run = shard.runs[0]
            if run.started < since and not run.isolated and not shard.suspects:
                late.append((run.started, index))
        for _, index in heapq.nsmallest(len(self._idle), late):
            shard = self._shards[index]
            # A shard whose commit goes on behind its worker's back is not copied by that same worker.
            worker = next((other for other in self._idle if other != shard.runs[0].worker), None)
            if worker is not None:
                self._assign(self._workers[worker], shard, now)

    def _assign(self, worker: Worker, shard: Shard, now: float) -> None:
        for row in [row for row, slots in shard.unproved.items() if worker.slot not in slots]:
            self._acquit(shard, row)  # another witness is to be had
        isolated = bool(shard.suspects) or shard.isolate
        shard.attempts += 1
        run = Run(shard.index, shard.attempts, worker.id, now, now, isolated)
        shard.runs.append(run)
        if len(shard.runs) == 1:
            self._busy += 1
            self._single[shard.index] = None
        else:
            del self._single[shard.index]
        del self._idle[worker.id]
        worker.run = run
        if worker.reserved is None and self._fresh > len(self._workers) and not isolated:
            ahead = self._take_fresh()
            worker.reserved, ahead.reserved_by = ahead.index, worker.id
            self._reserved[ahead.index] = worker.id
        alone = isolated or shard.losses > 0
        assignment = Assignment(
            shard=shard.index,
            attempt=run.attempt,
            suspects=tuple(shard.suspects),
            isolate=shard.isolate,
            quarantined=tuple(shard.quarantined.values()),
            read_ahead=None if alone else worker.reserved,
            commit_first=alone or worker.reserved is None,
        )
        self._actions.append(Assign(worker.id, assignment))

    def _settle(self, now: float) -> None:
        """Workers without a shard: wait for their commits, and let those go whose machine goes."""
        loose, self._loose = self._loose, {}
        for worker in map(self._workers.__getitem__, loose):
            if worker.run is not None:
                continue  # it comes here again when that ends
            if worker.committing and not worker.flushing:
                worker.flushing = True
                self._actions.append(Flush(worker.id))
            if worker.draining and not worker.committing:
                kill = worker.node is None
                self._actions.append(StopWorker(worker.id, kill=kill, reason="its machine is going away"))
                self._remove(worker, now)

    def _staff(self, now: float) -> None:
        """Start workers for the shards that nobody has."""
        wanted = min(self.rules.max_workers, self._left)
        while self._open < wanted and self._closed and self._unassigned:
            self._open += 1
            self._vacate(self._slots[self._closed.pop()])
        while self._open < wanted and len(self._slots) < self.rules.max_workers:
            self._open += 1
            self._slots.append(Slot(len(self._slots)))
            self._vacate(self._slots[-1])
        missing = self._unassigned - self._starting - len(self._idle)
        while missing > 0 and self._vacancies and self._vacancies[0][0] <= now:
            not_before, index = heapq.heappop(self._vacancies)
            slot = self._slots[index]
            if index not in self._vacant or slot.not_before != not_before:
                continue  # taken meanwhile, or to wait longer
            missing -= 1
            self._vacant.remove(index)
            worker = Worker(self._next_worker, slot.id, idle_since=now)
            self._next_worker += 1
            self._starting += 1
            self._workers[worker.id] = worker
            slot.worker = worker.id
            self._actions.append(StartWorker(worker.id, slot.id, self._avoid))

    @property
    def _unassigned(self) -> int:
        return self._fresh + len(self._waiting) + len(self._reserved)

    def _give_back(self, now: float) -> None:
        if self._unassigned:
            return
        keep = self.rules.min_workers
        for worker in list(self._workers.values()):
            if len(self._workers) <= keep:
                return
            if worker.run is None and not worker.committing and now - worker.idle_since > self.rules.idle_s:
                reason = "no more work" if worker.node else "no more work before it was ready"
                self._actions.append(StopWorker(worker.id, kill=worker.node is None, reason=reason))
                self._remove(worker, now)
                self._vacant.remove(worker.slot)
                self._closed.append(worker.slot)
                self._open -= 1

    def _finish(self) -> None:
        if self._left == 0:
            self.ended = True
            self._actions.append(Done(tuple(self._failed)))
        elif not self._open and not self._closed:
            last = self._retirements[-1]
            self._abort(
                "no_workers",
                f"every worker was retired after {self.rules.worker_failures} failures without a row made in "
                f"between; the last one with: {last.message}",
            )

    def _abort(self, kind: str, message: str, failure: Failure | None = None) -> None:
        self.ended = True
        self._actions.append(Abort(kind, message, failure))

    def _silences(self, now: float) -> None:
        limit = self.rules.silence_s
        if limit is None or now - self._quiet_since <= limit:
            return
        self._quiet_since = now
        for worker in list(self._workers.values()):
            run = worker.run or next(iter(worker.committing.values()), None)
            if run is not None and now - run.heard > limit:
                text = f"no sign of life for {limit:g} s, killed"
                self._actions.append(StopWorker(worker.id, kill=True, reason=text))
                self._died(worker, WorkerDied(worker.id, text, "RowTimeout"), now)
            elif run is not None:
                others = (other.heard for other in worker.committing.values())
                self._quiet_since = min(self._quiet_since, run.heard, *others)
