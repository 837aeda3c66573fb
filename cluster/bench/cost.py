"""What is spent on shards: seconds, CPU time by process, memory. Knows no jobs.

    measure = Measure(shards=5000)
    measure.note(done)                                  # as often as any shard is done
    measure.dispatched("one row", workers=2, seconds=70.0)

The first tenth of the shards is left out: workers start one after the other.
"""

from __future__ import annotations

import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import psutil

_WARM = 0.1
"""Share of the shards before the clock starts."""


@dataclass(frozen=True)
class Dispatched:
    """Many shards, dispatched."""

    shard: Literal["nothing", "one row"]
    """What a shard is: see the module."""
    workers: int
    shards: int
    seconds: float
    """From start to end, Ray's own start included."""
    shards_per_s: float
    """In steady state: after the first tenth of the shards."""
    driver_cpu_ms: float
    """CPU time of the driver's process, a shard. This and the next two in steady state, too: unlike seconds,
    they mean something on a machine that does other things as well."""
    worker_cpu_ms: float
    """Of the workers' processes: reading, encoding, the part, its commit, unless a shard is nothing."""
    ray_cpu_ms: float
    """Of Ray's own processes."""
    driver_mib: float
    """Largest memory of the driver's process."""
    growth_mib: float
    """How much of that was added after the first tenth of the shards."""


class Measure:
    """What was spent between the first tenth of the shards and the last."""

    def __init__(self, shards: int) -> None:
        self._shards = shards
        self._seen: list[_Point] = []

    def note(self, done: int) -> None:
        warm = done >= _WARM * self._shards and len(self._seen) < 2
        if not self._seen or warm or (done == self._shards and done > self._seen[-1].shards):
            self._seen.append(_Point.now(done))

    def dispatched(self, shard: Literal["nothing", "one row"], workers: int, seconds: float) -> Dispatched:
        last = self._seen[-1]
        first = next(point for point in reversed(self._seen) if point.shards < last.shards)
        done = last.shards - first.shards
        return Dispatched(
            shard=shard,
            workers=workers,
            shards=self._shards,
            seconds=seconds,
            shards_per_s=done / (last.at - first.at),
            driver_cpu_ms=1000 * (last.driver_s - first.driver_s) / done,
            worker_cpu_ms=1000 * (last.worker_s - first.worker_s) / done,
            ray_cpu_ms=1000 * (last.ray_s - first.ray_s) / done,
            driver_mib=last.mib,
            growth_mib=last.mib - first.mib,
        )


@dataclass(frozen=True)
class _Point:
    """A moment of a job: shards done, CPU seconds so far, memory of the driver at most."""

    at: float
    shards: int
    driver_s: float
    worker_s: float
    ray_s: float
    mib: float

    @classmethod
    def now(cls, shards: int) -> _Point:
        spent = {True: 0.0, False: 0.0}  # of workers, of what else Ray runs
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                times, title = process.cpu_times(), "".join(process.cmdline()[:1])
                spent[title.startswith("ray::") and "Worker" in title] += times.user + times.system
        return cls(time.perf_counter(), shards, time.process_time(), spent[True], spent[False], _peak_mib())


class Stopwatch:
    """Adds up what is done in `with`: wall times, and CPU time of this process."""

    def __init__(self) -> None:
        self.taken_ms: list[float] = []
        self.cpu_ms = 0.0

    def __enter__(self) -> None:
        self._begin = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._begin
        self.cpu_ms += 1000 * (time.process_time() - cpu)
        self.taken_ms.append(1000 * (time.perf_counter() - wall))


def _peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
