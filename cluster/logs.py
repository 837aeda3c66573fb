"""A worker's log: every line says which job, worker, shard and attempt it is about. Knows no Ray.

    write_to(sys.stderr, job="flux-set", worker=3)
    with about(shard=42, attempt=1):                # holds for this thread, and what it hands its context to
        logging.getLogger(__name__).info("8 rows")  # ... job=flux-set worker=3 shard=42 attempt=1 ...: 8 rows

Libraries' lines get the same facts, because a handler adds them and not the one who logs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

FORMAT = (
    "%(asctime)s %(levelname)s job=%(job)s worker=%(worker)s shard=%(shard)s attempt=%(attempt)s "
    "%(name)s: %(message)s"
)

OURS = ("overtone",)
"""Loggers whose lines count from INFO on."""
AS_THEY_LOAD = (
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao",
    "transformers.utils.import_utils",
)
"""Loggers that warn, as the library is imported, of parts of it that nobody asked for."""
_about: ContextVar[tuple[int | str, int | str]] = ContextVar("about", default=("-", "-"))


@contextmanager
def about(shard: int, attempt: int) -> Iterator[None]:
    """What this thread logs meanwhile is about this attempt at this shard. A thread that it starts work in
    logs about the same if the work runs in a copy of its context (`contextvars.copy_context`)."""
    before = _about.get()
    _about.set((shard, attempt))
    try:
        yield
    finally:
        _about.set(before)  # not by a token: a generator may end in another context than it began in


class Facts(logging.Filter):
    """Lets every record through, with `job`, `worker`, `shard` and `attempt`; `-` outside of any attempt."""

    def __init__(self, job: str, worker: int) -> None:
        super().__init__()
        self._job, self._worker = job, worker

    def filter(self, record: logging.LogRecord) -> bool:
        record.job, record.worker = self._job, self._worker
        record.shard, record.attempt = _about.get()
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


def quiet_imports() -> None:
    """Let the libraries that a terminal's command loads say nothing of what they lack, below errors."""
    for name in AS_THEY_LOAD:
        logging.getLogger(name).setLevel(logging.ERROR)
