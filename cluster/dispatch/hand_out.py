"""Which idle worker takes which shard next. Knows nothing of failures but where a shard met them.

A waiting shard comes first, then the one that the worker reads ahead, then a fresh one. When no shard is
fresh, a worker with nothing to do takes one that another worker only reads ahead. When there is none of these
either, idle workers make second attempts at shards that take long.
"""

from __future__ import annotations

import heapq

from overtone.cluster.dispatch.blame import acquit
from overtone.cluster.dispatch.board import Board
from overtone.cluster.dispatch.messages import Action, Assign, Assignment, Rules
from overtone.cluster.dispatch.records import Shard, Worker
from overtone.cluster.dispatch.tally import Tally


def fill(board: Board, tally: Tally, rules: Rules, now: float, *, copies: bool = False) -> list[Action]:
    """Give idle workers something to do. `copies`: also second attempts, where no other work is left."""
    actions: list[Action] = []
    if not board.idle:
        return actions
    if board.has_work(now):
        for number in list(board.idle):
            worker = board.workers[number]
            shard = next_shard(board, worker, now)
            if shard is not None:
                actions.append(assign(board, worker, shard, now))
            elif not board.has_work(now):
                break
    if copies and board.idle and tally.timed:
        actions += copy_late(board, tally, rules, now)
    return actions


def next_shard(board: Board, worker: Worker, now: float) -> Shard | None:
    """The shard for an idle worker; None: it waits."""
    shard = board.take_waiting(now, lambda waiting: suits(board, waiting, worker))
    if shard is not None:
        return shard
    if worker.reserved is None and not board.fresh and board.reserved:
        return board.take_last_reserved()  # its owner has the most to do
    if worker.reserved is not None:
        return board.take_reserved(worker)
    return board.take_fresh() if board.fresh else None


def suits(board: Board, shard: Shard, worker: Worker) -> bool:
    """Whether a worker may take a shard: not where it died before, while a worker elsewhere could."""
    if not shard.deaths:
        return True
    nodes = {death.node for death in shard.deaths}
    if worker.node not in nodes:
        return True
    if any(node not in nodes for node in board.able):
        return False
    slots = {death.slot for death in shard.deaths}
    return worker.slot not in slots or board.able.total() == sum(is_able(board, slot) for slot in slots)


def is_able(board: Board, slot: int) -> bool:
    """Whether a worker is in this slot that takes shards."""
    number = board.slots[slot].worker
    return number is not None and board.workers[number].able


def assign(board: Board, worker: Worker, shard: Shard, now: float) -> Assign:
    """Let an idle worker attempt a shard, and reserve a fresh one for it to read ahead."""
    for row in [row for row, slots in shard.unproved.items() if worker.slot not in slots]:
        acquit(board, shard, row)  # another witness is to be had
    isolated = bool(shard.suspects) or shard.isolate
    attempt = board.begin_attempt(shard, worker, now, isolated=isolated)
    if worker.reserved is None and board.fresh > len(board.workers) and not isolated:
        board.reserve(board.take_fresh(), worker)
    alone = isolated or shard.losses > 0
    assignment = Assignment(
        shard=shard.index,
        attempt=attempt.number,
        suspects=tuple(shard.suspects),
        isolate=shard.isolate,
        quarantined=tuple(shard.quarantined.values()),
        read_ahead=None if alone else worker.reserved,
        commit_first=alone or worker.reserved is None,
    )
    return Assign(worker.id, assignment)


def copy_late(board: Board, tally: Tally, rules: Rules, now: float) -> list[Action]:
    """Idle workers make second attempts at shards that take long, the oldest first."""
    since = now - rules.copy_after * tally.timed_s / tally.timed
    late = []
    for index in board.single:
        shard = board.shards[index]
        attempt = shard.attempts[0]
        if attempt.started < since and not attempt.isolated and not shard.suspects:
            late.append((attempt.started, index))
    actions: list[Action] = []
    for _, index in heapq.nsmallest(len(board.idle), late):
        shard = board.shards[index]
        # A worker does not copy a shard whose commit it has in the background itself.
        worker = next((number for number in board.idle if number != shard.attempts[0].worker), None)
        if worker is not None:
            actions.append(assign(board, board.workers[worker], shard, now))
    return actions
