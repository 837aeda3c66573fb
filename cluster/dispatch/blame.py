"""Who is to blame for a failure: the row, the shard, the slot or nobody. Knows no Ray and no other rule.

A worker names the rows it has in flight. When it dies they become suspects, and the next attempt runs
suspects first and alone; after two such deaths, or one with nothing in flight, a shard runs every row alone.
A row that was alone in flight at `row_deaths` deaths, on different nodes where there are several, is
quarantined: later attempts skip it and it ends as a reject. A death with nothing in flight is charged to the
shard. `max_attempts` charges fail a shard; the other shards continue, and the job ends as failed when they
are done. Preemption and lost nodes are charged to nobody. Neither is memory that others held: the slot's next
process waits a little longer each time, and only a shard that meets it very often is charged.

A slot whose processes fail `worker_failures` times without making a row in between is retired and its node
avoided, and what it charged to rows and shards is taken back, because the machine was to blame. A quarantine
is therefore announced (to be kept for good) only when one of the slots that witnessed it has shown that it
can make rows, or when two slots witnessed it.
"""

from __future__ import annotations

from overtone.cluster.dispatch.board import Board
from overtone.cluster.dispatch.messages import (
    Abort,
    Action,
    FailShard,
    Quarantine,
    RetireSlot,
    Retry,
    Rules,
    StopWorker,
    WorkerDied,
)
from overtone.cluster.dispatch.records import Attempt, Death, Shard, Worker
from overtone.cluster.dispatch.slots import Slot
from overtone.cluster.dispatch.tally import Tally
from overtone.cluster.faults import Failure, Verdict
from overtone.jobs.rows import Quarantined


def worker_died(
    board: Board, tally: Tally, rules: Rules, worker: Worker, event: WorkerDied, now: float
) -> list[Action]:
    """A process is gone: its rows or shard and its slot are charged, unless its machine was taken away."""
    actions: list[Action] = []
    slot, attempt = board.slots[worker.slot], worker.attempt
    board.remove(worker, now)
    shard = board.shards.get(attempt.shard) if attempt is not None else None
    preempted = event.preempted or worker.draining or event.squeezed
    starting = worker.node is None
    if attempt is not None and shard is not None:
        if not preempted:
            slot.failures.append(frozenset(attempt.rows))
            where = (slot.id, worker.node, attempt.rows)
            death = Death(*where, event.error_class, event.message, died=True)
            actions += charge_rows(board, rules, shard, death)
        elif event.squeezed:
            shard.squeezed += 1
            if shard.squeezed > rules.max_squeezes:
                shard.deaths.append(Death(slot.id, worker.node, (), event.error_class, event.message))
        at_once = preempted or bool(attempt.rows)
        actions += try_again(board, tally, rules, shard, event.message, now, at_once=at_once)
    elif starting and not preempted:
        slot.failures.append(frozenset())
    if not preempted:
        actions += charge_slot(board, tally, rules, slot, event.message, now)
    elif event.squeezed:
        slot.squeezed += 1
        board.slots.pause(slot, now + pause_s(rules, slot.squeezed))
    return actions


def start_failed(
    board: Board, tally: Tally, rules: Rules, worker: Worker, failure: Failure, now: float
) -> list[Action]:
    """A worker could not start: its slot is charged, or the job ends because no worker could. Where one could
    before, the fault is not in what all have in common."""
    text = text_of(failure)
    could = any(slot.node is not None for slot in board.slots)
    if failure.verdict is Verdict.FAIL_JOB and not could:
        return [Abort("failure", text, failure)]
    slot = board.slots[worker.slot]
    board.remove(worker, now)
    slot.failures.append(frozenset())
    return charge_slot(board, tally, rules, slot, text, now)


def attempt_failed(
    board: Board, tally: Tally, rules: Rules, worker: Worker, attempt: Attempt, failure: Failure, now: float
) -> list[Action]:
    """An attempt ended with an exception: its verdict says who is charged."""
    shard = board.shards.get(attempt.shard)
    text = text_of(failure)
    if shard is None:  # nobody needs it any more, whatever it met
        board.end_attempt(worker, attempt, now)
        return []
    if failure.verdict is Verdict.FAIL_JOB:
        return [Abort("failure", text, failure)]
    if failure.verdict is Verdict.REPLACE_WORKER:
        event = WorkerDied(worker.id, text, failure.error_class)
        stop = StopWorker(worker.id, kill=True, reason=text)
        return [stop, *worker_died(board, tally, rules, worker, event, now)]
    slot = board.slots[worker.slot]
    board.end_attempt(worker, attempt, now)
    shard.deaths.append(Death(slot.id, worker.node, (), failure.error_class, text))
    slot.failures.append(frozenset())
    again = try_again(board, tally, rules, shard, text, now)
    return again + charge_slot(board, tally, rules, slot, text, now)


def rows_made(board: Board, worker: Worker) -> list[Action]:
    """A worker made rows: its slot's failures are forgotten, and the first time its testimony is believed."""
    slot = board.slots[worker.slot]
    slot.failures.clear()
    slot.squeezed = 0
    slot.refunded = False
    if slot.proved:
        return []
    slot.proved = True
    actions: list[Action] = []
    for shard in [board.shards[index] for index in board.unproved]:
        for row in [row for row, slots in shard.unproved.items() if slot.id in slots]:
            actions.append(Quarantine(board.prove(shard, row)))
    return actions


def charge_rows(board: Board, rules: Rules, shard: Shard, death: Death) -> list[Action]:
    """Rows in flight at a death become suspects; one that was alone in flight often enough is quarantined."""
    shard.deaths.append(death)
    for row in death.rows:
        if row not in shard.quarantined:
            shard.suspects[row] = None
    if len(death.rows) != 1:
        return []
    [row] = death.rows
    deaths = shard.deaths_of(row)
    nodes = {d.node for d in deaths}
    wanted = min(rules.row_deaths, len(nodes | board.able.keys()))
    if len(deaths) < rules.row_deaths:
        return []
    if len(nodes) < wanted and len(deaths) < 3 * rules.row_deaths:
        return []
    slots = {d.slot for d in deaths}
    believed = len(slots) > 1 or any(board.slots[slot].proved for slot in slots)
    shard.suspects.pop(row, None)
    quarantined = Quarantined(shard.index, row, death.error_class, death.message, len(deaths))
    board.quarantine(shard, quarantined, doubted=set() if believed else slots)
    for slot in map(board.slots.__getitem__, slots):
        # The row explains these failures; but a slot that never made a row is believed only once.
        if slot.proved or not slot.refunded:
            slot.refunded = True
            slot.failures = [rows for rows in slot.failures if row not in rows]
    return [Quarantine(quarantined)] if believed else []


def charge_slot(
    board: Board, tally: Tally, rules: Rules, slot: Slot, message: str, now: float
) -> list[Action]:
    """After a failure: when the slot's next process starts, or whether it gets none."""
    board.slots.pause(slot, now + pause_s(rules, len(slot.failures)))
    if len(slot.failures) < rules.worker_failures or slot.retired:
        return []
    common = frozenset.intersection(*slot.failures)
    if any(row in shard.suspects for shard in board.shards.values() for row in common):
        return []  # one row explains them all, and is about to be decided
    return retire(board, tally, slot, message, now)


def retire(board: Board, tally: Tally, slot: Slot, message: str, now: float) -> list[Action]:
    """Give a slot up, and take back what it charged to rows and shards."""
    actions: list[Action] = []
    board.slots.retire(slot)
    if slot.worker is not None:
        worker = board.workers[slot.worker]
        actions.append(StopWorker(worker.id, kill=True, reason=message))
        attempt = worker.attempt  # where a commit in the background failed, it runs another shard
        board.remove(worker, now)
        shard = board.shards.get(attempt.shard) if attempt is not None else None
        if shard is not None and not shard.attempts:
            board.wait(shard, now)
    retirement = RetireSlot(slot.id, slot.node, len(slot.failures), message)
    tally.retirements.append(retirement)
    actions.append(retirement)
    for shard in board.shards.values():
        if shard.failed:
            continue  # nothing will be tried again, and its rows are counted as rejects already
        shard.deaths = [death for death in shard.deaths if death.slot != slot.id]
        for row in [row for row, slots in shard.unproved.items() if slot.id in slots]:
            acquit(board, shard, row)
    return actions


def acquit(board: Board, shard: Shard, row: str) -> None:
    """Take back a quarantine that only doubtful slots witnessed: the row is a suspect again."""
    board.lift(shard, row)
    shard.suspects[row] = None


def try_again(
    board: Board,
    tally: Tally,
    rules: Rules,
    shard: Shard,
    message: str,
    now: float,
    *,
    at_once: bool = False,
) -> list[Action]:
    """Another attempt at a shard that has none now, or its end if it had all of them."""
    if shard.attempts:
        return []
    if shard.charged < rules.max_attempts:
        board.wait(shard, now if at_once else now + pause_s(rules, shard.charged))
        return [Retry(shard.index, message)]
    failed = FailShard(shard.index, message)
    board.fail(shard)
    tally.add_failed(failed)
    return [failed]


def pause_s(rules: Rules, failures: int) -> float:
    """Seconds before the next attempt after so many failures."""
    if failures < 1:
        return 0.0
    return min(rules.backoff_s * 2.0 ** min(failures - 1, 32), rules.backoff_max_s)


def text_of(failure: Failure) -> str:
    """A failure on one line."""
    return f"{failure.phase}: {failure.error_class}: {failure.message}"
