"""Which worker does which shard next: a pure state machine. Knows no Ray, no files and no clock.

    dispatcher = Dispatcher(num_shards=plan.num_shards, num_rows=plan.num_rows, done=finished, rules=Rules())
    actions = dispatcher.begin(now)
    actions = dispatcher.handle(WorkerReady(worker=0, node="a"), now)      # what happened in, what to do out
    actions = dispatcher.tick(now)                                          # let time pass

A shard is *fresh* (never given out: no object at all, so ten million cost ten megabytes), *reserved* for a
worker (its reading may begin), *running*, *committing* (generated; its upload overlaps the worker's next
shard), *waiting* for another attempt, *failed*, or *done*.

The state is in `board` (`Board.shards` holds every shard that is neither fresh nor done; everything else in
Board is an index over it that `check` can recompute) and in `tally`, the statistics. What is decided over it
is in functions: `blame` (who is charged for a failure), `hand_out` (which worker takes which shard) and
`staff` (which workers there are). The Dispatcher calls them in a fixed order.

Next on the tour of a row: worker/runner.py (`attempt`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from overtone.cluster.dispatch import blame
from overtone.cluster.dispatch.board import Board
from overtone.cluster.dispatch.hand_out import fill
from overtone.cluster.dispatch.messages import (
    Abort,
    Action,
    Cancel,
    Done,
    Event,
    OfAttempt,
    RowsDone,
    RowsStarted,
    Rules,
    ShardAlive,
    ShardCommitted,
    ShardFailed,
    ShardGenerated,
    ShardReturned,
    WorkerDied,
    WorkerDraining,
    WorkerFailed,
    WorkerReady,
)
from overtone.cluster.dispatch.records import Attempt, Worker
from overtone.cluster.dispatch.staff import give_back, kill_silent, settle, staff
from overtone.cluster.dispatch.tally import Tally
from overtone.jobs.rows import Quarantined


class Dispatcher:
    """The state of a job's dispatch. Not thread-safe; every call returns what to do now, in order.

    Args:
        num_shards: shards of the plan.
        num_rows: rows of the plan, for `max_reject_fraction`; None: not known.
        done: shards that are committed already.
        rules: the job's numbers.
        quarantine: rows known to kill, by shard.
        rows_of: rows of a shard, for counting the rows of failed shards against `max_reject_fraction`.
    """

    def __init__(
        self,
        *,
        num_shards: int,
        num_rows: int | None,
        done: Iterable[int] = (),
        rules: Rules | None = None,
        quarantine: Mapping[int, Sequence[Quarantined]] | None = None,
        rows_of: Callable[[int], int] = lambda shard: 0,
    ) -> None:
        self.rules = rules or Rules()
        self.board = Board(num_shards, done=done, known=quarantine)
        self.tally = Tally(num_rows, rows_of)
        self.ended = False

    # The three entry points.

    def begin(self, now: float) -> list[Action]:
        """Start: ask for workers, or say at once that nothing is left."""
        return self._act([], now)

    def take_up(
        self, done: Iterable[int], quarantine: Mapping[int, Sequence[Quarantined]], now: float
    ) -> list[Action]:
        """Before the first worker is ready: what another driver has done while ours started."""
        self.board.found(done, quarantine)
        return self._act([], now)

    def tick(self, now: float) -> list[Action]:
        """Let time pass: timeouts, pauses that end, copies, workers given back. To be called every second."""
        if self.ended:
            return []
        actions = kill_silent(self.board, self.tally, self.rules, now)
        actions += give_back(self.board, self.rules, now)
        return self._act(actions, now, copies=self.rules.copies)

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take in one event. Events of workers that are gone and of shards not theirs are ignored."""
        # 1. Whose event it is.
        worker = self.board.workers.get(event.worker)
        if self.ended or worker is None:
            return []
        # 2. What it changes.
        if isinstance(event, OfAttempt):
            attempt = worker.attempt_at(event.shard, event.attempt)
            if attempt is None:
                return []
            attempt.heard = now
            actions = self._hear_of_attempt(worker, attempt, event, now)
            if not actions and isinstance(event, (ShardAlive, RowsStarted, RowsDone)):
                return []  # most events, and none that frees a worker or a shard
        else:
            actions = self._hear_of_worker(worker, event, now)
        # 3. What follows from the state that it leaves.
        return self._act(actions, now)

    def _act(self, actions: list[Action], now: float, *, copies: bool = False) -> list[Action]:
        """`actions`, and after them everything that the state asks for."""
        board, tally, rules = self.board, self.tally, self.rules
        # 1. The job ends early: a failure that every row would meet, or too many shards or rows lost.
        self.ended = self.ended or (bool(actions) and isinstance(actions[-1], Abort))
        if self.ended:
            return actions
        abort = tally.limit(rules, left=board.left, condemned=board.condemned)
        if abort is not None:
            self.ended = True
            return [*actions, abort]
        # 2. Idle workers take shards.
        actions += fill(board, tally, rules, now, copies=copies)
        # 3. Workers without a shard end their commits, and leave where their machine goes.
        actions += settle(board, now)
        # 4. Workers are started for the shards that nobody has.
        actions += staff(board, rules, now)
        # 5. The job ends: nothing is left to do, or nobody to do it.
        end = self._end()
        if end is not None:
            self.ended = True
            actions.append(end)
        return actions

    # Events.

    def _hear_of_worker(self, worker: Worker, event: Event, now: float) -> list[Action]:
        board, tally, rules = self.board, self.tally, self.rules
        match event:
            case WorkerReady():
                if worker.node is None:
                    board.ready(worker, event.node, now)
            case WorkerDied():
                return blame.worker_died(board, tally, rules, worker, event, now)
            case WorkerFailed():
                return blame.start_failed(board, tally, rules, worker, event.failure, now)
            case WorkerDraining():
                board.drain(worker)
                if worker.attempt is not None:
                    return self._cancel(worker.attempt)
        return []

    def _hear_of_attempt(self, worker: Worker, attempt: Attempt, event: Event, now: float) -> list[Action]:
        board = self.board
        shard = board.shards.get(attempt.shard)  # None: committed by another attempt meanwhile
        match event:
            case ShardAlive():
                pass
            case RowsStarted():
                attempt.rows = event.rows
            case RowsDone():
                attempt.rows = tuple(row for row in attempt.rows if row not in event.rows)
                if shard is not None and shard.suspects:
                    for row in event.rows:
                        shard.suspects.pop(row, None)
                return blame.rows_made(board, worker)
            case ShardGenerated():
                if worker.attempt is attempt:
                    board.generated(worker, attempt, now)
            case ShardCommitted():
                return blame.rows_made(board, worker) + self._committed(worker, attempt, event, now)
            case ShardReturned():
                board.end_attempt(worker, attempt, now)
                if shard is not None and not shard.attempts:
                    board.wait(shard, now)
            case ShardFailed():
                return blame.attempt_failed(
                    board, self.tally, self.rules, worker, attempt, event.failure, now
                )
        return []

    def _committed(self, worker: Worker, attempt: Attempt, event: ShardCommitted, now: float) -> list[Action]:
        self.board.end_attempt(worker, attempt, now)
        shard = self.board.commit(attempt.shard)
        if shard is None:
            return []  # a copy was first
        self.tally.add_committed(event, usual_s=None if attempt.isolated else now - attempt.started)
        return [action for other in shard.attempts for action in self._cancel(other)]

    def _cancel(self, attempt: Attempt) -> list[Action]:
        """Ask for a running attempt back, once. One that only commits is not worth the asking."""
        worker = self.board.workers.get(attempt.worker)
        if worker is None or worker.attempt is not attempt or attempt.cancelled:
            return []
        attempt.cancelled = True
        return [Cancel(attempt.worker, attempt.shard, attempt.number)]

    def _end(self) -> Done | Abort | None:
        slots = self.board.slots
        if self.board.left == 0:
            return Done(tuple(self.tally.failed))
        if not slots.open and not slots.closed:
            last = self.tally.retirements[-1]
            return Abort(
                "no_workers",
                f"every worker was retired after {self.rules.worker_failures} failures without a row made in "
                f"between; the last one with: {last.message}",
            )
        return None

    # Numbers for whoever watches.

    @property
    def left(self) -> int:
        """Shards that are neither done nor failed."""
        return self.board.left

    @property
    def tracked(self) -> int:
        """Shards that have an object: reserved, running, committing, waiting or failed."""
        return len(self.board.shards)

    @property
    def waiting(self) -> int:
        """Shards that wait for another attempt."""
        return len(self.board.waiting)

    @property
    def running(self) -> int:
        """Workers with a shard running."""
        return sum(worker.attempt is not None for worker in self.board.workers.values())

    @property
    def busy(self) -> int:
        """Shards that some worker runs or commits."""
        return self.board.busy

    @property
    def ready(self) -> int:
        """Workers that have their model."""
        return len(self.board.workers) - self.board.starting

    @property
    def starting(self) -> int:
        """Workers asked for that are not ready."""
        return self.board.starting
