"""A job of any size in simulated time, with the driver's own dispatcher. Knows no Ray, no device, no files.

The dispatcher is called with the events that a driver would report to it; the workers, their machines and
the store are played here. Shard times are log-normal with a tail of stragglers; processes die, machines are
taken away (half of them with notice), stores fail, rows kill every process that touches them, and one machine
is broken. The result says how long a job takes against the ideal, what its driver needs, and what is made
twice.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from overtone.cluster.dispatch import (
    Abort,
    Action,
    Assign,
    Assignment,
    Cancel,
    Dispatcher,
    Done,
    Event,
    Flush,
    Quarantine,
    RetireSlot,
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
    WorkerReady,
)
from overtone.cluster.faults import Failure, Verdict
from overtone.cluster.simulate.processes import Machines, Process
from overtone.cluster.simulate.world import GRACE_S, LATENCY_S, ROWS, Result, World, mean_us, peak_mib

_SAMPLE = 101  # every 101st event is timed
_STORE_FAILED = Failure(Verdict.RETRY, "StoreError", "503 Slow Down", "commit")


class Simulation:
    """One job. `run` ends with it; it raises RuntimeError if the job takes more than `limit_s` simulated."""

    def __init__(self, world: World, *, copies: bool = True) -> None:
        self.world = world
        self.result = Result(ideal_s=world.ideal_s)
        self._before_mib = peak_mib()
        self._random = random.Random(world.seed)
        self._poison = frozenset(
            self._random.sample(range(world.shards), math.ceil(world.poison_share * world.shards))
        )
        self.result.poison = len(self._poison)
        self.dispatcher = Dispatcher(
            num_shards=world.shards,
            num_rows=world.shards * ROWS,
            rules=Rules(max_workers=world.workers, silence_s=100 * world.shard_s, copies=copies),
            rows_of=lambda shard: ROWS,
        )
        self.now = 0.0
        self.end: Done | Abort | None = None
        self.parts = bytearray(world.shards)
        """Parts under each final name: 0 or 1."""
        self.attempts = bytearray(world.shards)
        """At each shard; 255 stands for more, too."""
        self._running = bytearray(world.shards)  # attempts at each shard in the hands of workers
        self._agenda: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._sequence = 0
        self._processes: dict[int, Process] = {}
        self._machines = Machines(world.workers, world.workers_per_node)
        self._events_s, self._ticks_s = array("d"), array("d")

    def run(self, limit_s: float = math.inf, on_tick: Callable[[Simulation], None] | None = None) -> Result:
        """Run the job to its end. `on_tick` is called after every tick."""
        begin = time.process_time()
        self._do(self.dispatcher.begin(0.0))
        self._at(self.world.tick_s, self._tick, on_tick)
        if self.world.node_hours:
            self._at(self._until_preemption(), self._take_machine, None)
        while self.end is None:
            self.now, number, call, what = heapq.heappop(self._agenda)
            if self.now > limit_s:
                raise RuntimeError(f"does not end within {limit_s:g} s")
            if not isinstance(what, Process) or (what.due == number and what.id in self._processes):
                call(what)
        return self._judged(time.process_time() - begin)

    # The dispatcher's side.

    def _tell(self, event: Event) -> None:
        self.result.events += 1
        if self.result.events % _SAMPLE:
            actions = self.dispatcher.handle(event, self.now)
        else:
            begin = time.perf_counter()
            actions = self.dispatcher.handle(event, self.now)
            self._events_s.append(time.perf_counter() - begin)
        if actions:
            self._do(actions)

    def _tick(self, on_tick: Callable[[Simulation], None] | None) -> None:
        begin = time.perf_counter()
        actions = self.dispatcher.tick(self.now)
        self._ticks_s.append(time.perf_counter() - begin)
        self._do(actions)
        self.result.most_tracked = max(self.result.most_tracked, self.dispatcher.tracked)
        if on_tick is not None:
            on_tick(self)
        self._at(self.world.tick_s, self._tick, on_tick)

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Assign():
                    self._assign(self._processes[action.worker], action.assignment)
                case StartWorker():
                    self._start(action)
                case StopWorker():
                    self._remove(self._processes[action.worker])
                case Cancel():
                    self._processes[action.worker].cancelled = True
                case Flush():
                    process = self._processes[action.worker]
                    self._next(process, self.world.commit_s, self._committed)
                case RetireSlot():
                    self.result.retired += 1
                case Quarantine():
                    if action.row.shard not in self._poison:
                        self.result.checks.append(f"row {action.row.row_id} was condemned and is good")
                case Done() | Abort():
                    self.end = action

    # The workers' side.

    def _at(self, seconds: float, call: Callable[[Any], None], what: Any) -> None:
        self._sequence += 1
        heapq.heappush(self._agenda, (self.now + seconds, self._sequence, call, what))

    def _next(self, process: Process, seconds: float, call: Callable[[Process], None]) -> None:
        """Let a process do this next, instead of anything else; it does one thing at a time."""
        self._at(seconds, call, process)
        process.due = self._sequence

    def _start(self, action: StartWorker) -> None:
        process = self._machines.start(action.worker, action.slot)
        self._processes[process.id] = process
        seconds = self.world.start_s * self._random.uniform(0.5, 2.0)
        self._next(process, seconds, lambda one: self._tell(WorkerReady(one.id, one.node)))

    def _assign(self, process: Process, work: Assignment) -> None:
        result, world, draw = self.result, self.world, self._random
        result.attempts += 1
        result.copies += self._running[work.shard] > 0
        self._running[work.shard] += 1
        self.attempts[work.shard] = min(255, self.attempts[work.shard] + 1)
        if work.attempt > 200:
            raise RuntimeError(f"shard {work.shard} does not end")
        process.take(work, world.attempt_s(draw))
        process.dies = draw.random() < world.death_chance
        process.fails = draw.random() < world.failure_chance
        self._next(process, LATENCY_S, self._begin)

    def _begin(self, process: Process) -> None:
        """The next batch of the shard in hand."""
        work = process.work
        assert work is not None
        if process.cancelled or process.draining:
            self._drop(process)
            self._committed(process)
            if process.id in self._processes:
                self._tell(ShardReturned(process.id, work.shard, work.attempt))
            return
        if not process.batches:
            self._finish(process)
            return
        process.rows = process.batches.pop(0)
        self._tell(ShardAlive(process.id, work.shard, work.attempt))
        self._tell(RowsStarted(process.id, work.shard, work.attempt, process.rows))
        kills = process.slot < self.world.broken_nodes * self.world.workers_per_node or (
            work.shard in self._poison and f"{work.shard}:0" in process.rows
        )
        if kills or process.dies:
            self._next(process, process.batch_s * self._random.random(), self._die)
        else:
            self._next(process, process.batch_s, self._end_batch)

    def _end_batch(self, process: Process) -> None:
        work = process.work
        assert work is not None
        rows, process.rows = process.rows, ()
        self._tell(RowsDone(process.id, work.shard, work.attempt, rows))
        self._committed(process)
        if process.id not in self._processes:
            return
        if process.batches:
            self._begin(process)
        else:
            self._finish(process)

    def _finish(self, process: Process) -> None:
        """All rows are made: the commit happens beside the next shard, or at once."""
        work = process.work
        assert work is not None
        if work.commit_first or process.draining:
            self._next(process, self.world.commit_s, self._commit)
            return
        self._drop(process)
        self._running[work.shard] += 1  # it is still this worker's
        process.background, process.background_fails = work, process.fails
        if not process.fails:
            self._create(work.shard)
        self._tell(ShardGenerated(process.id, work.shard, work.attempt))

    def _commit(self, process: Process) -> None:
        work, fails = process.work, process.fails
        assert work is not None
        self._drop(process)
        if fails:
            self._fail(process, work)
            return
        self._create(work.shard)
        self._tell(self._news_of(process, work))

    def _committed(self, process: Process) -> None:
        """Report the commit in the background, if there is one."""
        work = process.background
        if work is None or process.id not in self._processes:
            return
        process.background = None
        self._running[work.shard] -= 1
        if process.background_fails:
            self._fail(process, work)
        else:
            self._tell(self._news_of(process, work))

    def _news_of(self, process: Process, work: Assignment) -> ShardCommitted:
        return ShardCommitted(process.id, work.shard, work.attempt, ROWS, len(work.quarantined))

    def _fail(self, process: Process, work: Assignment) -> None:
        self.result.store_failures += 1
        self._tell(ShardFailed(process.id, work.shard, work.attempt, _STORE_FAILED))

    def _create(self, shard: int) -> None:
        """Play the store: the first part under a name wins."""
        if self.parts[shard]:
            self.result.lost_races += 1
        else:
            self.parts[shard] = 1
            self.result.rejects += shard in self._poison

    def _drop(self, process: Process) -> None:
        """The shard in hand is dropped."""
        if process.work is not None:
            self._running[process.work.shard] -= 1
        process.work, process.batches, process.rows = None, [], ()

    def _remove(self, process: Process) -> None:
        self._drop(process)
        if process.background is not None:
            self._running[process.background.shard] -= 1
        del self._processes[process.id]
        self._machines.end(process)

    # What goes wrong.

    def _die(self, process: Process) -> None:
        self.result.deaths += 1
        self._remove(process)
        self._tell(WorkerDied(process.id, "killed by a signal"))

    def _until_preemption(self) -> float:
        return self._random.expovariate(self._machines.places / (3600 * self.world.node_hours))

    def _take_machine(self, _: None) -> None:
        place = self._random.randrange(self._machines.places)
        if self._random.random() < 0.5:
            for process in self._machines.at(place):
                self.result.preemptions += not process.draining
                process.draining = True
                if process.id in self._processes:
                    self._tell(WorkerDraining(process.id))
            self._at(GRACE_S, self._machine_gone, place)
        else:
            self._machine_gone(place)
        self._at(self._until_preemption(), self._take_machine, None)

    def _machine_gone(self, place: int) -> None:
        for process in self._machines.replace(place):
            if process.id in self._processes:
                self.result.preemptions += not process.draining
                self._remove(process)
                self._tell(WorkerDied(process.id, "its machine is gone", preempted=True))

    # The outcome.

    def _judged(self, cpu_s: float) -> Result:
        result = self.result
        result.makespan_s, result.cpu_s = self.now, cpu_s
        result.event_us, result.tick_us = mean_us(self._events_s), mean_us(self._ticks_s)
        result.most_attempts = max(self.attempts, default=0)
        result.peak_mib = peak_mib()
        result.grown_mib = result.peak_mib - self._before_mib
        if self.end != Done():
            result.checks.append(f"the job ended with {self.end}")
        result.check(missing=self.parts.count(0))
        return result
