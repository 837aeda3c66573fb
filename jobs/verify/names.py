"""Which objects of a job exist, and which rows exist twice. Opens parts only to name such rows."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

from overtone.jobs.errors import StoreError, VerifyError
from overtone.jobs.folder import RETRIES, JobFolder
from overtone.jobs.parts import (
    Format,
    part_format,
    part_name,
    part_place,
    read_footer,
    read_rows,
    rejects_index,
    timings_place,
)
from overtone.jobs.plan import JobPlan
from overtone.jobs.retry_plan import RetryPlan
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import Store
from overtone.jobs.verify.found import VerifyReport, shown_ids


class There:
    """Which of a job's objects exist. Whatever else lies under data/, timings/ and rejects/ is reported."""

    def __init__(self, store: Store, job_plan: JobPlan, format: Format, report: VerifyReport) -> None:
        self.retries = _retries(store, report)
        runs = range(len(self.retries) + 1)
        self.parts = [np.zeros(job_plan.num_shards, bool) for _ in runs]
        """For each run, the job itself first and then each retry: [shards] bool, whether its part exists."""
        self.timings = [np.zeros(job_plan.num_shards, bool) for _ in runs]
        self.rejects = np.zeros(job_plan.num_shards, bool)
        for info in store.list("data/"):
            place = part_place(job_plan, info.key)
            if place is None or part_format(info.key) != format or not self._owes(*place):
                report.add("foreign_file", info.key, "no part of this job; readers of data/ would see it")
            else:
                self.parts[place[1]][place[0]] = True
        for info in store.list("timings/"):
            place = timings_place(job_plan, info.key)
            if place is not None and place[1] in runs and self.parts[place[1]][place[0]]:
                self.timings[place[1]][place[0]] = True
            else:
                report.add("foreign_file", info.key, "belongs to no part of this job")
        for info in store.list("rejects/"):
            index = rejects_index(job_plan, info.key)
            if index is not None and any(parts[index] for parts in self.parts):
                self.rejects[index] = True
            else:
                report.add("foreign_file", info.key, "belongs to no part of this job")
        report.shards = int(self.parts[0].sum())
        report.retries = len(self.retries)
        report.retry_parts = int(sum(parts.sum() for parts in self.parts[1:]))
        if self.retries:
            report.retry_parts_left = self.retries[-1].num_shards - int(self.parts[-1].sum())

    def runs(self, index: int) -> list[int]:
        """The runs that owe a part of this shard, in order: the job itself (0) and some retries."""
        return [0, *(retry.number for retry in self.retries if retry.has(index))]

    def _owes(self, index: int, retry: int) -> bool:
        return not retry or (retry <= len(self.retries) and self.retries[retry - 1].has(index))


def _retries(store: Store, report: VerifyReport) -> list[RetryPlan]:
    try:
        return JobFolder(store).retries()
    except VerifyError as error:
        report.add("broken_retry", RETRIES, str(error))
        return []


class Seen:
    """The hashes of all row_ids, of eight bytes each."""

    def __init__(self) -> None:
        self._hashes: list[np.ndarray] = []

    def add(self, row_ids: list[str]) -> None:
        self._hashes.append(_hashes(row_ids))

    def twice(self) -> np.ndarray:
        """The hashes that were added more than once. The collection is empty afterwards."""
        hashes = np.concatenate(self._hashes) if self._hashes else np.zeros(0, np.uint64)
        self._hashes.clear()
        hashes.sort()
        return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])


def _hashes(row_ids: Iterable[str]) -> np.ndarray:
    """[rows] uint64"""
    joined = b"".join(blake2b(row_id.encode(), digest_size=8).digest() for row_id in row_ids)
    return np.frombuffer(joined, np.uint64)


def name_duplicates(
    store: Store, spec: JobSpec, job_plan: JobPlan, there: There, twice: np.ndarray, report: VerifyReport
) -> None:
    """Report the rows that exist twice. It reads the parts once more and compares the row_ids whose hashes
    came twice, so that no row is accused wrongly."""
    where: dict[str, list[str]] = {}
    format = spec.output.format
    for index in np.flatnonzero(there.parts[0]).tolist():
        rejected: list[str] = []
        for run in there.runs(index):
            if not there.parts[run][index]:
                break
            key = part_name(job_plan, index, format, run)
            try:
                with store.open(key) as file:
                    footer = read_footer(file, format)
                    file.seek(0)
                    row_ids = [row.row_id for row in read_rows(file, footer.kind, format)]
            except (VerifyError, StoreError):
                break  # reported before
            rejected = [reject.row_id for reject in footer.rejects]
            _note_suspects(where, key, row_ids, twice)
        _note_suspects(where, key, rejected, twice)
    for row_id, keys in where.items():
        if len(keys) > 1:
            report.add("duplicate_rows", keys[0], f"row {shown_ids([row_id])} is there again in {keys[1]}")


def _note_suspects(where: dict[str, list[str]], key: str, row_ids: list[str], twice: np.ndarray) -> None:
    for row_id, suspect in zip(row_ids, np.isin(_hashes(row_ids), twice).tolist(), strict=True):
        if suspect:
            where.setdefault(row_id, []).append(key)
