"""The dispatch state machine in a simulated world: nothing lost, nothing run twice, blame well placed."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from overtone.cluster.dispatch import (
    Abort,
    Assign,
    Assignment,
    Cancel,
    Dispatcher,
    Done,
    FailShard,
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
    WorkerFailed,
    WorkerReady,
)
from overtone.cluster.dispatch.board import Board
from overtone.cluster.dispatch.derived import derived
from overtone.cluster.dispatch.tally import Tally
from overtone.cluster.faults import Failure, Verdict
from overtone.jobs.rows import Quarantined

ROWS = 4  # rows a shard
STORE_DOWN = Failure(Verdict.RETRY, "StoreError", "503", "upload")
CUDA_BROKEN = Failure(Verdict.REPLACE_WORKER, "AcceleratorError", "illegal access", "denoise")
BUG = Failure(Verdict.FAIL_JOB, "TypeError", "no such argument", "denoise")
NO_DEVICE = Failure(Verdict.REPLACE_WORKER, "RuntimeError", "no device", "start")


@dataclass
class Sim:
    """A worker as the dispatcher sees one: it goes through an assignment's batches, one step a call."""

    id: int
    slot: int
    node: str
    ready: bool = False
    work: Assignment | None = None
    batches: list[tuple[str, ...]] = field(default_factory=list)
    in_flight: tuple[str, ...] = ()
    background: Assignment | None = None
    flush: bool = False
    cancelled: bool = False


class World:
    """Executes the dispatcher's actions on simulated workers, and checks each of them and the board."""

    def __init__(self, num_shards, rules, *, poison=(), nodes=1, batch=2, done=(), quarantine=None):
        self.rules, self.poison, self.num_nodes, self.batch = rules, set(poison), nodes, batch
        self.dispatcher = Dispatcher(
            num_shards=num_shards,
            num_rows=num_shards * ROWS,
            done=done,
            rules=rules,
            quarantine=quarantine,
            rows_of=lambda shard: ROWS,
        )
        self.now = 0.0
        self.num_shards = num_shards
        self.workers: dict[int, Sim] = {}
        self.committed: dict[int, set[str]] = {index: set() for index in done}
        self.attempts: dict[int, int] = {}
        self.quarantined: dict[str, Quarantined] = {}
        self.failed: set[int] = set()
        self.retired: list[RetireSlot] = []
        self.stopped: list[StopWorker] = []
        self.starts: list[StartWorker] = []
        self.assigned: list[Assign] = []
        self.end: Done | Abort | None = None
        self.bad_slots: set[int] = set()
        self.do(self.dispatcher.begin(self.now))

    # Actions.

    def do(self, actions):
        self.dispatcher.board.check()
        for action in actions:
            assert self.end is None, f"{action} after the end"
            match action:
                case StartWorker():
                    assert not any(w.slot == action.slot for w in self.workers.values())
                    self.starts.append(action)
                    node = f"n{action.slot % self.num_nodes}"
                    self.workers[action.worker] = Sim(action.worker, action.slot, node)
                case StopWorker():
                    self.stopped.append(action)
                    self.workers.pop(action.worker)
                case Assign():
                    self.assign(action)
                case Cancel():
                    assert self.workers[action.worker].work.shard == action.shard
                    self.workers[action.worker].cancelled = True
                case Flush():
                    assert self.workers[action.worker].background is not None
                    self.workers[action.worker].flush = True
                case Quarantine():
                    assert action.row.row_id not in self.quarantined, "announced twice"
                    self.quarantined[action.row.row_id] = action.row
                case RetireSlot():
                    self.retired.append(action)
                case FailShard():
                    assert action.shard not in self.committed
                    self.failed.add(action.shard)
                case Done() | Abort():
                    self.end = action

    def assign(self, action):
        worker, work = self.workers[action.worker], action.assignment
        self.assigned.append(action)
        assert worker.ready
        assert worker.work is None
        assert work.shard not in self.committed
        assert work.shard not in self.failed
        assert work.attempt == self.attempts.get(work.shard, 0) + 1
        others = self.at(work.shard)
        assert len(others) <= (1 if self.rules.copies else 0), "the same shard twice at the same time"
        assert worker not in others
        if work.read_ahead is not None:
            assert work.read_ahead not in self.committed
            assert not work.suspects
        self.attempts[work.shard] = work.attempt
        skip = {row.row_id for row in work.quarantined}
        assert not skip & set(work.suspects)
        rest = [f"{work.shard}:{k}" for k in range(ROWS)]
        rest = [row for row in rest if row not in skip and row not in work.suspects]
        size = 1 if work.isolate else self.batch
        worker.work, worker.cancelled, worker.in_flight = work, False, ()
        worker.batches = [(row,) for row in work.suspects]
        worker.batches += [tuple(rest[k : k + size]) for k in range(0, len(rest), size)]

    def at(self, shard):
        """The workers that run or commit a shard."""
        return [
            worker
            for worker in self.workers.values()
            if any(work is not None and work.shard == shard for work in (worker.work, worker.background))
        ]

    # Events.

    def tell(self, event):
        self.do(self.dispatcher.handle(event, self.now))

    def advance(self, seconds):
        self.now += seconds
        self.do(self.dispatcher.tick(self.now))

    def step(self, worker):
        """Let one worker do the next thing it would do."""
        if not worker.ready:
            worker.ready = True
            self.tell(WorkerReady(worker.id, worker.node))
        elif worker.background is not None and (worker.flush or worker.work is not None):
            work, worker.background, worker.flush = worker.background, None, False
            self.commit(worker, work)
        elif worker.work is None:
            return
        elif worker.cancelled:
            work, worker.work = worker.work, None
            self.tell(ShardReturned(worker.id, work.shard, work.attempt))
        elif worker.in_flight:
            self.finish_batch(worker)
        elif worker.batches:
            worker.in_flight = worker.batches.pop(0)
            self.tell(RowsStarted(worker.id, worker.work.shard, worker.work.attempt, worker.in_flight))
        else:
            work, worker.work = worker.work, None
            if work.commit_first:
                self.commit(worker, work)
            else:
                worker.background = work
                self.tell(ShardGenerated(worker.id, work.shard, work.attempt))

    def finish_batch(self, worker):
        if worker.slot in self.bad_slots or self.poison & set(worker.in_flight):
            self.die(worker)
            return
        rows, worker.in_flight = worker.in_flight, ()
        self.tell(RowsDone(worker.id, worker.work.shard, worker.work.attempt, rows))

    def commit(self, worker, work):
        skipped = {row.row_id for row in work.quarantined}
        if work.shard not in self.committed:
            self.committed[work.shard] = skipped
        self.tell(ShardCommitted(worker.id, work.shard, work.attempt, ROWS, len(skipped)))

    def die(self, worker, *, preempted=False, squeezed=False):
        del self.workers[worker.id]
        self.tell(WorkerDied(worker.id, "killed by a signal", preempted=preempted, squeezed=squeezed))

    def run(self, limit=20_000, seconds=1.0):
        """Without further faults than the poison's, to the end."""
        for _ in range(limit):
            if self.end is not None:
                return self
            for worker in list(self.workers.values()):
                if worker.id in self.workers and self.end is None:
                    self.step(worker)
            if self.end is None:
                self.advance(seconds)
        raise AssertionError("does not end")

    @property
    def rejected(self):
        return set().union(*self.committed.values())

    def one(self, slot=0):
        [worker] = [worker for worker in self.workers.values() if worker.slot == slot]
        return worker


def rules(**changes):
    return Rules(**{"max_workers": 2, "max_reject_fraction": 1.0, "copies": False, **changes})


# One behaviour each.


def test_every_shard_once_and_the_next_one_is_read_ahead():
    world = World(20, rules()).run()
    assert world.end == Done()
    assert set(world.committed) == set(range(20))
    assert set(world.attempts.values()) == {1}
    ahead = {a.worker: a.assignment.read_ahead for a in world.assigned[:2]}
    later = {a.worker: a.assignment.shard for a in world.assigned[2:4]}
    assert ahead == later
    assert None not in ahead.values()


def test_only_what_is_not_done_runs_and_nothing_left_means_no_worker():
    world = World(6, rules(), done=[0, 2, 4]).run()
    assert sorted(world.attempts) == [1, 3, 5]
    idle = World(3, rules(), done=[0, 1, 2])
    assert idle.end == Done()
    assert not idle.starts


def test_no_more_workers_than_shards():
    assert len(World(3, rules(max_workers=50)).starts) == 3


def test_a_poison_row_ends_as_the_only_reject():
    world = World(10, rules(), poison={"3:2"}).run()
    assert world.end == Done()
    assert world.rejected == {"3:2"}
    assert world.quarantined["3:2"].deaths == 2
    assert world.attempts[3] == 4  # the batch, alone, alone, the rest


def test_a_death_before_its_rows_are_named_makes_the_next_attempt_name_them_one_by_one():
    world = World(3, rules(max_workers=1), poison={"0:2"}, batch=4)
    world.step(world.one())
    world.die(world.one())  # the word of its first batch was lost with it
    world.run()
    assert world.rejected == {"0:2"}
    assert [action.assignment.isolate for action in world.assigned if action.assignment.shard == 0] == [
        False,
        True,
        True,
        True,
    ]


def test_many_poison_rows_in_one_shard():
    poison = {"0:0", "0:1", "0:3", "2:0"}
    world = World(4, rules(worker_failures=4), poison=poison).run()
    assert world.end == Done()
    assert world.rejected == poison == set(world.quarantined)


def test_a_row_is_condemned_on_different_nodes_where_there_are_several():
    world = World(40, rules(), poison={"0:0"}, nodes=2)
    nodes = []
    while world.end is None:
        for worker in list(world.workers.values()):
            if worker.in_flight == ("0:0",):
                nodes.append(worker.node)
            if worker.id in world.workers and world.end is None:
                world.step(worker)
        if world.end is None:
            world.advance(1.0)
    assert world.rejected == {"0:0"}
    assert set(nodes) == {"n0", "n1"}


def test_preemption_is_charged_to_nobody():
    world = World(2, rules(max_workers=1, max_attempts=1, row_deaths=1, worker_failures=1))
    for _ in range(20):
        world.step(world.one())
        world.step(world.one())
        assert world.one().in_flight
        world.die(world.one(), preempted=True)
        world.advance(1.0)
    assert world.run().end == Done()
    assert not world.quarantined
    assert not world.retired


def test_a_shard_that_always_fails_is_given_up_after_max_attempts_and_the_others_go_on():
    world = World(8, rules())
    while world.end is None:
        for worker in list(world.workers.values()):
            if worker.id in world.workers and worker.work and worker.work.shard == 5:
                work, worker.work = worker.work, None
                world.tell(ShardFailed(worker.id, work.shard, work.attempt, STORE_DOWN))
            elif worker.id in world.workers and world.end is None:
                world.step(worker)
        if world.end is None:
            world.advance(1.0)
    assert world.failed == {5}
    assert world.attempts[5] == 3
    assert set(world.committed) == set(range(8)) - {5}
    assert world.end.failed[0].shard == 5
    assert "503" in world.end.failed[0].message


def test_a_failed_attempt_waits_longer_each_time():
    world = World(1, rules(max_workers=1, backoff_s=10.0, worker_failures=9))
    waits = []
    for _ in range(2):
        while not (world.workers and world.one().work):
            world.step(world.one())
            world.advance(0.5)
        worker, failed_at = world.one(), world.now
        work, worker.work = worker.work, None
        world.tell(ShardFailed(worker.id, work.shard, work.attempt, STORE_DOWN))
        while world.one().work is None:
            world.advance(0.5)
        waits.append(world.now - failed_at)
    assert waits == [10.0, 20.0]


def test_a_store_that_is_down_ends_the_job_instead_of_failing_every_shard():
    world = World(1000, rules(max_workers=4, worker_failures=100))
    while world.end is None:
        for worker in list(world.workers.values()):
            if world.end is None and worker.ready and worker.work:
                work, worker.work = worker.work, None
                world.tell(ShardFailed(worker.id, work.shard, work.attempt, STORE_DOWN))
            elif world.end is None:
                world.step(worker)
        if world.end is None:
            world.advance(1.0)
    assert isinstance(world.end, Abort)
    assert world.end.kind == "shards"
    assert "503" in world.end.message
    assert len(world.failed) == 3


def test_a_bug_stops_the_job_with_its_traceback():
    world = World(4, rules())
    world.step(world.one())
    worker = world.one()
    world.tell(ShardFailed(worker.id, worker.work.shard, 1, BUG))
    assert isinstance(world.end, Abort)
    assert world.end.failure is BUG


def test_a_broken_device_replaces_the_worker_and_its_rows_are_suspects():
    world = World(1, rules(max_workers=1))
    world.step(world.one())
    world.step(world.one())
    first = world.one()
    world.tell(ShardFailed(first.id, 0, 1, CUDA_BROKEN))
    assert world.stopped[-1].worker == first.id
    assert world.stopped[-1].kill
    world.advance(10.0)
    world.step(world.one())
    assert world.one().work.suspects == first.in_flight


def test_a_bad_machine_is_retired_its_node_avoided_and_its_charges_are_taken_back():
    world = World(12, rules(max_workers=3), nodes=3)
    world.bad_slots = {1}
    world.run()
    assert world.end == Done()
    assert [(r.slot, r.node) for r in world.retired] == [(1, "n1")]
    assert not world.rejected
    assert not world.quarantined


def test_a_place_given_up_for_a_commit_in_the_background_gives_its_running_shard_back():
    world = World(12, rules(worker_failures=1))
    while world.one(0).background is None:
        world.step(world.one(0))
    worker = world.one(0)
    work, worker.background = worker.background, None
    world.tell(ShardFailed(worker.id, work.shard, work.attempt, STORE_DOWN))
    assert [retired.slot for retired in world.retired] == [0]
    assert world.run().end == Done()
    assert set(world.committed) == set(range(12))


def test_one_bad_machine_alone_condemns_no_row():
    world = World(12, rules(max_workers=1))
    world.bad_slots = {0}
    world.run()
    assert isinstance(world.end, Abort)
    assert world.end.kind == "no_workers"
    assert not world.quarantined
    assert not world.committed


def test_a_place_given_up_takes_nothing_back_from_a_shard_that_has_failed():
    """What it charged there was counted when the shard failed; `Board.check` compares the count."""
    world = World(9, rules(max_workers=1, row_deaths=1, max_attempts=1, worker_failures=2), batch=1)
    world.step(world.one())
    world.step(world.one())
    assert world.one().in_flight == ("0:0",)
    world.die(world.one())  # the row is in doubt
    world.advance(10.0)
    world.step(world.one())
    assert world.one().work.shard == 1
    world.die(world.one())
    assert world.failed == {1}
    world.advance(100.0)
    world.step(world.one())
    assert world.one().work.quarantined
    world.die(world.one())
    assert [retired.slot for retired in world.retired] == [0]
    assert world.failed == {0, 1}


def test_a_poison_first_row_does_not_retire_the_only_worker():
    world = World(3, rules(max_workers=1, row_deaths=4, worker_failures=3), poison={"0:0"}).run()
    assert world.end == Done()
    assert world.rejected == set(world.quarantined) == {"0:0"}


def test_workers_that_cannot_start_end_the_job_with_the_reason():
    world = World(3, rules())
    while world.end is None:
        for worker in list(world.workers.values()):
            if world.end is None:
                del world.workers[worker.id]
                world.tell(WorkerFailed(worker.id, NO_DEVICE))
        if world.end is None:
            world.advance(5.0)
    assert world.end.kind == "no_workers"
    assert "no device" in world.end.message
    assert len(world.starts) == 6


def test_a_wrong_setting_found_while_starting_ends_the_job_at_once():
    world = World(3, rules())
    world.tell(WorkerFailed(0, BUG))
    assert world.end.kind == "failure"


def test_too_many_rejects_stop_the_job_early():
    world = World(100, rules(max_reject_fraction=0.1))
    while world.end is None:
        for worker in list(world.workers.values()):
            if world.end is None and worker.work and not worker.batches and not worker.in_flight:
                work, worker.work = worker.work, None
                world.tell(ShardCommitted(worker.id, work.shard, work.attempt, ROWS, 1))
            elif world.end is None:
                world.step(worker)
        if world.end is None:
            world.advance(1.0)
    assert world.end.kind == "rejects"
    assert world.dispatcher.left > 80


def test_a_silent_worker_is_killed_and_its_row_treated_as_one_that_kills():
    world = World(1, rules(max_workers=1, silence_s=30.0, row_deaths=1), batch=1)
    world.step(world.one())
    world.step(world.one())
    world.advance(29.0)
    assert world.workers
    world.advance(2.0)
    assert world.stopped[-1].kill
    world.run()
    assert world.rejected == {"0:0"}
    assert world.quarantined["0:0"].error_class == "RowTimeout"


def test_signs_of_life_keep_a_worker():
    world = World(1, rules(max_workers=1, silence_s=30.0))
    world.step(world.one())
    for _ in range(5):
        world.advance(20.0)
        world.tell(ShardAlive(world.one().id, 0, 1))
    assert not world.stopped


def test_a_draining_worker_gives_its_shard_back_uncharged_and_gets_no_more():
    world = World(4, rules(max_attempts=1))
    for worker in list(world.workers.values()):
        world.step(worker)
    leaving = world.one(0)
    held = leaving.work.shard
    world.tell(WorkerDraining(leaving.id))
    assert leaving.cancelled
    world.step(leaving)
    assert leaving.id not in world.workers
    assert world.run().end == Done()
    assert world.attempts[held] == 2


def test_a_commit_lost_behind_another_shards_back_is_not_deferred_again():
    world = World(30, rules(max_workers=1))
    while world.one().background is None:
        world.step(world.one())
    lost = world.one().background.shard
    world.die(world.one())
    world.advance(10.0)
    while lost not in world.committed:
        if world.workers:
            work = world.one().work
            if work is not None and work.shard == lost:
                assert work.read_ahead is None
            world.step(world.one())
        world.advance(1.0)
    assert world.run().end == Done()


def test_idle_workers_copy_stragglers_and_the_losers_are_told():
    world = World(12, rules(max_workers=3, copies=True))
    slow = {}
    for _ in range(500):
        for worker in list(world.workers.values()):
            if worker.work is not None and worker.work.shard in (3, 4) and len(slow) < 2:
                slow.setdefault(worker.work.shard, worker)
            if worker not in slow.values() and worker.id in world.workers and world.end is None:
                world.step(worker)
        if world.end is not None:
            break
        world.advance(1.0)
    assert world.end == Done()
    assert {shard for shard, attempts in world.attempts.items() if attempts > 1} >= {3, 4}
    assert all(worker.cancelled for worker in slow.values())


def test_a_shard_that_takes_no_longer_than_others_is_not_copied():
    world = World(7, rules(max_workers=2, copies=True)).run()
    assert set(world.attempts.values()) == {1}


def test_a_second_witness_is_asked_before_a_doubtful_quarantine_holds():
    """One place killed every row it touched and never made any; the other has not said anything yet."""
    world = World(3, rules(worker_failures=9))
    world.bad_slots = {0}
    while sum(start.slot == 0 for start in world.starts) < 4:  # a batch died, then a row alone, twice
        for worker in [worker for worker in world.workers.values() if worker.slot == 0]:
            world.step(worker)
        world.advance(1.0)
    assert not world.quarantined
    world.step(world.one(1))
    work = world.one(1).work
    assert work.shard == 0
    assert work.suspects
    assert not work.quarantined
    assert not world.run().rejected


def test_without_copies_idle_workers_wait():
    world = World(8, rules(copies=False))
    for _ in range(200):
        for worker in list(world.workers.values()):
            if worker.work is None or worker.work.shard != 3:
                world.step(worker)
        world.advance(1.0)
    assert world.end is None
    assert world.attempts[3] == 1


def test_idle_workers_are_given_back_at_the_end_down_to_the_minimum():
    world = World(4, rules(min_workers=1, max_workers=4, idle_s=10.0))
    for _ in range(40):
        for worker in list(world.workers.values()):
            if worker.work is None or worker.work.shard != 3:
                world.step(worker)
        world.advance(1.0)
    assert len(world.workers) == 1
    assert world.run().end == Done()


def test_a_given_back_place_is_opened_again_when_work_returns():
    world = World(4, rules(min_workers=0, max_workers=2, idle_s=2.0))
    while len(world.committed) < 3 or len(world.workers) > 1:
        for worker in list(world.workers.values()):
            if worker.work is None or worker.work.shard != 3:
                world.step(worker)
        world.advance(1.0)
    [last] = world.workers.values()
    world.die(last)
    assert world.run().end == Done()


def test_quarantine_of_an_earlier_run_is_skipped():
    known = Quarantined(1, "1:1", "WorkerDied", "killed", 2)
    world = World(3, rules(), poison={"1:1"}, quarantine={1: [known]}).run()
    assert world.end == Done()
    assert world.attempts[1] == 1
    assert world.rejected == {"1:1"}
    assert not world.quarantined  # it is kept already


def test_late_events_of_the_dead_change_nothing():
    world = World(4, rules())
    world.step(world.one())
    ghost = world.one()
    shard = ghost.work.shard
    world.die(ghost)
    world.tell(ShardCommitted(ghost.id, shard, 1, ROWS, 0))
    world.tell(RowsDone(ghost.id, shard, 1, ("0:0",)))
    world.tell(WorkerDied(ghost.id, "again"))
    assert world.run().end == Done()
    assert set(world.committed) == {0, 1, 2, 3}


# The check of the board, which the world above makes after every event.


def full_board():
    """A board whose derived values are all more than nothing."""
    board = Board(9, done=[8], known={0: [Quarantined(0, "0:0", "WorkerDied", "killed", 2)]})
    for _ in range(6):
        board.slots.add()
    running, idle, retired, given_back, leaving = (
        board.add_worker(board.slots.take_vacancy(0.0), 0.0) for _ in range(5)
    )
    for worker in (running, idle, retired, given_back):
        board.ready(worker, f"n{worker.slot}", 0.0)
    shard = board.take_fresh()
    board.begin_attempt(shard, running, 0.0, isolated=False)
    board.quarantine(shard, Quarantined(0, "0:1", "WorkerDied", "killed", 2), doubted={0})
    board.reserve(board.take_fresh(), running)
    board.wait(board.take_fresh(), 5.0)
    board.drain(leaving)
    board.remove(retired, 1.0)
    board.slots.retire(board.slots[retired.slot])
    board.remove(given_back, 1.0)
    board.slots.close(board.slots[given_back.slot])
    return board


ONE_MORE = {int: 1, set: {99}, dict: {99: 0}, list: [(0.0, 99, 99)], frozenset: {"n99"}, Counter: {"n99": 1}}
DERIVED = sorted(derived({}, {}, [], bytearray()))


def test_a_full_board_agrees_with_itself():
    board = full_board()
    board.check()
    assert len(DERIVED) == 17
    for name in DERIVED:
        assert getattr(board, name, None) or getattr(board.slots, name), f"the tests below do not try {name}"


@pytest.mark.parametrize("name", DERIVED)
def test_the_check_sees_a_derived_value_that_lacks_something(name):
    board = full_board()
    owner = board if hasattr(board, name) else board.slots
    setattr(owner, name, type(getattr(owner, name))())
    with pytest.raises(AssertionError, match=f"^{name} is "):
        board.check()


@pytest.mark.parametrize("name", [name for name in DERIVED if name != "vacancies"])
def test_the_check_sees_a_derived_value_that_has_too_much(name):
    board = full_board()
    owner = board if hasattr(board, name) else board.slots
    value = getattr(owner, name)
    more = [99] if name == "closed" else ONE_MORE[type(value)]
    setattr(owner, name, value + more if isinstance(value, (int, list)) else value | more)
    with pytest.raises(AssertionError, match=f"^{name} is "):
        board.check()


def test_the_check_sees_two_records_that_disagree():
    board = full_board()
    board.shards[0].attempts.clear()
    with pytest.raises(AssertionError):
        board.check()


def test_memory_that_others_hold_is_charged_to_no_row_and_no_place():
    """A neighbour takes the memory for a while, and the one worker dies of it again and again."""
    world = World(2, rules(max_workers=1, row_deaths=1, worker_failures=2, max_attempts=1))
    started = []
    for _ in range(6):
        while not (world.workers and world.one().in_flight):
            for worker in list(world.workers.values()):
                world.step(worker)
            world.advance(0.5)
        started.append(world.now)
        world.die(world.one(), squeezed=True)
    pauses = [after - before for before, after in itertools.pairwise(started)]
    assert pauses[0] < pauses[-1], "it waits longer each time"
    world.run()
    assert world.end == Done()
    assert (world.rejected, world.retired) == (set(), [])


def test_a_shard_that_always_meets_a_lack_of_memory_is_given_up_and_its_rows_are_not_rejected():
    world = World(1, rules(max_workers=1, max_attempts=2, max_squeezes=3))
    for _ in range(200):
        for worker in list(world.workers.values()):
            if worker.in_flight:
                world.die(worker, squeezed=True)
            elif world.end is None:
                world.step(worker)
        if world.end is not None:
            break
        world.advance(30.0)
    assert [failed.shard for failed in world.end.failed] == [0]
    assert world.quarantined == {}


def test_a_model_that_one_worker_could_load_is_not_to_blame_for_another_that_cannot():
    world = World(4, rules(worker_failures=2))
    world.step(world.one(0))
    world.tell(WorkerFailed(world.one(1).id, BUG))
    assert world.end is None
    del world.workers[1]
    world.run()
    assert world.end == Done()


def test_what_another_driver_did_before_ours_took_the_job_up_is_not_done_again():
    dispatcher = Dispatcher(num_shards=4, num_rows=16, rules=Rules(max_workers=2))
    assert len(dispatcher.begin(0.0)) == 2
    known = {1: [Quarantined(1, "1:0", "WorkerDied", "killed", 2)]}
    assert dispatcher.take_up([0, 2], known, 1.0) == []
    dispatcher.board.check()
    [assign] = dispatcher.handle(WorkerReady(0, "a"), 2.0)
    assert (assign.assignment.shard, assign.assignment.quarantined) == (1, tuple(known[1]))
    other = Dispatcher(num_shards=4, num_rows=16)
    other.begin(0.0)
    assert other.take_up(range(4), {}, 1.0) == [Done()]


def test_rejects_are_a_fraction_of_rows_and_not_of_the_input_rows_that_ask_for_them():
    """Input rows ask for twenty rows each, and every second one has no prompt."""
    tally = Tally(None, lambda shard: 2)
    half = Rules(max_reject_fraction=0.5)
    tally.add_committed(ShardCommitted(0, 0, 1, rows=40, rejects=20), None)
    assert tally.limit(half, left=4, condemned=0) is None
    for shard in range(1, 5):
        tally.add_committed(ShardCommitted(0, shard, 1, rows=40, rejects=20), None)
        assert tally.limit(half, left=4 - shard, condemned=0) is None
    tally.add_committed(ShardCommitted(0, 5, 1, rows=40, rejects=40), None)
    assert "140 of the first 240 rows cannot be made" in str(tally.limit(half, left=1, condemned=0))


# Any order of events.


class AnyOrder(RuleBasedStateMachine):
    """Random events in any order; then the faults stop and the job must end with nothing lost."""

    num_copied = 0  # over all examples

    @initialize(
        shards=st.integers(0, 12),
        workers=st.integers(1, 4),
        nodes=st.integers(1, 3),
        copies=st.booleans(),
        poison=st.sets(st.tuples(st.integers(0, 11), st.integers(0, ROWS - 1)), max_size=3),
        done=st.sets(st.integers(0, 11), max_size=4),
        deaths=st.integers(1, 3),
    )
    def start(self, shards, workers, nodes, copies, poison, done, deaths):
        self.world = World(
            shards,
            Rules(
                min_workers=1,
                max_workers=workers,
                max_attempts=3,
                row_deaths=deaths,
                worker_failures=3,
                max_reject_fraction=1.0,
                silence_s=50.0,
                copies=copies,
                idle_s=5.0,
            ),
            poison={f"{shard}:{row}" for shard, row in poison},
            nodes=nodes,
            done={shard for shard in done if shard < shards},
        )
        self.faults = 0

    def pick(self, data):
        return self.world.workers[data.draw(st.sampled_from(sorted(self.world.workers)))]

    def alive(self):
        return hasattr(self, "world") and self.world.end is None and bool(self.world.workers)

    @precondition(alive)
    @rule(data=st.data(), steps=st.integers(1, 12))
    def go_on(self, data, steps):
        worker = self.pick(data)
        for _ in range(steps):
            if worker.id in self.world.workers and self.world.end is None:
                self.world.step(worker)

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 20.0, 100.0]))
    def wait(self, seconds):
        self.world.advance(seconds)

    @precondition(lambda self: self.alive() and self.world.rules.copies)
    @rule(data=st.data())
    def straggle(self, data):
        """All but one worker go on, until one of them copies what that one is at, or nothing is left."""
        slow = self.pick(data)
        for _ in range(30):
            for worker in list(self.world.workers.values()):
                waits = worker is slow and worker.in_flight
                if not waits and worker.id in self.world.workers and self.world.end is None:
                    self.world.step(worker)
            if self.world.end is None:
                self.world.advance(1.0)
            if self.world.end is not None or slow.id not in self.world.workers:
                return
            if slow.work is not None and len(self.world.at(slow.work.shard)) == 2:
                AnyOrder.num_copied += 1
                return

    @precondition(alive)
    @rule(data=st.data(), preempted=st.booleans(), squeezed=st.booleans())
    def die(self, data, preempted, squeezed):
        self.faults += 1
        self.world.die(self.pick(data), preempted=preempted, squeezed=squeezed)

    @precondition(alive)
    @rule(data=st.data())
    def drain(self, data):
        self.world.tell(WorkerDraining(self.pick(data).id))

    @precondition(alive)
    @rule(data=st.data())
    def start_fails(self, data):
        worker = self.pick(data)
        if not worker.ready:
            self.faults += 1
            del self.world.workers[worker.id]
            self.world.tell(WorkerFailed(worker.id, NO_DEVICE))

    @precondition(alive)
    @rule(data=st.data(), failure=st.sampled_from([STORE_DOWN, CUDA_BROKEN]))
    def shard_fails(self, data, failure):
        worker = self.pick(data)
        if worker.work is not None:
            self.faults += 1
            work, worker.work, worker.in_flight = worker.work, None, worker.in_flight
            self.world.tell(ShardFailed(worker.id, work.shard, work.attempt, failure))

    @precondition(alive)
    @rule(data=st.data(), shard=st.integers(0, 11), attempt=st.integers(0, 3))
    def nonsense(self, data, shard, attempt):
        """Events that belong to no run."""
        worker = self.pick(data)
        held = {work.shard for work in (worker.work, worker.background) if work is not None}
        if shard not in held:
            self.world.tell(ShardCommitted(worker.id, shard, attempt, ROWS, 0))
            self.world.tell(ShardReturned(worker.id, shard, attempt))
            self.world.tell(RowsStarted(worker.id, shard, attempt, (f"{shard}:0",)))
        self.world.tell(WorkerDied(worker.id + 10_000, "never was"))

    @invariant()
    def bounded(self):
        if not hasattr(self, "world"):
            return
        assert self.world.dispatcher.tracked <= 3 * 4 + len(self.world.attempts) + 4
        for attempts in self.world.attempts.values():
            assert attempts <= 40 + self.faults * 2

    def teardown(self):
        if not hasattr(self, "world"):
            return
        world = self.world.run()
        if isinstance(world.end, Done):
            assert set(world.committed) | world.failed == set(range(world.num_shards))
            assert not set(world.committed) & world.failed
            assert {failed.shard for failed in world.end.failed} == world.failed
        else:
            assert world.end.kind in {"no_workers", "shards"}
        if self.faults == 0 and not any("no sign of life" in stop.reason for stop in world.stopped):
            assert world.rejected <= world.poison
            assert set(world.quarantined) <= world.poison


class TestAnyOrder(AnyOrder.TestCase):
    settings = settings(
        max_examples=150,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )

    @classmethod
    def tearDownClass(cls):
        assert AnyOrder.num_copied > 0, "two attempts at one shard were never tried"


@pytest.mark.parametrize("seed", range(6))
def test_a_thousand_shards_with_deaths_all_over(seed):
    """Poison, preemption and random deaths together: every shard ends once, every poison row is a reject."""
    rng = random.Random(seed)
    poison = {f"{rng.randrange(300)}:{rng.randrange(ROWS)}" for _ in range(10)}
    world = World(300, rules(max_workers=8, copies=True, worker_failures=50), poison=poison, nodes=4)
    while world.end is None:
        for worker in list(world.workers.values()):
            if worker.id not in world.workers or world.end is not None:
                continue
            if rng.random() < 0.002:
                world.die(worker, preempted=True)
            else:
                world.step(worker)
        if world.end is None:
            world.advance(rng.random())
    assert world.end == Done()
    assert set(world.committed) == set(range(300))
    assert world.rejected == poison


def test_ten_million_shards_take_bounded_memory():
    tracemalloc.start()
    dispatcher = Dispatcher(num_shards=10_000_000, num_rows=10**10, rules=Rules(max_workers=4))
    actions = dispatcher.begin(0.0)
    for action in actions:
        actions = dispatcher.handle(WorkerReady(action.worker, "n"), 0.0)
    for number in range(1000):
        [assign] = [action for action in actions if isinstance(action, Assign)]
        work = assign.assignment
        actions = dispatcher.handle(
            ShardCommitted(assign.worker, work.shard, work.attempt, ROWS, 0), float(number)
        )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dispatcher.left == 10_000_000 - 1000
    assert dispatcher.tracked <= 8
    assert peak < 11e6
