"""Ctrl-C, and SIGTERM as `overtone stop` and Kubernetes send it: how a run is asked to end. Knows no job.

    with stoppable() as interrupts:         # both raise KeyboardInterrupt in the main thread from now on
        ...
        ray.init()                          # which puts a handler of its own in the place of ours
        interrupts.install()                # so that ours is set again
        interrupts.check()                  # KeyboardInterrupt, where the first one was lost

The exception ends whatever waits. Where somebody else's callback catches it, it is lost, but that it came is
remembered. In a thread other than the main one nothing is done, for no signal arrives there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from overtone.jobs.errors import JobError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stoppable() -> Iterator[Interrupts]:
    """Ctrl-C and SIGTERM end a run early, whatever it is at: JobError, where nothing nearer catches them."""
    with Interrupts() as interrupts:
        try:
            yield interrupts
        except KeyboardInterrupt:
            raise JobError("stopped; the same command again goes on where it ended") from None


class Interrupts:
    """While it is entered, the two signals end the run. What handled them before does so again afterwards."""

    def __init__(self) -> None:
        self._came = threading.Event()
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Interrupts:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def install(self) -> None:
        """Set the handlers, or set them again where somebody has replaced them."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.signal(number, self._interrupt)
                self._before.setdefault(number, before)

    def check(self) -> None:
        """KeyboardInterrupt where a signal has come."""
        if self._came.is_set():
            raise KeyboardInterrupt

    def _interrupt(self, *_: object) -> None:
        self._came.set()
        raise KeyboardInterrupt
