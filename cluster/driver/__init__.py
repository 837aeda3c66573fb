"""One run of a job: events to the dispatcher, actions to the workers."""

from __future__ import annotations

from overtone.cluster.driver.job import retry_job, run_job
from overtone.cluster.driver.summary import Summary

__all__ = [
    "Summary",
    "retry_job",
    "run_job",
]
