"""What the parts, timings and rejects of a job add up to, and how fast it goes. Asks no store itself."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import pyarrow as pa

from overtone.jobs.parts import timings_name, timings_place
from overtone.jobs.status.state import RejectSeen, WorkerSeen
from overtone.jobs.status.tables import NEWEST, Names, Tables
from overtone.jobs.store import Store

_RATE_OVER_S = 600.0
_RATE_PARTS = 20
_STALLED_AFTER = 4.0  # times the usual pause between two parts
_COPIED_S = 600.0  # more than clocks differ
_TIMES_COLUMNS = ["stage", "rows", "seconds", "truncated", "start", "worker", "device", "node"]
REJECT_COLUMNS = ["source", "row_id", "error_class", "message"]
_Worker = tuple[str, str, str]


class PartSums:
    """What the parts of a job, or of a retry, add up to. A look asks nothing about parts that were known
    before.

    `pace` receives when each part was committed; several sums may share one.
    """

    def __init__(self, names: Names, rows_of: Callable[[int], int], pace: Pace) -> None:
        self.names, self._rows_of, self._pace = names, rows_of, pace
        self.rows = 0
        """Input rows that the parts cover."""
        self.size_bytes = 0

    @property
    def num_parts(self) -> int:
        return len(self.names.found)

    def look(self) -> None:
        """Add the parts that are new."""
        committed = []
        for shard, before in self.names.look().items():
            info, rows = self.names.found[shard], self._rows_of(shard)
            if before is None:
                self.rows += rows
            else:  # somebody deleted a part, and the job made it again
                self.size_bytes -= before.size_bytes
                self._pace.forget(before.modified_s, rows)
            self.size_bytes += info.size_bytes
            committed.append((info.modified_s, rows))
        self._pace.add(committed)


class Pace:
    """When rows were committed, and how fast that goes."""

    def __init__(self) -> None:
        self._committed: list[tuple[float, int]] = []  # in order of time
        self._looked: tuple[float, float] | None = None  # when `recent` was called last, the newest part then
        self._behind_s = 0.0  # the store's clock behind ours, as far as parts that appeared have shown

    def add(self, parts: Iterable[tuple[float | None, int]]) -> None:
        """Parts by the time of their commit, in seconds since 1970 (None: not known), and their rows."""
        for at, rows in sorted((at, rows) for at, rows in parts if at is not None):
            insort(self._committed, (at, rows))

    def forget(self, at: float | None, rows: int) -> None:
        """Take out a part that was added."""
        if at is not None:
            self._committed.remove((at, rows))

    def recent(self, *, since: float | None, now: float) -> tuple[float | None, float | None, bool]:
        """(rows a second over the last minutes of work, seconds since the last part, whether more parts are
        to be expected).

        Only the parts of the newest driver's workers count, from its beginning at `since`. The time in which
        nobody worked does not count.
        """
        committed, time_of = self._committed, itemgetter(0)
        if not committed:
            return None, None, False
        newest = committed[-1][0]
        last_part_s = max(0.0, now - newest - self._behind(newest, now))
        if since is None:  # the first part's rows were made before the time that is known
            since = committed[0][0]
        first = bisect_right(committed, since, key=time_of)  # the first part of the newest driver
        if first == len(committed):
            return None, last_part_s, False
        begin = max(since, newest - _RATE_OVER_S)
        counted = bisect_right(committed, begin, key=time_of)
        if len(committed) - counted < _RATE_PARTS:
            counted = max(first, len(committed) - _RATE_PARTS)
            begin = committed[counted - 1][0] if counted > first else since
        took = newest - begin
        if took <= 0:
            return None, last_part_s, False
        usual_pause_s = took / (len(committed) - counted)
        rate = sum(rows for _, rows in committed[counted:]) / took
        return rate, last_part_s, last_part_s < 60 + _STALLED_AFTER * usual_pause_s

    def _behind(self, newest: float, now: float) -> float:
        """Seconds that the store's clock is behind: at least so many that a part that appeared since the last
        look is no older than that look, and at most so many that none is of the future."""
        if self._looked is not None and self._looked[1] < newest:
            self._behind_s = max(self._behind_s, self._looked[0] - newest)
        self._looked = (now, newest)
        self._behind_s = min(self._behind_s, now - newest)
        return self._behind_s


def times_of(store: Store, num_shards: int, retry: int = 0) -> Tables:
    """The timings of a job, or of a retry, to be looked at."""

    def index_of(key: str) -> int | None:
        place = timings_place(num_shards, key)
        return place[0] if place is not None and place[1] == retry else None

    names = Names(store, "timings/", index_of, lambda shard: timings_name(num_shards, shard, retry))
    return Tables(store, names, _times, _TIMES_COLUMNS, {"truncated": pa.int32()})


@dataclass(frozen=True, slots=True)
class _Times:
    """What the timings of a shard add up to."""

    seconds_by_stage: dict[str, float]
    workers: dict[_Worker, tuple[int, float]]
    """Rows and seconds of each (worker, device, node)."""
    truncated: int | None
    """Rows whose prompt was cut; None: not known."""
    ended: float | None
    """When its last stage ended, by the worker's clock, in seconds since 1970."""


def _times(table: pa.Table) -> _Times:
    seconds: defaultdict[str, float] = defaultdict(float)
    rows_of: Counter[_Worker] = Counter()
    seconds_of: defaultdict[_Worker, float] = defaultdict(float)
    cut: list[int] = []
    ended: list[float] = []
    for stage, rows, took, truncated, start, *who in zip(*table.to_pydict().values(), strict=True):
        worker = (who[0], who[1], who[2])
        seconds[stage] += took
        seconds_of[worker] += took
        rows_of[worker] += rows if stage == "part_write" else 0
        cut += [] if truncated is None else [truncated]
        ended += [] if start is None else [start.timestamp() + took]
    workers = {worker: (rows_of[worker], seconds_of[worker]) for worker in seconds_of}
    return _Times(dict(seconds), workers, sum(cut) if cut else None, max(ended, default=None))


def sum_times(runs: Sequence[Tables]) -> tuple[dict[str, float], tuple[WorkerSeen, ...]]:
    """(seconds by stage, each worker's share) over the timings of a job and its retries."""
    seconds: defaultdict[str, float] = defaultdict(float)
    worked: defaultdict[_Worker, list[tuple[float, float, float]]] = defaultdict(list)
    for tables in runs:
        weight = tables.weight
        for times in tables.digests(tables.chosen):
            for stage, took in times.seconds_by_stage.items():
                seconds[stage] += weight * took
            for worker, (rows, took) in times.workers.items():
                worked[worker].append((weight, weight * rows, weight * took))
    workers = tuple(
        WorkerSeen(*who, parts=round(parts), rows=round(rows), seconds=took)
        for who, shares in sorted(worked.items())
        for parts, rows, took in [map(sum, zip(*shares, strict=True))]
    )
    return dict(seconds), workers


def copied_from(runs: Sequence[Tables]) -> float | None:
    """When the last part was made, where the folder is a copy: there the times of its objects are those of
    the copying, and no pace follows from them. None: it is no copy, as far as the workers' own times tell."""
    late, ends = [], []
    for tables in runs:
        for shard in {*tables.chosen, *tables.newest}:
            modified_s = tables.names.found[shard].modified_s
            for times in tables.digests([shard]):
                if times.ended is not None and modified_s is not None:
                    late.append(modified_s - times.ended)
                    ends.append(times.ended)
    return max(ends) if late and min(late) > _COPIED_S else None


def sum_truncated(runs: Sequence[Tables]) -> int | None:
    """How many rows' prompts were cut, over the timings of a job and its retries; None: not known."""
    counts = [
        tables.weight * times.truncated
        for tables in runs
        for times in tables.digests(tables.chosen)
        if times.truncated is not None
    ]
    return round(sum(counts)) if counts else None


@dataclass(frozen=True, slots=True)
class _Rejected:
    """What the rejects of a shard add up to."""

    input_rows: int
    classes: Counter[str]
    last: tuple[RejectSeen, ...]


def rejected_of(table: pa.Table) -> _Rejected:
    """The digest of a shard's rejects."""
    last = table.slice(max(0, table.num_rows - NEWEST)).to_pylist()
    return _Rejected(
        len(set(table["source"].to_pylist())),
        Counter(table["error_class"].to_pylist()),
        tuple(RejectSeen(row["row_id"], row["error_class"], row["message"]) for row in last),
    )


def sum_rejects(tables: Tables) -> tuple[int, dict[str, int]]:
    """(rejected input rows, rejected samples by error class)."""
    weight, classes, rows = tables.weight, Counter[str](), 0
    for rejected in tables.digests(tables.chosen):
        classes += rejected.classes
        rows += rejected.input_rows
    return round(weight * rows), {name: round(weight * count) for name, count in sorted(classes.items())}


def newest_rejects(tables: Tables) -> tuple[RejectSeen, ...]:
    """A few rejects, the last one first."""
    rejects = [reject for rejected in tables.digests(tables.newest) for reject in reversed(rejected.last)]
    return tuple(rejects[:NEWEST])
