"""A follow-up run of a finished job's rejects alone: what it tries again, and how. Knows no workers.

    spec, job_plan = job_to_retry(store, overrides)                   # the job, as the retry makes it
    rejects = find_rejects(folder, spec, job_plan)                  # what is to be tried again
    retry = folder.begin_retry(rejects.retry)                       # another driver's, where it was first
    rows = read_rejected(store, spec, job_plan, retry, 42)          # the rows of shard 42 to try again

A retry's part stands beside the one whose rejects it tries again, and has each of those rows, made or
rejected once more. So the rows of a shard are those of all its parts, and its rejects those of its newest
part; an existing part never changes. Only the footers record which rows to try, so that no two records of it
can disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from overtone.jobs.errors import SizeError, SpecError, UserError
from overtone.jobs.folder import JobFolder
from overtone.jobs.parts import part_name, read_footer, rejects_index
from overtone.jobs.plan import JobPlan, make_plan
from overtone.jobs.prompts import ShardRows, read_shard
from overtone.jobs.retry_plan import RetryPlan
from overtone.jobs.rows import Reject
from overtone.jobs.spec import JobSpec, with_overrides
from overtone.jobs.store import Store, open_store
from overtone.jobs.tables import read_all
from overtone.jobs.words import counted


@dataclass(frozen=True)
class Rejects:
    """What a retry would try again."""

    retry: RetryPlan
    """Has no shards where there is nothing to try."""
    classes: Counter[str] = field(default_factory=Counter)
    """The rejects that it tries again, by error class."""
    refused: int = 0
    """Rejects that the reader refused, or whose size the model cannot make: they would be refused again."""
    begun: bool = False
    """The retry is one that was begun and is not finished, which comes first. Its rejects are not counted."""

    def text(self) -> str:
        """A line or two for a terminal."""
        retry = self.retry
        if self.begun:
            return f"retry {retry.number} was begun and is not finished: what is left of it comes first"
        lines = []
        if retry.num_shards:
            reasons = ", ".join(f"{count:,} {name}" for name, count in sorted(self.classes.items()))
            total, shards = self.classes.total(), retry.num_shards
            lines.append(
                f"retry {retry.number} tries {total:,} row{'s' * (total != 1)} of {shards:,} "
                f"shard{'s' * (shards != 1)} again ({reasons})"
            )
        elif not self.refused:
            lines.append("no row is rejected: there is nothing to try again")
        if self.refused:
            lines.append(
                f"{counted(self.refused, 'rejected row')} cannot be made as the prompt table has "
                f"{'it' if self.refused == 1 else 'them'}, whatever is tried"
            )
        return "\n".join(lines)


def preview(
    output: str,
    overrides: Sequence[str] = (),
    *,
    endpoint_url: str | None = None,
    region: str | None = None,
) -> Rejects:
    """What a retry of the job in a folder or under an s3:// URL would try again; writes nothing. Raises as
    `job_to_retry` and `find_rejects` do."""
    store = open_store(output, endpoint_url=endpoint_url, region=region)
    spec, job_plan = job_to_retry(store, overrides)
    return find_rejects(JobFolder(store), spec, job_plan)


def job_to_retry(store: Store, overrides: Sequence[str] = ()) -> tuple[JobSpec, JobPlan]:
    """The spec and plan for a retry of the job in a store, with `key=value` overrides of what changes no
    sample; the inputs must be what they were.

    All rejects are tolerated, since they were rejects before: `faults.max_reject_fraction` counts only where
    it is an override, and is then a share of the rows that are tried again. UserError where the store holds
    no job, an override cannot be, or the inputs changed.
    """
    folder = JobFolder(store)
    begun, _ = folder.load()
    config = store.config
    place = {"path": config.url, "endpoint_url": config.endpoint_url, "region": config.region}
    known = {key: value for key, value in place.items() if value is not None}
    moved = begun.model_copy(update={"output": begun.output.model_copy(update=known)})
    spec = with_overrides(tolerating_rejects(moved), overrides)
    if spec.output.path != config.url:
        raise SpecError("--set output.path: a retry belongs to the job in the folder that is given")
    return spec, folder.check(make_plan(spec))


def find_rejects(folder: JobFolder, spec: JobSpec, job_plan: JobPlan) -> Rejects:
    """What is rejected now, or what is left of the retry that was begun last.

    UserError where the job itself is not finished; VerifyError for a part that is broken. The names under
    `rejects/`, which `JobFolder.repair_derived` completes, say which shards have rejects; the footers of
    these shards' parts say which rows they are.
    """
    done = len(folder.finished())
    if done < job_plan.num_shards:
        raise UserError(
            f"{folder.store.url} has {done:,} of {counted(job_plan.num_shards, 'shard')}: finish the job "
            "first, by running it again"
        )
    unfinished = folder.unfinished_retry()
    if unfinished is not None:
        return Rejects(unfinished, begun=True)
    earlier = folder.retries()
    newest = {shard: retry.number for retry in earlier for shard in retry.shards.tolist()}
    store, format = folder.store, spec.output.format
    found = (rejects_index(job_plan, info.key) for info in store.list("rejects/"))
    shards = sorted({index for index in found if index is not None})

    def rejects(shard: int) -> tuple[Reject, ...]:
        with store.open(part_name(job_plan, shard, format, newest.get(shard, 0))) as file:
            return read_footer(file, format).rejects

    classes, refused, lines = Counter[str](), 0, []
    for shard, left in zip(shards, read_all(rejects, shards), strict=True):
        tried = [r.error_class for r in left if r.attempts and r.error_class != SizeError.__name__]
        classes.update(tried)
        refused += len(left) - len(tried)
        if tried:
            rows = len({reject.source for reject in left})
            lines.append({"shard": shard, "before": newest.get(shard, 0), "rows": rows})
    table = pa.Table.from_pylist(lines, schema=RetryPlan.SCHEMA)
    return Rejects(RetryPlan(len(earlier) + 1, table), classes, refused)


def read_rejected(
    store: Store, spec: JobSpec, job_plan: JobPlan, retry_plan: RetryPlan, index: int
) -> ShardRows:
    """Of a shard's rows those that the part before rejected. Raises as `read_shard` and `read_footer` do."""
    shard = job_plan.shard(index)
    read = read_shard(spec, job_plan.files[shard.file], shard.first_row, shard.num_rows)
    format = spec.output.format
    with store.open(part_name(job_plan, index, format, retry_plan.before(index))) as file:
        again = {reject.row_id for reject in read_footer(file, format).rejects}
    return replace(
        read,
        rows=[row for row in read.rows if row.row_id in again],
        rejects=[reject for reject in read.rejects if reject.row_id in again],
    )


def tolerating_rejects(spec: JobSpec) -> JobSpec:
    """The same spec without a limit of rejects: the rows of a retry were rejected before, so that nothing
    gets worse."""
    return spec.model_copy(update={"faults": spec.faults.model_copy(update={"max_reject_fraction": 1.0})})
