"""The numbers of a run: rows, rejects, shards, retries, lost workers. Knows events and actions, no Ray.

tally = Tally(work, finished=folder.finished(work))
tally.record(event)                                  # what happened, or an action that was executed
on_event(tally.snapshot(dispatcher))
"""

from __future__ import annotations

from array import array
from collections import Counter
from typing import TYPE_CHECKING

from overtone.cluster.dispatch import (
    Action,
    Assign,
    Dispatcher,
    Event,
    Retry,
    RowsDone,
    ShardCommitted,
    StopWorker,
    WorkerDied,
    WorkerReady,
)
from overtone.jobs.plan import Work
from overtone.jobs.shard_set import ShardSet
from overtone.jobs.status import Snapshot

if TYPE_CHECKING:
    from overtone.cluster.metrics import JobMetrics


class Tally:
    """What one run has counted so far. Of a retry, shards and rows are the retry's own."""

    def __init__(self, work: Work, finished: ShardSet, *, unit: str = "row") -> None:
        """`finished`: shards of the work that earlier runs committed; it grows with those of this run.
        `unit`: what a row of the input is called."""
        self.work, self.finished, self._unit = work, finished, unit
        self.rows = self.rejects = 0  # of parts that this run committed
        self.reasons: Counter[str] = Counter()  # the rejects by error class
        self._rows_of = array("I", bytes(4 * finished.num_shards))  # rows of such a part, by shard
        self._reasons_of: dict[int, Counter[str]] = {}  # the rejects of such a part, where it has any
        self.retries = 0  # shards that were given out again
        self.lost = 0  # workers that died or were killed
        self._rows_finished = sum(map(work.rows_of, finished))
        self._in_hand: dict[int, int] = {}  # input rows made of shards that are not committed, at most
        self._ready: set[int] = set()  # workers that had their engine at some time

    def found(self, finished: ShardSet) -> list[int]:
        """These shards are the ones that are finished, whatever was reported. Returns those that workers
        reported all the same; their rows count no more."""
        absent = [shard for shard in self.finished if shard not in finished]
        for shard in absent:
            reasons = self._reasons_of.pop(shard, Counter())
            self.rows -= self._rows_of[shard]
            self.rejects -= reasons.total()
            self.reasons -= reasons
            self._rows_of[shard] = 0
        self.finished = finished
        self._rows_finished = sum(map(self.work.rows_of, finished))
        return absent

    def record(self, news: Event | Action) -> None:
        """Count what an event, or an action that the driver executes, changes."""
        match news:
            case WorkerReady():
                self._ready.add(news.worker)
            case Assign():
                self._in_hand.pop(news.assignment.shard, None)
            case RowsDone():
                made = self._in_hand.get(news.shard, 0) + len(news.rows)
                self._in_hand[news.shard] = min(made, self.work.rows_of(news.shard))
            case ShardCommitted():
                self._in_hand.pop(news.shard, None)
                if news.shard not in self.finished:
                    self.finished.add(news.shard)
                    self._rows_finished += self.work.rows_of(news.shard)
                    self.rows += news.rows - news.rejects
                    self.rejects += news.rejects
                    self.reasons.update(dict(news.reasons))
                    self._rows_of[news.shard] = news.rows - news.rejects
                    if news.rejects:
                        self._reasons_of[news.shard] = Counter(dict(news.reasons))
            case Retry():
                self.retries += 1
            case WorkerDied():
                self.lost += 1
            case StopWorker():
                self.lost += news.kill and news.worker in self._ready

    def snapshot(self, dispatcher: Dispatcher, note: str | None = None) -> Snapshot:
        """How far the run is, for people; `note` is something worth a line of its own."""
        done = self._rows_finished + sum(self._in_hand.values())
        return Snapshot(
            rows_total=self.work.num_rows,
            rows_done=min(done, self.work.num_rows),
            rows_rejected=self.rejects,
            shards_total=self.work.num_shards,
            shards_done=len(self.finished),
            workers_ready=dispatcher.ready,
            workers_starting=dispatcher.starting,
            retries=self.retries,
            note=note,
            unit=self._unit,
        )

    def show(self, metrics: JobMetrics, dispatcher: Dispatcher) -> None:
        """The same for Prometheus."""
        running = dispatcher.busy
        metrics.show(
            rows=self.rows,
            rejects=self.reasons,
            retries=self.retries,
            workers_lost=self.lost,
            shards={
                "waiting": dispatcher.left - running,
                "running": running,
                "done": len(self.finished),
            },
            workers={"ready": dispatcher.ready, "starting": dispatcher.starting},
        )
