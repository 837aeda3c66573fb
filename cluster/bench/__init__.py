"""What a job costs besides generation: `python -m overtone.cluster.bench`, and `.jobs` and `.rate` of it."""

from __future__ import annotations

from overtone.cluster.bench.noop import noop_job
from overtone.cluster.bench.shards import commits, dispatch, main

__all__ = [
    "commits",
    "dispatch",
    "main",
    "noop_job",
]
