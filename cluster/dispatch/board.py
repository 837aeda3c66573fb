"""The state of a job's dispatch: what every shard and every worker is at. Knows no rule and no action.

`Board.shards` holds every shard that is neither fresh nor done; everything else in Board is an index over it
that `check` can recompute. More exactly there are four truths (`shards`, `workers`, `slots`, `done`), three
cursors that only grow, and 17 derived values, because a job may have ten million shards and no event may
search them. Only the methods of Board and of its Slots change a derived value, and they keep it in step with
the truths.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from overtone.cluster.dispatch.derived import assert_consistent, derived
from overtone.cluster.dispatch.records import Attempt, Shard, Worker
from overtone.cluster.dispatch.slots import Slot, Slots
from overtone.jobs.rows import Quarantined

Known = Mapping[int, Sequence[Quarantined]]
"""Quarantined rows, by shard."""
SCAN = 64
"""How many waiting shards one search looks at, at most."""


class Board:
    """The truths and the indexes over them. `known`: rows of fresh shards that are quarantined already."""

    def __init__(self, num_shards: int, *, done: Iterable[int] = (), known: Known | None = None) -> None:
        self._known: dict[int, Sequence[Quarantined]] = {}
        # Truths.
        self.shards: dict[int, Shard] = {}
        self.workers: dict[int, Worker] = {}
        self.slots = Slots()  # with five derived values of its own
        self.done = bytearray(num_shards)
        # Cursors.
        self._cursor = 0  # every shard below it is no longer fresh
        self._sequence = 0  # shards that waited so far
        self._next_worker = 0
        # Derived: indexes.
        self.waiting: list[tuple[float, int, int]] = []  # heap of (not before, sequence, shard)
        self.reserved: dict[int, int] = {}  # shard -> worker
        self.single: dict[int, None] = {}  # shards with one attempt
        self.unproved: set[int] = set()  # shards with quarantines that are not announced yet
        self.idle: dict[int, None] = {}  # able workers without a running shard, in order
        self.loose: dict[int, None] = {}  # workers to settle, and some that need it no longer
        self.able: Counter[str] = Counter()  # able workers, by node
        # Derived: counts.
        self.left = self.fresh = num_shards  # shards neither done nor failed; fresh shards
        self.busy = 0  # shards with an attempt
        self.condemned = 0  # quarantined rows of shards that are neither done nor failed
        self.starting = 0  # workers that are not ready
        self.found(done, known or {})

    # Shards.

    @property
    def unassigned(self) -> int:
        """Shards that no worker has begun."""
        return self.fresh + len(self.waiting) + len(self.reserved)

    def has_work(self, now: float) -> bool:
        """Whether there is a shard that some worker may take now."""
        return bool(self.fresh or self.reserved or (self.waiting and self.waiting[0][0] <= now))

    def found(self, done: Iterable[int], known: Known) -> None:
        """Before the first attempt: these shards are done, and these rows of the others are quarantined."""
        assert not self.shards, "a shard was given out"
        for index in done:
            self.done[index] = 1
        self.left = self.fresh = self.done.count(0)
        self._known = dict(known)

    def take_fresh(self) -> Shard:
        """The first fresh shard; there must be one. It is the caller's to reserve or to assign."""
        index = self.done.find(0, self._cursor)
        self._cursor = index + 1
        self.fresh -= 1
        shard = self.shards[index] = Shard(index)
        for known in self._known.pop(index, ()):
            self.quarantine(shard, known, doubted=set())
        return shard

    def take_waiting(self, now: float, suits: Callable[[Shard], bool]) -> Shard | None:
        """The shard that has waited longest of those that may be tried now and suit."""
        passed: list[tuple[float, int, int]] = []
        found = None
        while self.waiting and self.waiting[0][0] <= now and len(passed) < SCAN:
            entry = heapq.heappop(self.waiting)
            shard = self.shards[entry[2]]
            if suits(shard):
                found = shard
                break
            passed.append(entry)
        for entry in passed:
            heapq.heappush(self.waiting, entry)
        return found

    def take_reserved(self, worker: Worker) -> Shard:
        """The shard that a worker reads ahead; there must be one."""
        assert worker.reserved is not None
        shard = self.shards[worker.reserved]
        del self.reserved[shard.index]
        worker.reserved = shard.reserved_by = None
        return shard

    def take_last_reserved(self) -> Shard:
        """The shard that was reserved last; there must be one."""
        index, owner = self.reserved.popitem()
        shard = self.shards[index]
        self.workers[owner].reserved = shard.reserved_by = None
        return shard

    def reserve(self, shard: Shard, worker: Worker) -> None:
        """Let a worker read this shard ahead."""
        worker.reserved, shard.reserved_by = shard.index, worker.id
        self.reserved[shard.index] = worker.id

    def wait(self, shard: Shard, not_before: float) -> None:
        """Let a shard wait for another attempt."""
        self._sequence += 1
        shard.not_before = not_before
        heapq.heappush(self.waiting, (not_before, self._sequence, shard.index))

    def commit(self, index: int) -> Shard | None:
        """A shard is done: its last state, with attempts that nobody needs now; None: it was done before."""
        shard = self.shards.pop(index, None)
        if shard is None:
            return None
        self.done[index] = 1
        self.left -= 1
        self.busy -= bool(shard.attempts)
        self.condemned -= len(shard.quarantined)
        self.single.pop(index, None)
        self.unproved.discard(index)
        return shard

    def fail(self, shard: Shard) -> None:
        """A shard without an attempt is given up."""
        shard.failed = True
        self.left -= 1
        self.condemned -= len(shard.quarantined)

    # Quarantined rows of a shard.

    def quarantine(self, shard: Shard, row: Quarantined, *, doubted: set[int]) -> None:
        """Later attempts skip a row. `doubted`: its witnesses, if it cannot be announced yet."""
        shard.quarantined[row.row_id] = row
        self.condemned += 1
        if doubted:
            shard.unproved[row.row_id] = doubted
            self.unproved.add(shard.index)

    def prove(self, shard: Shard, row: str) -> Quarantined:
        """A quarantine is no longer in doubt."""
        del shard.unproved[row]
        if not shard.unproved:
            self.unproved.discard(shard.index)
        return shard.quarantined[row]

    def lift(self, shard: Shard, row: str) -> None:
        """A quarantine in doubt is taken back."""
        self.prove(shard, row)
        del shard.quarantined[row]
        self.condemned -= 1

    # Attempts.

    def begin_attempt(self, shard: Shard, worker: Worker, now: float, *, isolated: bool) -> Attempt:
        """An idle worker takes a shard."""
        shard.num_attempts += 1
        attempt = Attempt(shard.index, shard.num_attempts, worker.id, now, now, isolated)
        shard.attempts.append(attempt)
        if len(shard.attempts) == 1:
            self.busy += 1
            self.single[shard.index] = None
        else:
            del self.single[shard.index]
        del self.idle[worker.id]
        worker.attempt = attempt
        return attempt

    def generated(self, worker: Worker, attempt: Attempt, now: float) -> None:
        """A worker's running attempt continues as a commit in the background, and the worker is free."""
        attempt.rows = ()
        worker.committing[attempt.shard] = attempt
        worker.flushing = False  # a flush before this does not cover it
        self._free(worker, now)

    def end_attempt(self, worker: Worker, attempt: Attempt, now: float) -> None:
        """Take an attempt off its worker and its shard."""
        if worker.attempt is attempt:
            self._free(worker, now)
        worker.committing.pop(attempt.shard, None)
        if not worker.committing:
            worker.flushing = False
            if worker.draining:
                self.loose[worker.id] = None
        self._detach(attempt)

    def _free(self, worker: Worker, now: float) -> None:
        worker.attempt = None
        worker.idle_since = now
        if worker.committing or worker.draining:
            self.loose[worker.id] = None
        if not worker.draining:
            self.idle[worker.id] = None

    def _detach(self, attempt: Attempt) -> None:
        shard = self.shards.get(attempt.shard)
        if shard is None or attempt not in shard.attempts:
            return
        shard.attempts.remove(attempt)
        if shard.attempts:
            self.single[attempt.shard] = None
        else:
            self.single.pop(attempt.shard, None)
            self.busy -= 1

    # Workers.

    def add_worker(self, slot: Slot, now: float) -> Worker:
        """A worker is asked for, in a slot that `take_vacancy` returned."""
        worker = Worker(self._next_worker, slot.id, idle_since=now)
        self._next_worker += 1
        self.starting += 1
        self.workers[worker.id] = worker
        slot.worker = worker.id
        return worker

    def ready(self, worker: Worker, node: str, now: float) -> None:
        """A worker has its model."""
        self.starting -= 1
        worker.node = self.slots[worker.slot].node = node
        worker.idle_since = now
        if not worker.draining:
            self.able[node] += 1
            self.idle[worker.id] = None

    def drain(self, worker: Worker) -> None:
        """A worker takes no more shards."""
        self._unable(worker)
        worker.draining = True
        self.loose[worker.id] = None
        self.idle.pop(worker.id, None)
        self._release(worker)

    def remove(self, worker: Worker, now: float) -> None:
        """A worker is gone and its commits in the background are lost; its running shard is the caller's."""
        self._release(worker)
        if worker.attempt is not None:
            self._detach(worker.attempt)
        for attempt in worker.committing.values():
            self._detach(attempt)
            shard = self.shards.get(attempt.shard)
            if shard is not None:
                shard.losses += 1
                if not shard.attempts:
                    self.wait(shard, now)
        worker.committing = {}
        self._unable(worker)
        del self.workers[worker.id]
        self.idle.pop(worker.id, None)
        self.loose.pop(worker.id, None)
        self.starting -= worker.node is None
        slot = self.slots[worker.slot]
        slot.worker = None
        slot.not_before = now
        if not slot.retired:
            self.slots.vacate(slot)

    def take_loose(self) -> list[Worker]:
        """The workers to settle, each once."""
        loose, self.loose = self.loose, {}
        return [self.workers[number] for number in loose]

    def _release(self, worker: Worker) -> None:
        if worker.reserved is not None:
            self.wait(self.take_reserved(worker), 0.0)

    def _unable(self, worker: Worker) -> None:
        if worker.node is None or worker.draining:
            return
        self.able[worker.node] -= 1
        if not self.able[worker.node]:
            del self.able[worker.node]

    # The proof.

    def check(self) -> None:
        """Assert that every derived value is what the truths make it. For tests: it looks at all shards."""
        slots = self.slots
        assert_consistent(self.shards, self.workers, slots, self.done)
        expected = derived(self.shards, self.workers, slots, self.done)
        actual = {
            "waiting": sorted((not_before, index) for not_before, _, index in self.waiting),
            "reserved": self.reserved,
            "single": set(self.single),
            "unproved": self.unproved,
            "idle": set(self.idle),
            "loose": {n for n in self.loose if n not in self.workers or self.workers[n].unsettled},
            "able": self.able,
            "vacant": slots.vacant,
            "vacancies": {
                (t, n) for t, n in slots.vacancies if n in slots.vacant and slots[n].not_before == t
            },
            "closed": sorted(slots.closed),
            "avoid": slots.avoid,
            "left": self.left,
            "fresh": self.fresh,
            "busy": self.busy,
            "condemned": self.condemned,
            "starting": self.starting,
            "open": slots.open,
        }
        assert actual.keys() == expected.keys()
        for name, value in actual.items():
            assert value == expected[name], f"{name} is {value}, and by the truths {expected[name]}"
        assert self.fresh == self.done.count(0, self._cursor), "a shard below the cursor is fresh"
