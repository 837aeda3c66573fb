"""Ray workers and the driver that hands shards to them; and a generator for Ray Data pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.generator import ProgressiveGenerator

__all__ = ["ProgressiveGenerator"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # only when asked for: its imports take seconds
        from cluster import generator

        return getattr(generator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
