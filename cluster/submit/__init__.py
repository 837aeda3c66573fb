"""Jobs on a cluster without this terminal: Ray's job server."""

from __future__ import annotations

from overtone.cluster.submit.client import use_token
from overtone.cluster.submit.following import follow
from overtone.cluster.submit.package import packed_spec
from overtone.cluster.submit.start import logs, stop, submit

__all__ = [
    "follow",
    "logs",
    "packed_spec",
    "stop",
    "submit",
    "use_token",
]
