"""Prompt tables: which files a job reads, what their columns mean, and the rows of a shard. Knows no plan."""

from __future__ import annotations

from overtone.jobs.prompts.changes import file_changes
from overtone.jobs.prompts.given import GivenPictures
from overtone.jobs.prompts.input_file import FileList
from overtone.jobs.prompts.listing import in_threads, list_files
from overtone.jobs.prompts.shard import ShardRows, check_row_ids, expected_row_ids, read_shard
from overtone.jobs.prompts.values import samples

__all__ = [
    "FileList",
    "GivenPictures",
    "ShardRows",
    "check_row_ids",
    "expected_row_ids",
    "file_changes",
    "in_threads",
    "list_files",
    "read_shard",
    "samples",
]
