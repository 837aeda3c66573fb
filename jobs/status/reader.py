"""How far a job is and where its time went, from its folder alone. Knows no driver and no cluster.

status("s3://bucket/run-7").text()                      # one look
reader = StatusReader(open_store("s3://bucket/run-7"))
reader.read(), reader.read(), ...                       # later looks ask only for what is new
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from overtone.jobs.folder import JobFolder, quarantine_folder
from overtone.jobs.parts import Format, part_index, part_name, rejects_index, rejects_name
from overtone.jobs.retry_plan import RetryPlan
from overtone.jobs.status.state import Status
from overtone.jobs.status.sums import (
    REJECT_COLUMNS,
    Pace,
    PartSums,
    copied_from,
    newest_rejects,
    rejected_of,
    sum_rejects,
    sum_times,
    sum_truncated,
    times_of,
)
from overtone.jobs.status.tables import Names, Tables
from overtone.jobs.store import Store, open_store


def status(
    url: str, *, endpoint_url: str | None = None, region: str | None = None, now: float | None = None
) -> Status:
    """Look at a job's folder: list names, and read timings and rejects, but no part. UserError where there is
    no job."""
    return StatusReader(open_store(url, endpoint_url=endpoint_url, region=region)).read(now)


def rejects_by_class(store: Store, num_shards: int) -> dict[str, int]:
    """How many samples of a job are rejected now, by error class; an estimate where there are very many."""
    tables = _rejects_of(store, num_shards)
    tables.look()
    return sum_rejects(tables)[1]


class StatusReader:
    """Looks at a job's folder again and again. UserError where there is no job.

    A look lists names from the first shard on that was missing before, reads the timings and rejects that are
    new, and adds the new parts to sums. So its requests and its work grow with what happened since the last
    look, not with the job.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._folder = store, JobFolder(store)
        self._spec, self._job_plan = self._folder.load()
        self._pace = Pace()
        job_plan, num_shards = self._job_plan, self._job_plan.num_shards
        parts = _part_names(store, num_shards, self._spec.output.format)
        self._parts = PartSums(parts, lambda shard: job_plan.shard(shard).num_rows, self._pace)
        self._timings = times_of(store, num_shards)
        self._rejects = _rejects_of(store, num_shards)
        self._retries: list[_RetrySeen] = []

    def read(self, now: float | None = None) -> Status:
        """The job's state; `now` in seconds since 1970, None: this machine's clock."""
        job_plan, spec = self._job_plan, self._spec
        drivers = self._folder.drivers()
        epoch = max(drivers, default=0)
        self._parts.look()
        self._timings.look()
        self._look_at_retries()
        # A part's rejects are written before its timings, so where those are, no rejects are to come, unless
        # a retry writes them anew.
        self._rejects.look(0 if self._retries else self._timings.names.first_missing)
        rejected, classes = sum_rejects(self._rejects)
        waiting = self._retries[-1].rows_left if self._retries else 0
        left = job_plan.num_rows - self._parts.rows + waiting
        timings = [self._timings, *(retry.timings for retry in self._retries)]
        seconds, workers = sum_times(timings)
        rate, last_part_s, going = self._pace.recent(
            since=drivers.get(epoch), now=time.time() if now is None else now
        )
        made_s = copied_from(timings)
        if made_s is not None:
            rate, last_part_s, going = None, (time.time() if now is None else now) - made_s, False
        newest = self._retries[-1] if self._retries else None
        number = newest.retry_plan.number if newest else 0
        return Status(
            url=self._store.url,
            name=spec.name,
            model=spec.model.id,
            mode=spec.sampling.mode,
            fingerprint=job_plan.fingerprint,
            rows_total=job_plan.num_rows,
            rows_done=max(0, self._parts.rows - rejected),
            rows_rejected=max(0, rejected - waiting),
            rows_left=left,
            shards_total=job_plan.num_shards,
            shards_done=self._parts.num_parts,
            size_bytes=self._parts.size_bytes + sum(retry.parts.size_bytes for retry in self._retries),
            epoch=epoch,
            rows_quarantined=sum(1 for _ in self._store.list(quarantine_folder(number))),
            retry=number,
            retry_shards_total=newest.retry_plan.num_shards if newest else 0,
            retry_shards_done=newest.parts.num_parts if newest else 0,
            rows_per_second=rate,
            eta_s=left / rate if rate and left and going else None,
            last_part_s=last_part_s,
            seconds_by_stage=seconds,
            workers=workers,
            rejects_by_class=classes,
            newest_rejects=newest_rejects(self._rejects),
            rows_truncated=sum_truncated(timings),
            unit=job_plan.unit,
            sampled=any(tables.weight > 1 for tables in (self._rejects, *timings)),
        )

    def _look_at_retries(self) -> None:
        num_shards = self._job_plan.num_shards
        if self._parts.num_parts < num_shards:
            return  # a retry begins after the job's last part
        known = len(self._retries)
        if self._folder.num_retries() > known:
            for retry_plan in self._folder.retries()[known:]:
                parts = _part_names(
                    self._store, num_shards, self._spec.output.format, retry=retry_plan.number
                )
                timings = times_of(self._store, num_shards, retry_plan.number)
                sums = PartSums(parts, retry_plan.rows_of, self._pace)
                self._retries.append(_RetrySeen(retry_plan, sums, timings))
        for seen in self._retries:
            seen.look()


@dataclass
class _RetrySeen:
    """The parts and timings of a retry. Once it is finished, it is not looked at again."""

    retry_plan: RetryPlan
    parts: PartSums
    timings: Tables

    @property
    def rows_left(self) -> int:
        return self.retry_plan.num_rows - self.parts.rows

    def look(self) -> None:
        if self.parts.num_parts < self.retry_plan.num_shards:
            self.parts.look()
        if len(self.timings.names.found) < self.retry_plan.num_shards:
            self.timings.look()


def _part_names(store: Store, num_shards: int, format: Format, *, retry: int = 0) -> Names:
    """The names of the parts of a job, or of a retry, to be looked at."""
    return Names(
        store,
        "data/",
        lambda key: part_index(num_shards, key, retry),
        lambda shard: part_name(num_shards, shard, format, retry),
    )


def _rejects_of(store: Store, num_shards: int) -> Tables:
    """The rejects of a job, to be looked at."""
    names = Names(
        store,
        "rejects/",
        lambda key: rejects_index(num_shards, key),
        lambda shard: rejects_name(num_shards, shard),
    )
    return Tables(store, names, rejected_of, REJECT_COLUMNS)
