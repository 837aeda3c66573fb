"""Which workers there are: who is started, settled, given back or killed. Charges nobody itself."""

from __future__ import annotations

from overtone.cluster.dispatch.blame import worker_died
from overtone.cluster.dispatch.board import Board
from overtone.cluster.dispatch.messages import Action, Flush, Rules, StartWorker, StopWorker, WorkerDied
from overtone.cluster.dispatch.tally import Tally


def staff(board: Board, rules: Rules, now: float) -> list[Action]:
    """Start workers for the shards that nobody has."""
    slots = board.slots
    wanted = min(rules.max_workers, board.left)
    while slots.open < wanted and slots.closed and board.unassigned:
        slots.reopen()
    while slots.open < wanted and len(slots) < rules.max_workers:
        slots.add()
    actions: list[Action] = []
    missing = board.unassigned - board.starting - len(board.idle)
    while missing > 0 and (slot := slots.take_vacancy(now)) is not None:
        missing -= 1
        worker = board.add_worker(slot, now)
        actions.append(StartWorker(worker.id, slot.id, slots.avoid))
    return actions


def settle(board: Board, now: float) -> list[Action]:
    """Wait for the commits of workers without a shard, and let those go whose machine goes."""
    actions: list[Action] = []
    for worker in board.take_loose():
        if worker.attempt is not None:
            continue  # it comes here again when that ends
        if worker.committing and not worker.flushing:
            worker.flushing = True
            actions.append(Flush(worker.id))
        if worker.draining and not worker.committing:
            kill = worker.node is None
            actions.append(StopWorker(worker.id, kill=kill, reason="its machine is going away"))
            board.remove(worker, now)
    return actions


def give_back(board: Board, rules: Rules, now: float) -> list[Action]:
    """Let workers go that found no shard for a while, and close their slots."""
    actions: list[Action] = []
    if board.unassigned:
        return actions
    for worker in list(board.workers.values()):
        if len(board.workers) <= rules.min_workers:
            break
        at_work = worker.attempt is not None or worker.committing
        if not at_work and now - worker.idle_since > rules.idle_s:
            reason = "no more work" if worker.node else "no more work before it was ready"
            actions.append(StopWorker(worker.id, kill=worker.node is None, reason=reason))
            board.remove(worker, now)
            board.slots.close(board.slots[worker.slot])
    return actions


def kill_silent(board: Board, tally: Tally, rules: Rules, now: float) -> list[Action]:
    """A worker that has been silent too long is killed, and its rows are charged as if it had died."""
    actions: list[Action] = []
    limit = rules.silence_s
    if limit is None or now - tally.quiet_since <= limit:
        return actions
    tally.quiet_since = now
    for worker in list(board.workers.values()):
        attempt = worker.attempt or next(iter(worker.committing.values()), None)
        if attempt is not None and now - attempt.heard > limit:
            text = f"no sign of life for {limit:g} s, killed"
            actions.append(StopWorker(worker.id, kill=True, reason=text))
            event = WorkerDied(worker.id, text, "RowTimeout")
            actions += worker_died(board, tally, rules, worker, event, now)
        elif attempt is not None:
            others = (other.heard for other in worker.committing.values())
            tally.quiet_since = min(tally.quiet_since, attempt.heard, *others)
    return actions
