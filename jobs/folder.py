"""A job's folder, its only state: plan, parts, epochs, quarantine, retries. Knows no workers.

_job/plan.parquet                            which job this is; whoever creates it first decides
_job/spec.json                               how it was asked for
_job/epochs/000002.json                      one a driver: the newest is the live one
_job/quarantine/00042-ab12.json              one a row that kills workers
_job/retries/001/shards.parquet              which shards have rejects to try again; created like the plan
_job/retries/001/quarantine/                 as above, of that retry
data/train-00042-of-00128.parquet            the commit of shard 42
data/train-00042-of-00128-retry-001.parquet  the commit of its rejects in retry 1
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from datetime import UTC, datetime
from hashlib import blake2b
from uuid import uuid4

from overtone.jobs.errors import FingerprintMismatch, UserError, VerifyError
from overtone.jobs.parts import part_format, part_index, part_place, read_footer, timings_name, write_derived
from overtone.jobs.plan import JobPlan, Work, difference
from overtone.jobs.retry_plan import RetryPlan
from overtone.jobs.rows import Quarantined
from overtone.jobs.shard_set import ShardSet
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import NoSuchObject, Store

SPEC = "_job/spec.json"
PLAN = "_job/plan.parquet"
EPOCHS = "_job/epochs/"
QUARANTINE = "_job/quarantine/"
RETRIES = "_job/retries/"
_RETRY = re.compile(r"_job/retries/(\d{3,})/shards\.parquet")
_EPOCH = re.compile(r"_job/epochs/(\d{6,})\.json")


class JobFolder:
    """The folder behind a store. Every method asks the store; only the plan is kept, for it never changes."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._kept_plan: JobPlan | None = None

    def exists(self) -> bool:
        """Whether a job was begun here."""
        return self.store.head(PLAN) is not None

    def open(self, spec: JobSpec, job_plan: JobPlan) -> bool:
        """Make this folder the job's, or find that it is. True: an earlier run has begun it (resumed).

        FingerprintMismatch, which shows what differs, where it is another job's; nothing is written then.
        """
        created = self.store.create(
            PLAN,
            job_plan.to_parquet_bytes(),
            attempt=uuid4().hex,
            content_type="application/vnd.apache.parquet",
        )
        generation = job_plan.generation if created else self.check(job_plan).generation
        self._kept_plan = replace(job_plan, generation=generation)  # its files are where they are now
        # After the plan, which decides, also where an earlier run ended between the two.
        self.store.create(SPEC, spec.to_json().encode(), attempt=uuid4().hex, content_type="application/json")
        return not created

    @property
    def plan(self) -> JobPlan:
        """The job's plan as it was begun, which may be of an older version. UserError where there is none."""
        return self._plan()

    def check(self, job_plan: JobPlan) -> JobPlan:
        """The plan that the folder keeps. FingerprintMismatch, which shows what differs, where it is of
        another job than this."""
        kept = self._read_plan()
        if kept.fingerprint == job_plan.fingerprint:
            return kept
        lines = difference(kept, job_plan) or ["the order of the input files changed"]
        raise FingerprintMismatch(
            f"{self.store.url} holds another job, whose samples would differ: {'; '.join(lines)}. "
            "Undo that to go on with the job, or choose a new `output`"
        )

    def load(self) -> tuple[JobSpec, JobPlan]:
        """The job as it was begun. UserError where the folder holds none, or its spec is damaged."""
        job_plan = self._kept_plan = self._read_plan()
        try:
            text = self.store.read(SPEC)
        except NoSuchObject:
            raise UserError(
                f"the job in {self.store.url} was begun but its spec was not written; run it again to go on"
            ) from None
        return JobSpec.from_json(text), job_plan

    def finished(self, work: Work | None = None) -> ShardSet:
        """The shards whose parts of this work are committed, by the parts' names alone; None: of the job."""
        num_shards = self._plan().num_shards
        work = self._plan() if work is None else work
        indices = (part_index(num_shards, info.key, work.number) for info in self.store.list("data/"))
        return ShardSet(num_shards, (index for index in indices if index is not None and work.has(index)))

    def num_retries(self) -> int:
        """How many retries were begun."""
        return sum(_RETRY.fullmatch(info.key) is not None for info in self.store.list(RETRIES))

    def retries(self) -> list[RetryPlan]:
        """The retries that were begun, in order. VerifyError where the record of one is damaged or gone."""
        found = sorted(
            (int(match[1]), info.key)
            for info in self.store.list(RETRIES)
            if (match := _RETRY.fullmatch(info.key))
        )
        retries = []
        for number, (given, key) in enumerate(found, 1):
            try:
                retries.append(RetryPlan.from_bytes(self.store.read(key)))
            except VerifyError as error:
                raise VerifyError(f"{self.store.where(key)}: {error}") from error
            if not number == given == retries[-1].number:
                raise VerifyError(f"{self.store.where(key)}: there is no plan of retry {number} before it")
        return retries

    def begin_retry(self, retry_plan: RetryPlan) -> RetryPlan:
        """Record a retry; returns another driver's of the same number where that driver was first."""
        key = f"{_retry_folder(retry_plan.number)}shards.parquet"
        self.store.create(key, retry_plan.to_bytes(), attempt=uuid4().hex)
        return RetryPlan.from_bytes(self.store.read(key))

    def unfinished_retry(self) -> RetryPlan | None:
        """The first retry that lacks a part."""
        for retry_plan in self.retries():
            if len(self.finished(retry_plan)) < retry_plan.num_shards:
                return retry_plan
        return None

    def take_epoch(self, owner: str) -> int:
        """Become the job's one live driver: older ones stop when they see it. `owner` is for people."""
        about = json.dumps({"owner": owner, "taken": datetime.now(UTC).isoformat(timespec="seconds")})
        epoch = self.newest_epoch()
        while True:
            epoch += 1
            if self.store.create(f"{EPOCHS}{epoch:06d}.json", about.encode(), attempt=uuid4().hex):
                return epoch

    def newest_epoch(self) -> int:
        """The number of the newest driver; 0 where there was none."""
        return max(self.drivers(), default=0)

    def drivers(self) -> dict[int, float | None]:
        """When each driver took the job up, by its number: seconds since 1970, by the store's clock."""
        found = ((_EPOCH.fullmatch(info.key), info) for info in self.store.list(EPOCHS))
        return {int(match[1]): info.modified_s for match, info in found if match}

    def add_quarantine(self, row: Quarantined, retry: int = 0) -> None:
        """Remember, for every driver that continues this run, that a row kills workers; of one row's records
        the newest counts. A retry begins without any, since its purpose is to try such rows again."""
        name = blake2b(row.row_id.encode(errors="surrogatepass"), digest_size=16).hexdigest()
        key = f"{quarantine_folder(retry)}{row.shard:05d}-{name}.json"
        self.store.put(key, json.dumps(asdict(row)).encode())

    def quarantined(self, retry: int = 0) -> dict[int, list[Quarantined]]:
        """The rows not to run in this run, by shard."""
        found: dict[int, list[Quarantined]] = {}
        for info in self.store.list(quarantine_folder(retry)):
            try:
                row = Quarantined(**json.loads(self.store.read(info.key)))
            except (ValueError, TypeError) as error:
                raise VerifyError(f"{self.store.where(info.key)} is damaged: {error}") from error
            found.setdefault(row.shard, []).append(row)
        return found

    def repair_derived(self) -> int:
        """Write the timings and rejects of parts whose writer died in between; returns how many parts those
        were.

        Only the parts that need it are read; the others are judged by names. Timings are written last, so
        where they exist, everything does; empty ones were lost with the machine's power.
        """
        num_shards = self._plan().num_shards
        written = {info.key for info in self.store.list("timings/") if info.size_bytes}
        parts = ((part_place(num_shards, info.key), info.key) for info in self.store.list("data/"))
        repaired: list[int] = []
        for (index, retry), key in sorted((place, key) for place, key in parts if place is not None):
            # After an older part of the shard, for a shard's rejects are those of its newest part.
            if timings_name(num_shards, index, retry) not in written or repaired[-1:] == [index]:
                with self.store.open(key) as file:
                    write_derived(self.store, read_footer(file, part_format(key)))
                repaired.append(index)
        return len(repaired)

    def _plan(self) -> JobPlan:
        if self._kept_plan is None:
            self._kept_plan = self._read_plan()
        return self._kept_plan

    def _read_plan(self) -> JobPlan:
        try:
            return JobPlan.from_bytes(self.store.read(PLAN))
        except NoSuchObject:
            raise UserError(
                f"{self.store.url} holds no job; give the folder or s3:// URL that a job's `output` names"
            ) from None


def quarantine_folder(retry: int = 0) -> str:
    """The folder that keeps a retry's rows that kill workers; 0: those of the job itself."""
    return f"{_retry_folder(retry)}quarantine/" if retry else QUARANTINE


def _retry_folder(number: int) -> str:
    return f"{RETRIES}{number:03}/"
