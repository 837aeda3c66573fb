"""How far a job is and where its time went, from its folder alone. Knows no driver and no cluster."""

from __future__ import annotations

import io
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from jobs.folder import JobFolder
from jobs.parts import part_index
from jobs.plan import JobPlan
from jobs.progress import duration
from jobs.store import NoSuchObject, ObjectInfo, Store, open_store

_MAX_TABLES = 2000
"""Timings and rejects that are read, of each; where there are more, evenly chosen ones speak for all."""
_READERS = 16
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
    shards_total: int
    shards_done: int
    size_bytes: int
    """Of all parts."""
    epoch: int
    """How often a driver took the job up."""
    rows_quarantined: int
    """Rows that killed workers."""
    rows_per_second: float | None
    """Over the last minutes of work; None: not known."""
    eta_s: float | None
    """Seconds to go at that rate; None: done, not known, or nothing happens any more."""
    last_part_s: float | None
    """Seconds since the last part; None: there is none, or the store does not say."""
    seconds_by_stage: dict[str, float]
    """Over all workers."""
    workers: tuple[WorkerSeen, ...]
    sampled: bool
    """Seconds and rejects are estimates from some of the parts."""

    @property
    def finished(self) -> bool:
        return self.shards_done == self.shards_total

    def as_dict(self) -> dict[str, Any]:
        """The same as `text`, as data."""
        return {
            **asdict(self),
            "workers": [asdict(worker) for worker in self.workers],
            "finished": self.finished,
        }

    def text(self) -> str:
        """A screenful for a terminal."""
        percent = 100 * (self.rows_total - self.rows_left) // self.rows_total if self.rows_total else 100
        lines = [
            f"{self.name}: {self.rows_done:,} of {self.rows_total:,} rows done, {self.rows_rejected:,} "
            f"rejected, {self.rows_left:,} left ({percent}%)",
            f"{self.shards_done:,} of {self.shards_total:,} shards, {_size(self.size_bytes)}; model "
            f"{self.model}, {self.mode}",
            self._pace(),
        ]
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

    def _pace(self) -> str:
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
    store = open_store(url, endpoint_url=endpoint_url, region=region)
    folder = JobFolder(store)
    spec, plan = folder.load()
    parts = {index: info for info in store.list("data/") if (index := part_index(plan, info.key)) is not None}
    covered = sum(plan.shard(index).num_rows for index in parts)
    rejected, sampled_rejects = _rejected(store)
    seconds, workers, sampled = _times(store)
    rate, last_part_s, going = _rate(plan, parts, time.time() if now is None else now)
    left = plan.num_rows - covered
    return Status(
        url=store.url,
        name=spec.name,
        model=spec.model.id,
        mode=spec.sampling.mode,
        fingerprint=plan.fingerprint,
        rows_total=plan.num_rows,
        rows_done=max(0, covered - rejected),
        rows_rejected=rejected,
        rows_left=left,
        shards_total=plan.num_shards,
        shards_done=len(parts),
        size_bytes=sum(info.size_bytes for info in parts.values()),
        epoch=folder.newest_epoch(),
        rows_quarantined=sum(len(rows) for rows in folder.quarantined().values()),
        rows_per_second=rate,
        eta_s=left / rate if rate and left and going else None,
        last_part_s=last_part_s,
        seconds_by_stage=seconds,
        workers=workers,
        sampled=sampled or sampled_rejects,
    )


def _tables(store: Store, prefix: str, columns: list[str]) -> tuple[list[dict[str, list]], float]:
    """(columns of the tables under a prefix, how many tables each of them stands for)."""
    keys = [info.key for info in store.list(prefix) if info.key.endswith(".parquet")]
    chosen = [keys[i] for i in np.linspace(0, len(keys) - 1, min(len(keys), _MAX_TABLES)).astype(int)]

    def read(key: str) -> dict[str, list] | None:
        try:
            return pq.read_table(io.BytesIO(store.read(key)), columns=columns).to_pydict()
        except NoSuchObject:  # replaced or removed while we looked
            return None

    with ThreadPoolExecutor(_READERS, "status") as pool:
        tables = [table for table in pool.map(read, chosen) if table is not None]
    return tables, len(keys) / max(1, len(chosen))


def _rejected(store: Store) -> tuple[int, bool]:
    """(input rows that were rejected, whether that is an estimate)."""
    tables, weight = _tables(store, "rejects/", ["source"])
    return round(weight * sum(len(set(table["source"])) for table in tables)), weight > 1


def _times(store: Store) -> tuple[dict[str, float], tuple[WorkerSeen, ...], bool]:
    tables, weight = _tables(store, "timings/", ["stage", "rows", "seconds", "worker", "device", "node"])
    seconds: defaultdict[str, float] = defaultdict(float)
    worked: defaultdict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for table in tables:
        seen = set()
        for stage, rows, took, *who in zip(*table.values(), strict=True):
            seconds[stage] += took
            worker = worked[(who[0], who[1], who[2])]
            worker["microseconds"] += round(1e6 * took)
            worker["rows"] += rows if stage == "part_write" else 0
            seen.add((who[0], who[1], who[2]))
        for key in seen:
            worked[key]["parts"] += 1
    workers = tuple(
        WorkerSeen(
            *who,
            parts=round(weight * sums["parts"]),
            rows=round(weight * sums["rows"]),
            seconds=weight * sums["microseconds"] / 1e6,
        )
        for who, sums in sorted(worked.items())
    )
    return {stage: weight * took for stage, took in seconds.items()}, workers, weight > 1


def _rate(plan: JobPlan, parts: dict[int, ObjectInfo], now: float) -> tuple[float | None, float | None, bool]:
    """(rows a second over the last minutes of work, seconds since the last part, whether it goes on)."""
    committed = sorted(
        (info.modified_s, plan.shard(index).num_rows)
        for index, info in parts.items()
        if info.modified_s is not None
    )
    if not committed:
        return None, None, False
    newest = committed[-1][0]
    recent = [one for one in committed if one[0] >= newest - _RATE_OVER_S]
    recent = recent if len(recent) >= _RATE_PARTS else committed[-_RATE_PARTS:]
    last_part_s = max(0.0, now - newest)
    took = newest - recent[0][0]
    if took <= 0:
        return None, last_part_s, False
    # The first part's rows were made before the time that is counted.
    rate = sum(rows for _, rows in recent[1:]) / took
    usual_pause_s = took / (len(recent) - 1)
    return rate, last_part_s, last_part_s < 60 + _STALLED_AFTER * usual_pause_s


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.1f} TB"
