"""TODO: jobs/status/sums.py."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from overtone.jobs.parts import timings_name, timings_place
from overtone.jobs.status.state import RejectSeen, WorkerSeen
from overtone.jobs.store import NoSuchObject, ObjectInfo, Store
from overtone.jobs.tables import table_of

_MAX_TABLES = 2000
"""Timings and rejects that are read, of each; where there are more, evenly chosen ones speak for all."""
_READERS = 16
_NEWEST_REJECTS = 5
_RATE_OVER_S = 600.0
_RATE_PARTS = 20
_STALLED_AFTER = 4.0  # times the usual pause between two parts


class Names:
    """The objects of shards under a prefix, by shard. Names sort like shards, and none goes away."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        index_of: Callable[[str], int | None],
        name_of: Callable[[int], str],
    ) -> None:
        self._store, self._prefix, self._index_of, self._name_of = store, prefix, index_of, name_of
        self.found: dict[int, ObjectInfo] = {}
        self.first_missing = 0

    def look(self, first: int | None = None) -> dict[int, ObjectInfo]:
        """All that is there; asks for shards from `first` on, None: from the first that was missing."""
        first = self.first_missing if first is None else first
        after = self._name_of(first - 1) if first else ""
        for info in self._store.list(self._prefix, after=after):
            index = self._index_of(info.key)
            if index is not None:
                self.found[index] = info
        while self.first_missing in self.found:
            self.first_missing += 1
        return self.found


class Tables:
    """What small tables of shards say, each read once and kept as `digest` makes it."""

    def __init__(
        self, store: Store, names: Names, digest: Callable[[pa.Table], Any], columns: list[str]
    ) -> None:
        self._store, self.names, self._digest, self._columns = store, names, digest, columns
        self._settled = 0
        self._kept: dict[int, tuple[str, Any]] = {}  # with the etag of what was read
        self.chosen: list[int] = []
        """The shards whose tables speak for all."""
        self.newest: list[int] = []
        """The shards whose tables were written last, the last first."""

    @property
    def found(self) -> dict[int, ObjectInfo]:
        return self.names.found

    @property
    def weight(self) -> float:
        """How many tables each of the chosen ones stands for."""
        return len(self.names.found) / max(1, len(self.chosen))

    def digests(self, shards: Iterable[int]) -> list[Any]:
        """Of those among the chosen and the newest."""
        return [self._kept[shard][1] for shard in shards if shard in self._kept]

    def look(self, settled: int | None = None) -> None:
        """Read what is new; below `settled` nothing new is to come."""
        found = self.names.look(None if settled is None else min(self._settled, settled))
        self._settled = settled or 0
        stride = 1
        while len(found) > stride * _MAX_TABLES:  # doubling keeps half of what was chosen before
            stride *= 2
        self.chosen = sorted(shard for shard in found if shard % stride == 0)
        self.newest = sorted(found, key=lambda shard: -(found[shard].modified_s or 0))[:_NEWEST_REJECTS]
        wanted = {*self.chosen, *self.newest}
        self._kept = {
            shard: kept
            for shard, kept in self._kept.items()
            if shard in wanted and kept[0] == found[shard].etag
        }
        missing = sorted(wanted - self._kept.keys())
        if missing:
            with ThreadPoolExecutor(_READERS, "status") as pool:
                digests = pool.map(self._read, missing)
                self._kept |= {
                    shard: (found[shard].etag, digest)
                    for shard, digest in zip(missing, digests, strict=True)
                    if digest is not None
                }

    def _read(self, shard: int) -> Any:
        try:
            data = self._store.read(self.names.found[shard].key)
        except NoSuchObject:  # replaced or removed while we looked
            return None
        return self._digest(table_of(data, self._columns))


def times_of(store: Store, num_shards: int, retry: int = 0) -> Tables:
    def index_of(key: str) -> int | None:
        place = timings_place(num_shards, key)
        return place[0] if place is not None and place[1] == retry else None

    names = Names(store, "timings/", index_of, lambda shard: timings_name(num_shards, shard, retry))
    return Tables(store, names, _times, _TIMES_COLUMNS)


_TIMES_COLUMNS = ["stage", "rows", "seconds", "worker", "device", "node"]
_Worker = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class _Times:
    """What the timings of a shard add up to."""

    seconds_by_stage: dict[str, float]
    workers: dict[_Worker, tuple[int, float]]
    """Rows and seconds of each (worker, device, node)."""


def _times(table: pa.Table) -> _Times:
    seconds: defaultdict[str, float] = defaultdict(float)
    rows_of: Counter[_Worker] = Counter()
    seconds_of: defaultdict[_Worker, float] = defaultdict(float)
    for stage, rows, took, *who in zip(*table.to_pydict().values(), strict=True):
        worker = (who[0], who[1], who[2])
        seconds[stage] += took
        seconds_of[worker] += took
        rows_of[worker] += rows if stage == "part_write" else 0
    return _Times(dict(seconds), {worker: (rows_of[worker], seconds_of[worker]) for worker in seconds_of})


def sum_times(runs: Sequence[Tables]) -> tuple[dict[str, float], tuple[WorkerSeen, ...]]:
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


REJECT_COLUMNS = ["source", "row_id", "error_class", "message"]


@dataclass(frozen=True, slots=True)
class _Rejected:
    """What the rejects of a shard say."""

    input_rows: int
    classes: Counter[str]
    last: tuple[RejectSeen, ...]


def rejected_of(table: pa.Table) -> _Rejected:
    last = table.slice(max(0, table.num_rows - _NEWEST_REJECTS)).to_pylist()
    return _Rejected(
        len(set(table["source"].to_pylist())),
        Counter(table["error_class"].to_pylist()),
        tuple(RejectSeen(one["row_id"], one["error_class"], one["message"]) for one in last),
    )


def sum_rejects(tables: Tables) -> tuple[int, dict[str, int]]:
    weight, classes, rows = tables.weight, Counter[str](), 0
    for rejected in tables.digests(tables.chosen):
        classes += rejected.classes
        rows += rejected.input_rows
    return round(weight * rows), {name: round(weight * count) for name, count in sorted(classes.items())}


def newest_rejects(tables: Tables) -> tuple[RejectSeen, ...]:
    rejects = [one for rejected in tables.digests(tables.newest) for one in reversed(rejected.last)]
    return tuple(rejects[:_NEWEST_REJECTS])


def recent_rate(
    parts: Iterable[tuple[float | None, int]], *, since: float | None, now: float
) -> tuple[float | None, float | None, bool]:
    """(rows a second over the last minutes of work, seconds since the last part, whether it goes on).

    Only what the newest driver's workers made counts, from its beginning at `since`; the time in which nobody
    worked does not.
    """
    committed = sorted((at, rows) for at, rows in parts if at is not None)
    if not committed:
        return None, None, False
    newest = committed[-1][0]
    last_part_s = max(0.0, now - newest)
    if since is None:  # the first part's rows were made before the time that is known
        since = committed[0][0]
    run = [one for one in committed if one[0] > since]
    if not run:
        return None, last_part_s, False
    begin = max(since, newest - _RATE_OVER_S)
    counted = [one for one in run if one[0] > begin]
    if len(counted) < _RATE_PARTS:
        counted = run[-_RATE_PARTS:]
        begin = run[-_RATE_PARTS - 1][0] if len(run) > _RATE_PARTS else since
    took = newest - begin
    if took <= 0:
        return None, last_part_s, False
    usual_pause_s = took / len(counted)
    rate = sum(rows for _, rows in counted) / took
    return rate, last_part_s, last_part_s < 60 + _STALLED_AFTER * usual_pause_s
