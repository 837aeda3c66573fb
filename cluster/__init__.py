"""Ray workers and the driver that hands shards to them; and a generator for Ray Data pipelines."""

from __future__ import annotations

from typing import Any

__all__ = ["ProgressiveGenerator"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # only when asked for: its imports take seconds
        from overtone.cluster import ray_data

        return getattr(ray_data, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
