"""A job of any size in simulated time: `python -m overtone.cluster.simulate`.

The driver's own dispatcher, no Ray.

The dispatcher is the real one and is told what it would be told; the workers, their machines and the store
are played here. Shard times are log-normal with a tail of stragglers; processes die, machines are taken away
(half of them with notice), stores fail, rows kill every process that touches them, and one machine is broken.
Answers how long a job takes against the ideal, what its driver needs, and what is made twice.
"""

from __future__ import annotations

import heapq
import math
import random
import resource
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from overtone.cluster.simulate.world import GRACE_S, LATENCY_S, ROWS, Result, World

_SAMPLE = 101  # every 101st event is timed
_STORE_FAILED = Failure(Verdict.RETRY, "StoreError", "503 Slow Down", "commit")


@dataclass(slots=True, eq=False)
class _Process:
    id: int
    slot: int
    node: str
    due: int = 0  # number of its entry in the agenda
    work: Assignment | None = None
    batches: list[tuple[str, ...]] = field(default_factory=list)  # that are not begun
    rows: tuple[str, ...] = ()  # in flight
    batch_s: float = 0.0
    dies: bool = False
    fails: bool = False
    cancelled: bool = False
    draining: bool = False
    background: Assignment | None = None  # its commit is through, and nobody has heard of it yet
    background_fails: bool = False


class Simulation:
    """One job. `run` ends with it; RuntimeError where it goes on past `limit_s` of simulated time."""

    def __init__(self, world: World, *, copies: bool = True) -> None:
        self.world = world
        self.result = Result(ideal_s=world.ideal_s)
        self._before_mib = _peak_mib()
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
        self._processes: dict[int, _Process] = {}
        self._on_slot: dict[int, _Process] = {}
        self._generation: dict[int, int] = {}  # machines that a node's place has had
        self._num_nodes = -(-world.workers // world.workers_per_node)
        self._events_s, self._ticks_s = array("d"), array("d")

    def run(self, limit_s: float = math.inf, on_tick: Callable[[Simulation], None] | None = None) -> Result:
        """To the end. `on_tick` is called after every tick."""
        begin = time.process_time()
        self._do(self.dispatcher.begin(0.0))
        self._at(self.world.tick_s, self._tick, on_tick)
        if self.world.node_hours:
            self._at(self._until_preemption(), self._take_machine, None)
        while self.end is None:
            self.now, number, call, what = heapq.heappop(self._agenda)
            if self.now > limit_s:
                raise RuntimeError(f"does not end within {limit_s:g} s")
            if not isinstance(what, _Process) or (what.due == number and what.id in self._processes):
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
                    self._next(process, self.world.commit_s, self._flush)
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

    def _next(self, process: _Process, seconds: float, call: Callable[[_Process], None]) -> None:
        """What a process does next; it does one thing at a time."""
        self._at(seconds, call, process)
        process.due = self._sequence

    def _start(self, action: StartWorker) -> None:
        place = action.slot // self.world.workers_per_node
        node = f"n{place}.{self._generation.get(place, 0)}"
        process = _Process(action.worker, action.slot, node)
        self._processes[process.id] = self._on_slot[process.slot] = process
        seconds = self.world.start_s * self._random.uniform(0.5, 2.0)
        self._next(process, seconds, lambda one: self._tell(WorkerReady(one.id, one.node)))

    def _assign(self, process: _Process, work: Assignment) -> None:
        result, world, draw = self.result, self.world, self._random
        result.attempts += 1
        result.copies += self._running[work.shard] > 0
        self._running[work.shard] += 1
        self.attempts[work.shard] = min(255, self.attempts[work.shard] + 1)
        if work.attempt > 200:
            raise RuntimeError(f"shard {work.shard} does not end")
        seconds = draw.lognormvariate(0.0, world.spread) * world.shard_s
        if draw.random() < world.straggler_chance:
            seconds *= world.straggler_factor
        process.work, process.cancelled = work, False
        process.dies = draw.random() < world.death_chance
        process.fails = draw.random() < world.failure_chance
        names = [f"{work.shard}:{k}" for k in range(ROWS)]
        if work.suspects or work.isolate or work.quarantined:
            skip = {row.row_id for row in work.quarantined}
            rest = [row for row in names if row not in skip and row not in work.suspects]
            process.batches = [(row,) for row in work.suspects]
            process.batches += [(row,) for row in rest] if work.isolate else [tuple(rest)] if rest else []
        else:
            process.batches = [tuple(names)]
        process.batch_s = seconds / max(1, len(process.batches))
        self._next(process, LATENCY_S, self._begin)

    def _begin(self, process: _Process) -> None:
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

    def _end_batch(self, process: _Process) -> None:
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

    def _finish(self, process: _Process) -> None:
        """All rows are made: commit behind the next shard's back, or at once."""
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

    def _commit(self, process: _Process) -> None:
        work, fails = process.work, process.fails
        assert work is not None
        self._drop(process)
        if fails:
            self._fail(process, work)
            return
        self._create(work.shard)
        self._tell(self._news_of(process, work))

    def _flush(self, process: _Process) -> None:
        self._committed(process)

    def _committed(self, process: _Process) -> None:
        """Tell of the commit behind the process's back, if there is one."""
        work = process.background
        if work is None or process.id not in self._processes:
            return
        process.background = None
        self._running[work.shard] -= 1
        if process.background_fails:
            self._fail(process, work)
        else:
            self._tell(self._news_of(process, work))

    def _news_of(self, process: _Process, work: Assignment) -> ShardCommitted:
        return ShardCommitted(process.id, work.shard, work.attempt, ROWS, len(work.quarantined))

    def _fail(self, process: _Process, work: Assignment) -> None:
        self.result.store_failures += 1
        self._tell(ShardFailed(process.id, work.shard, work.attempt, _STORE_FAILED))

    def _create(self, shard: int) -> None:
        """The store's side: the first one wins."""
        if self.parts[shard]:
            self.result.lost_races += 1
        else:
            self.parts[shard] = 1
            self.result.rejects += shard in self._poison

    def _drop(self, process: _Process) -> None:
        """The shard in hand is no longer."""
        if process.work is not None:
            self._running[process.work.shard] -= 1
        process.work, process.batches, process.rows = None, [], ()

    def _remove(self, process: _Process) -> None:
        self._drop(process)
        if process.background is not None:
            self._running[process.background.shard] -= 1
        del self._processes[process.id]
        if self._on_slot[process.slot] is process:
            del self._on_slot[process.slot]

    # What goes wrong.

    def _die(self, process: _Process) -> None:
        self.result.deaths += 1
        self._remove(process)
        self._tell(WorkerDied(process.id, "killed by a signal"))

    def _until_preemption(self) -> float:
        return self._random.expovariate(self._num_nodes / (3600 * self.world.node_hours))

    def _take_machine(self, _: None) -> None:
        place = self._random.randrange(self._num_nodes)
        if self._random.random() < 0.5:
            for process in self._of(place):
                self.result.preemptions += not process.draining
                process.draining = True
                if process.id in self._processes:
                    self._tell(WorkerDraining(process.id))
            self._at(GRACE_S, self._machine_gone, place)
        else:
            self._machine_gone(place)
        self._at(self._until_preemption(), self._take_machine, None)

    def _machine_gone(self, place: int) -> None:
        node = f"n{place}.{self._generation.get(place, 0)}"
        self._generation[place] = self._generation.get(place, 0) + 1
        for process in self._of(place):
            if process.node == node and process.id in self._processes:
                self.result.preemptions += not process.draining
                self._remove(process)
                self._tell(WorkerDied(process.id, "its machine is gone", preempted=True))

    def _of(self, place: int) -> list[_Process]:
        first = place * self.world.workers_per_node
        slots = range(first, first + self.world.workers_per_node)
        return [self._on_slot[slot] for slot in slots if slot in self._on_slot]

    # The outcome.

    def _judged(self, cpu_s: float) -> Result:
        result, checks = self.result, self.result.checks
        result.makespan_s, result.cpu_s = self.now, cpu_s
        result.event_us, result.tick_us = _mean_us(self._events_s), _mean_us(self._ticks_s)
        result.most_attempts = max(self.attempts, default=0)
        result.peak_mib = _peak_mib()
        result.grown_mib = result.peak_mib - self._before_mib
        if self.end != Done():
            checks.append(f"the job ended with {self.end}")
        missing = self.parts.count(0)
        if missing:
            checks.append(f"{missing:,} shards have no part")
        if result.rejects != result.poison:
            checks.append(f"{result.rejects} rejects where {result.poison} rows are poison")
        return result


def _mean_us(seconds: Sequence[float]) -> float:
    usual = sorted(seconds)[: math.ceil(0.99 * len(seconds))]
    return 1e6 * statistics.fmean(usual) if usual else 0.0


def _peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
