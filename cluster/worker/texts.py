"""The prompts of a batch encoded, with its pictures; those of the next one ahead where the engine allows.
Knows no attempts.

On a GPU that holds the whole model, a thread of its own encodes the next batch's prompts while this one is
denoised. Everywhere else each batch's prompts are encoded when it begins, in the calling thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from cachetools import LRUCache

from overtone.cluster.worker.protocol import Engine
from overtone.cluster.worker.starts import encode_rows
from overtone.jobs.rows import Row
from overtone.progressive.settings import Sampling

TEXTS = 64
"""Encoded prompts that are remembered, for those that come again. FLUX.1's take 4 MB each."""


@dataclass(frozen=True)
class Encoded:
    """What an engine made of some rows' prompts."""

    prompts: Any
    begin: float
    """Seconds since 1970."""
    seconds: float

    @property
    def truncated(self) -> Sequence[bool | None] | None:
        """For each row whether every text encoder cut its prompt; None: the engine does not tell."""
        return getattr(self.prompts, "truncated", None)


class Texts:
    """Encodes prompts, and remembers those that were used last."""

    def __init__(self, engine: Engine, sampling: Sampling) -> None:
        self._engine, self._sampling = engine, sampling
        self._thread = executor_beside(engine, "text")
        self._known: LRUCache[str, Any] = LRUCache(TEXTS)
        """Belongs to the thread."""
        self._ahead: tuple[tuple[Row, ...], Future[Encoded]] | None = None

    def encode(self, rows: Sequence[Row], upcoming: Sequence[Row] = ()) -> Encoded:
        """The rows' prompts; those of `upcoming`, which most likely come next, are begun."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == tuple(rows):
            encoding = ahead[1]
        else:
            encoding = self._thread.submit(self._encode, rows)
        if self._engine.overlaps and upcoming:
            self._ahead = tuple(upcoming), self._thread.submit(self._encode, upcoming)
        return encoding.result()

    def encode_all(self, rows: Sequence[Row]) -> Encoded:
        """The prompts of a whole shard in one call. All of them are remembered, for its batches."""
        return self._thread.submit(self._encode_all, rows).result()

    def _encode(self, rows: Sequence[Row]) -> Encoded:
        begin = time.time()
        encoded = encode_rows(self._engine, rows, self._sampling, self._known)
        return Encoded(encoded, begin, time.time() - begin)

    def _encode_all(self, rows: Sequence[Row]) -> Encoded:
        # Pictures have no turn here: each batch's are decoded when it begins.
        rows = [replace(row, image=None, mask=None) for row in rows]
        known: LRUCache[str, Any] = LRUCache(max(TEXTS, 2 * len(rows)))
        while self._known:
            text, encoded = self._known.popitem()  # the one that was used longest ago
            known[text] = encoded
        self._known = known
        return self._encode(rows)

    def close(self) -> None:
        self._thread.shutdown(wait=True)


def executor_beside(engine: Engine, name: str) -> Executor:
    """A thread beside the denoising, where the engine allows that."""
    return ThreadPoolExecutor(1, thread_name_prefix=name) if engine.overlaps else Inline()


class Inline(Executor):
    """Runs what is submitted at once, in the thread that submits it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - raised again by the future's `result`
            future.set_exception(error)
        return future
