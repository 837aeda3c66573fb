"""TODO: jobs/words.py."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds as people read them: 42s, 3m 05s, 2h 10m, 3d 4h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600}h"
