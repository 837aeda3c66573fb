"""How far a job is, as its driver shows it: a bar on a terminal, plain lines in a log. Knows no workers."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from overtone.jobs.words import counted, duration

_LINE_EVERY_S = 10.0
_RATE_OVER_S = 120.0


@dataclass(frozen=True)
class Snapshot:
    """A job at one moment."""

    rows_total: int
    """Input rows."""
    rows_done: int
    """Input rows that became rows or rejects, in this run or an earlier one."""
    rows_rejected: int
    """Rows that this run rejected."""
    shards_total: int
    shards_done: int
    workers_ready: int
    workers_starting: int
    retries: int
    """How often a shard was handed out again in this run."""
    note: str | None = None
    """A message that is shown once, on a line of its own."""
    unit: str = "row"
    """What is counted: `input row` where one may ask for several rows."""


class Progress:
    """It is called with each `Snapshot`, as often as one likes, and writes to `stream`, by default standard
    error.

    A terminal shows one line that stays. Otherwise a line is written every ten seconds at most, and one for
    each note.
    """

    def __init__(
        self,
        enabled: bool = True,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._enabled = enabled
        self._stream = stream or sys.stderr
        self._clock = clock
        self._rate = _Rate()
        self._last: Snapshot | None = None
        self._shown: Snapshot | None = None
        self._shown_at = -_LINE_EVERY_S
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        if self._enabled and self._stream.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[about]}"),
                console=Console(file=self._stream),
                transient=False,
            )
            self._bar.start()
        return self

    def __call__(self, snapshot: Snapshot) -> None:
        now = self._clock()
        self._rate.add(now, snapshot.rows_done)
        self._last = snapshot
        if not self._enabled:
            return
        if self._bar is not None:
            self._draw(snapshot)
        else:
            if snapshot.note:
                print(snapshot.note, file=self._stream, flush=True)
            if now - self._shown_at >= _LINE_EVERY_S:
                self._line(snapshot, now)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._enabled and self._last is not None and self._last != self._shown:
            self._line(self._last, self._clock())

    def _draw(self, snapshot: Snapshot) -> None:
        assert self._bar is not None, "drawn on a terminal only"
        about = _about(snapshot, self._rate.per_second())
        done = snapshot.rows_done
        if self._task is None:
            self._task = self._bar.add_task(
                f"{snapshot.unit}s", total=snapshot.rows_total, completed=done, about=about
            )
        self._bar.update(self._task, total=snapshot.rows_total, completed=done, about=about)
        if snapshot.note:
            self._bar.console.print(snapshot.note, markup=False, highlight=False)

    def _line(self, snapshot: Snapshot, now: float) -> None:
        done, total = snapshot.rows_done, snapshot.rows_total
        percent = 100 * done // total if total else 100
        about = _about(snapshot, self._rate.per_second())
        print(
            f"{done:,} of {counted(total, snapshot.unit)} ({percent}%), {about}",
            file=self._stream,
            flush=True,
        )
        self._shown, self._shown_at = snapshot, now


class _Rate:
    """Rows a second over the last minutes."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def add(self, now: float, rows: int) -> None:
        if self._points and self._points[-1][1] == rows and len(self._points) > 1:
            self._points[-1] = (now, rows)  # the time that passes counts, the points in between do not
        else:
            self._points.append((now, rows))
        while len(self._points) > 2 and now - self._points[1][0] > _RATE_OVER_S:
            self._points.popleft()

    def per_second(self) -> float | None:
        """None while nothing was made."""
        if len(self._points) < 2:
            return None
        (begin, before), (end, after) = self._points[0], self._points[-1]
        return (after - before) / (end - begin) if after > before and end > begin else None


def _about(snapshot: Snapshot, rows_per_second: float | None) -> str:
    left = snapshot.rows_total - snapshot.rows_done
    parts = []
    if rows_per_second is not None and left:
        parts += [f"{rows_per_second:.3g} rows/s", f"ETA {duration(left / rows_per_second)}"]
    workers = counted(snapshot.workers_ready, "worker")
    parts.append(workers + (f" (+{snapshot.workers_starting} starting)" if snapshot.workers_starting else ""))
    if snapshot.rows_rejected:
        parts.append(f"{snapshot.rows_rejected:,} rejected")
    if snapshot.retries:
        parts.append(counted(snapshot.retries, "retry", "retries"))
    return ", ".join(parts)
