"""How far a job is, from its folder alone, and while it runs."""

from __future__ import annotations

from overtone.jobs.status.live import watch
from overtone.jobs.status.progress import Progress, Snapshot
from overtone.jobs.status.reader import rejects_by_class, status

__all__ = [
    "Progress",
    "Snapshot",
    "rejects_by_class",
    "status",
    "watch",
]
