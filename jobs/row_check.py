"""Every row of a job looked at before it runs, for `overtone plan --check`: the sizes that the rows ask for,
those that will be rejected and why, and whether two have one name. Reads the columns that have a meaning and
no others; loads no model.

    found = check_rows(spec, job_plan, checkpoint)
    found.samples, found.rejects, found.lines()
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from overtone.jobs.errors import SizeError
from overtone.jobs.plan import JobPlan, Shard
from overtone.jobs.prompts import ShardRows, check_row_ids, in_threads, read_shard
from overtone.jobs.sampling import StagesUnknown, sampling_plan
from overtone.jobs.spec import JobSpec
from overtone.jobs.words import counted
from overtone.progressive.checkpoints import Checkpoint
from overtone.progressive.schedule import SamplingPlan

_SHOWN = 8
_NAMES_TOLD_SOON = 1_000_000
"""Rows whose names are compared in a second or two, so that it needs no asking."""
_SMALL_BYTES = 256 * 1024**2
_VALUE = re.compile(r"'[^']*'|\"[^\"]*\"|-?\d[\d,.]*")

Size = tuple[int | None, int | None]
"""Height and width in pixels as a row gives them; None: the job's own."""


def check_rows(spec: JobSpec, job_plan: JobPlan, checkpoint: Checkpoint | None) -> RowCheck:
    """Read every row as a worker would. PromptsError where two rows have one name, or a file is damaged.

    Where only the loaded model knows the stages (`StagesUnknown`; `checkpoint` may be None), its samples are
    counted in `RowCheck.unplanned`."""
    check_row_ids(spec, job_plan.files)
    sizes: Counter[Size] = Counter()
    examples: dict[Size, str] = {}
    reasons: dict[str, Reason] = {}
    for shard in _shards(spec, job_plan):
        for reject in shard.rejects:
            _count(reasons, reject.message, reject.row_id)
        for row in shard.rows:
            size = (row.height, row.width)
            sizes[size] += 1
            examples.setdefault(size, row.row_id)
    plans: dict[Size, tuple[SamplingPlan, int]] = {}
    unplanned = 0
    for size, count in sizes.most_common():
        try:
            height_px, width_px = size
            by_picture = spec.pictured and not (
                size != (None, None) or spec.sampling.height or spec.sampling.width
            )
            if checkpoint is None or by_picture:
                unplanned += count
                continue
            stages = sampling_plan(spec, checkpoint, height_px=height_px, width_px=width_px)
            plans[size] = stages, count
        except StagesUnknown:
            unplanned += count
        except SizeError as error:
            _count(reasons, str(error).removeprefix("sampling: "), examples[size], count)
    return RowCheck(
        sizes=tuple(_merged(plans.values())),
        reasons=tuple(sorted(reasons.values(), key=lambda reason: -reason.count)),
        limit=spec.faults.max_reject_fraction,
        unplanned=unplanned,
        by_pictures=spec.pictured,
    )


def names_told_soon(job_plan: JobPlan) -> bool:
    """Whether comparing the names of all rows takes no longer than planning did."""
    small = int(job_plan.files.size_bytes.sum()) <= _SMALL_BYTES
    return small and job_plan.num_rows <= _NAMES_TOLD_SOON


def _shards(spec: JobSpec, job_plan: JobPlan) -> Iterator[ShardRows]:
    def read(shard: Shard) -> ShardRows:
        file = replace(job_plan.files[shard.file], passthrough=pa.schema([]))
        return read_shard(spec, file, shard.first_row, shard.num_rows, with_pictures=False)

    with closing(in_threads(read, job_plan.shards())) as shards:
        yield from shards


def _count(reasons: dict[str, Reason], message: str, row_id: str, count: int = 1) -> None:
    """Add rejects to those of the same reason: messages that differ in the values that they show are one."""
    kind = _VALUE.sub("", message)
    before = reasons.setdefault(kind, Reason(message, row_id, 0))
    reasons[kind] = replace(before, count=before.count + count)


def _merged(plans: Any) -> list[SizeShare]:
    """One share for each size in pixels, the most frequent first: rows that name the job's own size and rows
    that leave it out are one."""
    found: dict[tuple[int, int], SizeShare] = {}
    for stages, count in plans:
        size = (stages.height_px, stages.width_px)
        before = found.get(size)
        found[size] = SizeShare(stages, count + (before.count if before else 0))
    return sorted(found.values(), key=lambda share: -share.count)


@dataclass(frozen=True)
class SizeShare:
    """The samples of one size."""

    sampling: SamplingPlan
    count: int


@dataclass(frozen=True)
class Reason:
    """The rejects of one kind."""

    message: str
    """Of the first of them."""
    row_id: str
    """Of the first of them."""
    count: int


@dataclass(frozen=True)
class RowCheck:
    """What all rows of a job ask for."""

    sizes: tuple[SizeShare, ...]
    """Of the samples that can be made."""
    reasons: tuple[Reason, ...]
    """Of the samples that cannot, as far as that shows without a model."""
    limit: float
    """`faults.max_reject_fraction`."""
    unplanned: int = 0
    """Samples whose size and stages only the loaded model tells, or the pictures that they start from."""
    by_pictures: bool = False
    """Rows start from pictures, which are not read here."""

    @property
    def samples(self) -> int:
        """That can be made."""
        return sum(share.count for share in self.sizes) + self.unplanned

    @property
    def rejects(self) -> int:
        return sum(reason.count for reason in self.reasons)

    @property
    def token_steps(self) -> int | None:
        """Of all samples; None where those of some are not known."""
        if self.unplanned:
            return None
        return sum(share.count * share.sampling.token_steps for share in self.sizes)

    @property
    def pixels(self) -> int:
        """Of all samples; a video's frames count once."""
        return sum(share.count * share.sampling.height_px * share.sampling.width_px for share in self.sizes)

    @property
    def stops_early(self) -> bool:
        """Whether so many rows are rejected that the job would end early."""
        return self.rejects > self.limit * (self.samples + self.rejects)

    def as_dict(self) -> dict[str, Any]:
        """The same as `lines`, as data, and all of it."""
        return {
            "samples": self.samples,
            "rejects": self.rejects,
            "stops_early": self.stops_early,
            "token_steps": self.token_steps,
            "unplanned": self.unplanned,
            "sizes": [
                {
                    "height": share.sampling.height_px,
                    "width": share.sampling.width_px,
                    "samples": share.count,
                    "stages": share.sampling.split,
                    "saving": share.sampling.saving,
                }
                for share in self.sizes
            ],
            "reasons": [
                {"message": reason.message, "row_id": reason.row_id, "rejects": reason.count}
                for reason in self.reasons
            ],
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        found = f"{counted(self.samples, 'row')} to make, {counted(self.rejects, 'reject')}, no name twice"
        lines = [f"every input row was read: {found}"]
        for share in self.sizes[:_SHOWN]:
            stages = share.sampling
            lines.append(
                f"  {share.count:>9,}  {stages.height_px}x{stages.width_px} px  {stages.split}  "
                f"speed-up {stages.saving:.2f}x"
            )
        if len(self.sizes) > _SHOWN:
            rest = sum(share.count for share in self.sizes[_SHOWN:])
            lines.append(f"  {rest:>9,}  of {len(self.sizes) - _SHOWN:,} more sizes")
        if self.unplanned:
            lines.append(
                f"  {self.unplanned:>9,}  whose size and stages are known once "
                + ("their pictures are read" if self.by_pictures else "the model is loaded")
            )
        for reason in self.reasons[:_SHOWN]:
            lines.append(f"  {reason.count:>9,}  rejected: {reason.message} ({reason.row_id}, for one)")
        if len(self.reasons) > _SHOWN:
            rest = sum(reason.count for reason in self.reasons[_SHOWN:])
            lines.append(f"  {rest:>9,}  rejected for {len(self.reasons) - _SHOWN:,} more reasons")
        if self.stops_early:
            lines.append(
                f"THE JOB WOULD END EARLY: more than faults.max_reject_fraction ({self.limit:g}) are rejected"
            )
        return lines
