"""Parts: the Parquet or tar object that a shard becomes, and what is derived from it. Knows no workers."""

from __future__ import annotations

from overtone.jobs.parts.build import AttemptFacts, Part, build_part
from overtone.jobs.parts.commit import create_part, rejects_table, write_derived
from overtone.jobs.parts.footer import Footer, StageTime, Timing, digest, package_versions
from overtone.jobs.parts.formats import read_footer, read_rows
from overtone.jobs.parts.names import (
    Format,
    part_format,
    part_index,
    part_name,
    part_place,
    rejects_index,
    rejects_name,
    timings_name,
    timings_place,
)
from overtone.jobs.parts.table import Made, PartRow, part_schema, rows_table, stored_schema

__all__ = [
    "AttemptFacts",
    "Footer",
    "Format",
    "Made",
    "Part",
    "PartRow",
    "StageTime",
    "Timing",
    "build_part",
    "create_part",
    "digest",
    "package_versions",
    "part_format",
    "part_index",
    "part_name",
    "part_place",
    "part_schema",
    "read_footer",
    "read_rows",
    "rejects_index",
    "rejects_name",
    "rejects_table",
    "rows_table",
    "stored_schema",
    "timings_name",
    "timings_place",
    "write_derived",
]
