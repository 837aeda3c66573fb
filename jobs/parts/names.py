"""The names of parts, timings and rejects: from a shard's number to a name, and back. Knows no contents.

`job_plan` may be the number of shards alone, for that is all that names depend on.
"""

from __future__ import annotations

import re
from typing import Literal

from overtone.jobs.plan import JobPlan

Format = Literal["parquet", "webdataset"]
_DIGITS = 5
_EXTENSION: dict[Format, str] = {"parquet": "parquet", "webdataset": "tar"}
_NAME = re.compile(r"data/train-(\d{5,})-of-\d{5,}(?:-retry-(\d{3,}))?\.(?:parquet|tar)")
_TIMINGS = re.compile(r"timings/part-(\d{5,})(?:-retry-(\d{3,}))?\.parquet")
_REJECTS = re.compile(r"rejects/part-(\d{5,})\.parquet")


def part_name(job_plan: JobPlan | int, index: int, format: Format = "parquet", retry: int = 0) -> str:
    """`data/train-00042-of-00128.parquet` (or `.tar`).

    A retry's part is `data/train-00042-of-00128-retry-001.parquet`, which `datasets` counts to the same
    split. Past 99,999 shards all numbers have more digits, so that names sort like shards.
    """
    num_shards, digits = _digits(job_plan)
    return f"data/train-{index:0{digits}}-of-{num_shards:0{digits}}{_suffix(retry)}.{_EXTENSION[format]}"


def timings_name(job_plan: JobPlan | int, index: int, retry: int = 0) -> str:
    """`timings/part-00042.parquet`; those of a retry are `timings/part-00042-retry-001.parquet`."""
    return f"timings/part-{index:0{_digits(job_plan)[1]}}{_suffix(retry)}.parquet"


def rejects_name(job_plan: JobPlan | int, index: int) -> str:
    """`rejects/part-00042.parquet`: the rejects of the shard's newest part, which the job or a retry made."""
    return f"rejects/part-{index:0{_digits(job_plan)[1]}}.parquet"


def part_index(job_plan: JobPlan | int, key: str, retry: int = 0) -> int | None:
    """The shard whose part has this name, of this retry (0: of the job); None where it is no such part."""
    found = part_place(job_plan, key)
    return found[0] if found is not None and found[1] == retry else None


def part_place(job_plan: JobPlan | int, key: str) -> tuple[int, int] | None:
    """(shard, retry) of the part with this name; None where it is no part of such a plan."""
    match = _NAME.fullmatch(key)
    if match is None:
        return None
    index, retry = int(match[1]), int(match[2] or 0)
    known = index < _digits(job_plan)[0] and key == part_name(job_plan, index, part_format(key), retry)
    return (index, retry) if known else None


def timings_place(job_plan: JobPlan | int, key: str) -> tuple[int, int] | None:
    """(shard, retry) of the timings with this name; None where they are not of such a plan."""
    match = _TIMINGS.fullmatch(key)
    if match is None:
        return None
    index, retry = int(match[1]), int(match[2] or 0)
    known = index < _digits(job_plan)[0] and key == timings_name(job_plan, index, retry)
    return (index, retry) if known else None


def rejects_index(job_plan: JobPlan | int, key: str) -> int | None:
    """The shard whose rejects have this name; None where they are not of such a plan."""
    match = _REJECTS.fullmatch(key)
    index = int(match[1]) if match else -1
    return index if 0 <= index < _digits(job_plan)[0] and key == rejects_name(job_plan, index) else None


def part_format(key: str) -> Format:
    """The format of a part, by its name."""
    return "webdataset" if key.endswith(".tar") else "parquet"


def _suffix(retry: int) -> str:
    return f"-retry-{retry:03}" if retry else ""


def _digits(job_plan: JobPlan | int) -> tuple[int, int]:
    num_shards = job_plan if isinstance(job_plan, int) else job_plan.num_shards
    return num_shards, max(_DIGITS, len(str(num_shards)))
