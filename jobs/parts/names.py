"""TODO: jobs/parts/names.py."""

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


# Names


def part_name(plan: JobPlan | int, index: int, format: Format = "parquet", retry: int = 0) -> str:
    """`data/train-00042-of-00128.parquet` (or `.tar`); `plan` may be just the number of shards.

    Of a retry `data/train-00042-of-00128-retry-001.parquet`, which `datasets` counts to the same split. Past
    99,999 shards all numbers get more digits, so that names sort like shards.
    """
    num_shards, digits = _digits(plan)
    return f"data/train-{index:0{digits}}-of-{num_shards:0{digits}}{_suffix(retry)}.{_EXTENSION[format]}"


def timings_name(plan: JobPlan | int, index: int, retry: int = 0) -> str:
    """`timings/part-00042.parquet`, of a retry `timings/part-00042-retry-001.parquet`."""
    return f"timings/part-{index:0{_digits(plan)[1]}}{_suffix(retry)}.parquet"


def rejects_name(plan: JobPlan | int, index: int) -> str:
    """`rejects/part-00042.parquet`: those of the shard's newest part, whichever run made it."""
    return f"rejects/part-{index:0{_digits(plan)[1]}}.parquet"


def part_index(plan: JobPlan | int, key: str, retry: int = 0) -> int | None:
    """The shard whose part of this run has this name; None where it is no such part."""
    found = part_place(plan, key)
    return found[0] if found is not None and found[1] == retry else None


def part_place(plan: JobPlan | int, key: str) -> tuple[int, int] | None:
    """(shard, retry) of the part with this name; None where it is no part of such a plan."""
    match = _NAME.fullmatch(key)
    if match is None:
        return None
    index, retry = int(match[1]), int(match[2] or 0)
    known = index < _digits(plan)[0] and key == part_name(plan, index, part_format(key), retry)
    return (index, retry) if known else None


def timings_place(plan: JobPlan | int, key: str) -> tuple[int, int] | None:
    """(shard, retry) of the timings with this name; None where they are no such plan's."""
    match = _TIMINGS.fullmatch(key)
    if match is None:
        return None
    index, retry = int(match[1]), int(match[2] or 0)
    return (index, retry) if index < _digits(plan)[0] and key == timings_name(plan, index, retry) else None


def rejects_index(plan: JobPlan | int, key: str) -> int | None:
    """The shard whose rejects have this name; None where they are no such plan's."""
    match = _REJECTS.fullmatch(key)
    index = int(match[1]) if match else -1
    return index if 0 <= index < _digits(plan)[0] and key == rejects_name(plan, index) else None


def part_format(key: str) -> Format:
    """The format of a part by its name."""
    return "webdataset" if key.endswith(".tar") else "parquet"


def _suffix(retry: int) -> str:
    return f"-retry-{retry:03}" if retry else ""


def _digits(plan: JobPlan | int) -> tuple[int, int]:
    num_shards = plan if isinstance(plan, int) else plan.num_shards
    return num_shards, max(_DIGITS, len(str(num_shards)))
