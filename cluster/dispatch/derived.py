"""What the truths of a board imply: the 17 derived values, computed anew from them alone. Knows no Board.

This is slow and obvious, so that `Board.check` can compare what the Board keeps up with every event against
it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from overtone.cluster.dispatch.records import Shard, Worker
from overtone.cluster.dispatch.slots import Slot


def derived(
    shards: Mapping[int, Shard], workers: Mapping[int, Worker], slots: Sequence[Slot], done: bytearray
) -> dict[str, object]:
    """Every derived value by its name in Board or Slots, without the order that only the past explains."""
    alive = [shard for shard in shards.values() if not shard.failed]
    waiting = [shard for shard in alive if not shard.attempts and shard.reserved_by is None]
    able = [worker for worker in workers.values() if worker.able]
    open_slots = [slot for slot in slots if not slot.retired and not slot.closed]
    vacant = [slot for slot in open_slots if slot.worker is None]
    return {
        # Shards.
        "waiting": sorted((shard.not_before, shard.index) for shard in waiting),
        "reserved": {shard.index: shard.reserved_by for shard in alive if shard.reserved_by is not None},
        "single": {shard.index for shard in alive if len(shard.attempts) == 1},
        "unproved": {shard.index for shard in shards.values() if shard.unproved},
        "left": done.count(0) - (len(shards) - len(alive)),
        "fresh": done.count(0) - len(shards),
        "busy": sum(bool(shard.attempts) for shard in alive),
        "condemned": sum(len(shard.quarantined) for shard in alive),
        # Workers.
        "idle": {worker.id for worker in able if worker.attempt is None},
        "loose": {worker.id for worker in workers.values() if worker.unsettled},
        "able": Counter(worker.node for worker in able),
        "starting": sum(worker.node is None for worker in workers.values()),
        # Slots.
        "open": len(open_slots),
        "vacant": {slot.id for slot in vacant},
        "vacancies": {(slot.not_before, slot.id) for slot in vacant},
        "closed": sorted(slot.id for slot in slots if slot.closed),
        "avoid": frozenset(slot.node for slot in slots if slot.retired and slot.node is not None),
    }


def assert_consistent(
    shards: Mapping[int, Shard], workers: Mapping[int, Worker], slots: Sequence[Slot], done: bytearray
) -> None:
    """Assert that the truths agree with each other: what two records say of one fact is the same."""
    for index, shard in shards.items():
        assert shard.index == index
        assert not done[index], f"shard {index} is done and still has an object"
        assert len(shard.attempts) <= 2
        assert not shard.failed or not shard.attempts
        assert shard.unproved.keys() <= shard.quarantined.keys()
        assert not shard.suspects.keys() & shard.quarantined.keys()
        if shard.reserved_by is not None:
            assert not shard.attempts
            assert workers[shard.reserved_by].reserved == index
        for attempt in shard.attempts:
            assert workers[attempt.worker].attempt_at(index, attempt.number) is attempt
    for number, worker in workers.items():
        assert worker.id == number
        assert slots[worker.slot].worker == number
        if worker.reserved is not None:
            assert shards[worker.reserved].reserved_by == number
        for held in [worker.attempt, *worker.committing.values()]:
            # The shard of an attempt that nobody needs is done; any other knows its attempts.
            assert held is None or done[held.shard] or held in shards[held.shard].attempts
    for number, slot in enumerate(slots):
        assert slot.id == number
        assert slot.worker is None or workers[slot.worker].slot == number
        assert slot.worker is None or not (slot.retired or slot.closed)
