"""How far a job is and where its time went, from its folder alone. Knows no driver and no cluster.

status("s3://bucket/run-7").text()                      # one look
reader = StatusReader(open_store("s3://bucket/run-7"))
reader.read(), reader.read(), ...                       # later looks ask only for what is new
"""

from __future__ import annotations

import time

from overtone.jobs.folder import JobFolder, quarantine_folder
from overtone.jobs.parts import Format, part_index, part_name, rejects_index, rejects_name
from overtone.jobs.retry_plan import RetryPlan
from overtone.jobs.status.state import Status
from overtone.jobs.status.sums import (
    REJECT_COLUMNS,
    Names,
    Tables,
    newest_rejects,
    recent_rate,
    rejected_of,
    sum_rejects,
    sum_times,
    times_of,
)
from overtone.jobs.store import Store, open_store


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
        self._parts = Names(
            store, "data/", lambda key: part_index(plan, key), lambda shard: part_name(plan, shard, format)
        )
        self._timings = times_of(store, plan.num_shards)
        rejects = Names(
            store, "rejects/", lambda key: rejects_index(plan, key), lambda shard: rejects_name(plan, shard)
        )
        self._rejects = Tables(store, rejects, rejected_of, REJECT_COLUMNS)
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
        rejected, classes = sum_rejects(self._rejects)
        waiting = self._retries[-1].rows_left if self._retries else 0
        left = plan.num_rows - covered + waiting
        seconds, workers = sum_times([self._timings, *(retry.timings for retry in self._retries)])
        made = [(info.modified_s, plan.shard(index).num_rows) for index, info in parts.items()]
        for retry in self._retries:
            made += [
                (info.modified_s, retry.plan.rows_of(index)) for index, info in retry.parts.found.items()
            ]
        rate, last_part_s, going = recent_rate(
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
            newest_rejects=newest_rejects(self._rejects),
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
        self.parts = Names(
            store,
            "data/",
            lambda key: part_index(num_shards, key, number),
            lambda shard: part_name(num_shards, shard, format, number),
        )
        self.timings = times_of(store, num_shards, number)

    @property
    def rows_left(self) -> int:
        return self.plan.num_rows - sum(map(self.plan.rows_of, self.parts.found))

    def look(self) -> None:
        for names in (self.parts, self.timings):
            if len(names.found) < self.plan.num_shards:
                names.look()
