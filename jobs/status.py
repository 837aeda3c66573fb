"""How far a job is and where its time went, from its folder alone. Knows no driver and no cluster.

status("s3://bucket/run-7").text()                      # one look
reader = StatusReader(open_store("s3://bucket/run-7"))
reader.read(), reader.read(), ...                       # later looks ask only for what is new
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from jobs.folder import JobFolder, quarantine_folder
from jobs.parts import Format, part_index, part_name, rejects_index, rejects_name, timings_name, timings_place
from jobs.plan import RetryPlan
from jobs.progress import duration
from jobs.store import NoSuchObject, ObjectInfo, Store, open_store
from jobs.tables import table_of

_MAX_TABLES = 2000
"""Timings and rejects that are read, of each; where there are more, evenly chosen ones speak for all."""
_READERS = 16
_NEWEST_REJECTS = 5
_RATE_OVER_S = 600.0
_RATE_PARTS = 20
_STALLED_AFTER = 4.0  # times the usual pause between two parts


@dataclass(frozen=True)
class WorkerSeen:
    """A worker by what it left in the timings."""

    worker: str
    device: str
    node: str
    parts: int
    rows: int
    seconds: float
    """In all stages; overlapping ones count twice."""


@dataclass(frozen=True, slots=True)
class RejectSeen:
    """A reject as it is in the rejects."""

    row_id: str
    error_class: str
    message: str


@dataclass(frozen=True)
class Status:
    """A job's state. Rows are input rows."""

    url: str
    name: str
    model: str
    mode: str
    fingerprint: str
    rows_total: int
    rows_done: int
    rows_rejected: int
    rows_left: int
    """Those of a retry that are not tried again yet among them."""
    shards_total: int
    shards_done: int
    size_bytes: int
    """Of all parts."""
    epoch: int
    """How often a driver took the job up."""
    rows_quarantined: int
    """Rows that killed workers, in the newest retry where there is one."""
    retry: int
    """The newest retry of rejects; 0: there is none."""
    retry_shards_total: int
    """Of that retry."""
    retry_shards_done: int
    rows_per_second: float | None
    """Over the last minutes of work; None: not known."""
    eta_s: float | None
    """Seconds to go at that rate; None: done, not known, or nothing happens any more."""
    last_part_s: float | None
    """Seconds since the last part; None: there is none, or the store does not say."""
    seconds_by_stage: dict[str, float]
    """Over all workers."""
    workers: tuple[WorkerSeen, ...]
    rejects_by_class: dict[str, int]
    """Samples, not input rows: one that asks for several images may be several."""
    newest_rejects: tuple[RejectSeen, ...]
    """A few, the last first."""
    sampled: bool
    """Seconds and rejects are estimates from some of the parts."""

    @property
    def finished(self) -> bool:
        """Every part is there, those of the newest retry too."""
        return (self.shards_done, self.retry_shards_done) == (self.shards_total, self.retry_shards_total)

    @property
    def percent(self) -> int:
        """Of the rows, done or rejected; 100 only where all are."""
        return 100 * (self.rows_total - self.rows_left) // self.rows_total if self.rows_total else 100

    def as_dict(self) -> dict[str, Any]:
        """The same as `text`, as data."""
        return {**asdict(self), "finished": self.finished}

    def line(self) -> str:
        """One line: rows and pace."""
        rejected = f", {self.rows_rejected:,} rejected" if self.rows_rejected else ""
        done = self.rows_total - self.rows_left
        return f"{done:,} of {self.rows_total:,} rows ({self.percent}%){rejected}; {self.pace()}"

    def text(self) -> str:
        """A screenful for a terminal."""
        lines = [
            f"{self.name}: {self.rows_done:,} of {self.rows_total:,} rows done, {self.rows_rejected:,} "
            f"rejected, {self.rows_left:,} left ({self.percent}%)",
            f"{self.shards_done:,} of {self.shards_total:,} shards, {_size(self.size_bytes)}; model "
            f"{self.model}, {self.mode}",
            self.pace(),
        ]
        if self.retry:
            lines.append(
                f"retry {self.retry} of rejects: {self.retry_shards_done:,} of {self.retry_shards_total:,} "
                "shards"
            )
        if self.rejects_by_class:
            reasons = ", ".join(f"{count:,} {name}" for name, count in self.rejects_by_class.items())
            lines.append(f"rejects: {reasons}")
        if self.rows_quarantined:
            lines.append(f"{self.rows_quarantined:,} rows killed workers and are not run again")
        total = sum(self.seconds_by_stage.values())
        if total:
            about = " (estimated from some parts)" if self.sampled else ""
            lines += ["", f"{'stage':<14}{'seconds':>12}{'share':>8}{about}"]
            lines += [
                f"{stage:<14}{seconds:>12,.1f}{seconds / total:>8.1%}"
                for stage, seconds in sorted(self.seconds_by_stage.items(), key=lambda item: -item[1])
            ]
        if self.workers:
            lines += ["", f"{'worker':<20}{'device':<24}{'parts':>8}{'rows':>10}"]
            lines += [f"{w.worker:<20}{w.device:<24}{w.parts:>8,}{w.rows:>10,}" for w in self.workers]
        return "\n".join(lines)

    def pace(self) -> str:
        """Rows a second, time to go and the last sign of life, or that it is done."""
        if self.finished:
            return "finished"
        last = "" if self.last_part_s is None else f"; last part {duration(self.last_part_s)} ago"
        if self.rows_per_second is None:
            return ("no part yet" if not self.shards_done else "rate not known yet") + last
        if self.eta_s is None:
            return f"nothing has been written for a while; it made {self.rows_per_second:.3g} rows/s{last}"
        return f"{self.rows_per_second:.3g} rows/s, ETA {duration(self.eta_s)}{last}"


def status(
    url: str, *, endpoint_url: str | None = None, region: str | None = None, now: float | None = None
) -> Status:
    """Look at a job's folder. Lists names, and reads timings and rejects but no part. UserError: no job
    there."""
    return StatusReader(open_store(url, endpoint_url=endpoint_url, region=region)).read(now)


class StatusReader:
    """Looks at a job's folder again and again. UserError where there is no job.

    A look lists names from the first shard on that was not there before, and reads the timings and rejects
    that are new: its requests grow with what happened since the last look, not with the job.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._folder = store, JobFolder(store)
        self._spec, self._plan = self._folder.load()
        plan, format = self._plan, self._spec.output.format
        self._parts = _Names(
            store, "data/", lambda key: part_index(plan, key), lambda shard: part_name(plan, shard, format)
        )
        self._timings = _times_of(store, plan.num_shards)
        rejects = _Names(
            store, "rejects/", lambda key: rejects_index(plan, key), lambda shard: rejects_name(plan, shard)
        )
        self._rejects = _Tables(store, rejects, _rejected, _REJECT_COLUMNS)
        self._retries: list[_RetrySeen] = []

    def read(self, now: float | None = None) -> Status:
        """The job's state; `now` in seconds since 1970, None: this machine's clock."""
        plan, spec = self._plan, self._spec
        drivers = self._folder.drivers()
        epoch = max(drivers, default=0)
        parts = self._parts.look()
        self._timings.look()
        self._look_at_retries()
        # A part's rejects are written before its timings, so where those are, no rejects are to come, unless
        # a retry writes them anew.
        self._rejects.look(0 if self._retries else self._timings.names.first_missing)
        covered = sum(plan.shard(index).num_rows for index in parts)
        rejected, classes = _sum_rejects(self._rejects)
        waiting = self._retries[-1].rows_left if self._retries else 0
        left = plan.num_rows - covered + waiting
        seconds, workers = _sum_times([self._timings, *(retry.timings for retry in self._retries)])
        made = [(info.modified_s, plan.shard(index).num_rows) for index, info in parts.items()]
        for retry in self._retries:
            made += [
                (info.modified_s, retry.plan.rows_of(index)) for index, info in retry.parts.found.items()
            ]
        rate, last_part_s, going = _rate(
            made, since=drivers.get(epoch), now=time.time() if now is None else now
        )
        newest = self._retries[-1] if self._retries else None
        number = newest.plan.number if newest else 0
        return Status(
            url=self._store.url,
            name=spec.name,
            model=spec.model.id,
            mode=spec.sampling.mode,
            fingerprint=plan.fingerprint,
            rows_total=plan.num_rows,
            rows_done=max(0, covered - rejected),
            rows_rejected=max(0, rejected - waiting),
            rows_left=left,
            shards_total=plan.num_shards,
            shards_done=len(parts),
            size_bytes=sum(
                info.size_bytes
                for names in (self._parts, *(retry.parts for retry in self._retries))
                for info in names.found.values()
            ),
            epoch=epoch,
            rows_quarantined=sum(1 for _ in self._store.list(quarantine_folder(number))),
            retry=number,
            retry_shards_total=newest.plan.num_shards if newest else 0,
            retry_shards_done=len(newest.parts.found) if newest else 0,
            rows_per_second=rate,
            eta_s=left / rate if rate and left and going else None,
            last_part_s=last_part_s,
            seconds_by_stage=seconds,
            workers=workers,
            rejects_by_class=classes,
            newest_rejects=_newest(self._rejects),
            sampled=any(
                tables.weight > 1
                for tables in (self._timings, self._rejects, *(retry.timings for retry in self._retries))
            ),
        )

    def _look_at_retries(self) -> None:
        if len(self._parts.found) < self._plan.num_shards:
            return  # a retry begins after the job's last part
        known = len(self._retries)
        format, plan = self._spec.output.format, self._plan
        if self._folder.num_retries() > known:
            for retry in self._folder.retries()[known:]:
                self._retries.append(_RetrySeen(self._store, plan.num_shards, retry, format))
        for seen in self._retries:
            seen.look()


class _RetrySeen:
    """What is there of a retry. A finished one is not looked at again."""

    def __init__(self, store: Store, num_shards: int, plan: RetryPlan, format: Format) -> None:
        number = plan.number
        self.plan = plan
        self.parts = _Names(
            store,
            "data/",
            lambda key: part_index(num_shards, key, number),
            lambda shard: part_name(num_shards, shard, format, number),
        )
        self.timings = _times_of(store, num_shards, number)

    @property
    def rows_left(self) -> int:
        return self.plan.num_rows - sum(map(self.plan.rows_of, self.parts.found))

    def look(self) -> None:
        for names in (self.parts, self.timings):
            if len(names.found) < self.plan.num_shards:
                names.look()


class _Names:
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


class _Tables:
    """What small tables of shards say, each read once and kept as `digest` makes it."""

    def __init__(
        self, store: Store, names: _Names, digest: Callable[[pa.Table], Any], columns: list[str]
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


def _times_of(store: Store, num_shards: int, retry: int = 0) -> _Tables:
    def index_of(key: str) -> int | None:
        place = timings_place(num_shards, key)
        return place[0] if place is not None and place[1] == retry else None

    names = _Names(store, "timings/", index_of, lambda shard: timings_name(num_shards, shard, retry))
    return _Tables(store, names, _times, _TIMES_COLUMNS)


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


def _sum_times(runs: Sequence[_Tables]) -> tuple[dict[str, float], tuple[WorkerSeen, ...]]:
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


_REJECT_COLUMNS = ["source", "row_id", "error_class", "message"]


@dataclass(frozen=True, slots=True)
class _Rejected:
    """What the rejects of a shard say."""

    input_rows: int
    classes: Counter[str]
    last: tuple[RejectSeen, ...]


def _rejected(table: pa.Table) -> _Rejected:
    last = table.slice(max(0, table.num_rows - _NEWEST_REJECTS)).to_pylist()
    return _Rejected(
        len(set(table["source"].to_pylist())),
        Counter(table["error_class"].to_pylist()),
        tuple(RejectSeen(one["row_id"], one["error_class"], one["message"]) for one in last),
    )


def _sum_rejects(tables: _Tables) -> tuple[int, dict[str, int]]:
    weight, classes, rows = tables.weight, Counter[str](), 0
    for rejected in tables.digests(tables.chosen):
        classes += rejected.classes
        rows += rejected.input_rows
    return round(weight * rows), {name: round(weight * count) for name, count in sorted(classes.items())}


def _newest(tables: _Tables) -> tuple[RejectSeen, ...]:
    rejects = [one for rejected in tables.digests(tables.newest) for one in reversed(rejected.last)]
    return tuple(rejects[:_NEWEST_REJECTS])


def _rate(
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


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.1f} TB"
