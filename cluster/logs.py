"""A worker's log: every line says which job, worker, shard and attempt it is about. Knows no Ray.

    write_to(sys.stderr, job="flux-set", worker=3)
    with about(shard=42, attempt=1):                # holds for this thread
        logging.getLogger(__name__).info("8 rows")  # ... job=flux-set worker=3 shard=42 attempt=1 ...: 8 rows

Libraries' lines get the same facts, because a handler adds them and not the one who logs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

FORMAT = (
    "%(asctime)s %(levelname)s job=%(job)s worker=%(worker)s shard=%(shard)s attempt=%(attempt)s "
    "%(name)s: %(message)s"
)

OURS = ("overtone",)
"""Loggers that tell more than warnings."""
_NOTHING = ("-", "-")
_thread = threading.local()


@contextmanager
def about(shard: int, attempt: int) -> Iterator[None]:
    """What this thread logs meanwhile is about this attempt at this shard."""
    before = getattr(_thread, "about", _NOTHING)
    _thread.about = (shard, attempt)
    try:
        yield
    finally:
        _thread.about = before


class Facts(logging.Filter):
    """Lets every record through, with `job`, `worker`, `shard` and `attempt`; `-` where none is at work."""

    def __init__(self, job: str, worker: int) -> None:
        super().__init__()
        self._job, self._worker = job, worker

    def filter(self, record: logging.LogRecord) -> bool:
        record.job, record.worker = self._job, self._worker
        record.shard, record.attempt = getattr(_thread, "about", _NOTHING)
        return True


def write_to(stream: TextIO, *, job: str, worker: int) -> logging.Handler:
    """Write this process's log to `stream`: our packages' from INFO on, everything else from WARNING on."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.addFilter(Facts(job, worker))
    logging.getLogger().addHandler(handler)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    return handler
