"""What a shard costs besides generation: `python -m cluster.bench`. Real Ray actors, no model.

Dispatch alone: the dispatcher and the fleet with workers that do nothing, not even read or commit, and say as
much of each shard as a real one does. Then whole jobs of one-row shards through `cluster.driver.run_job` with
an engine that does nothing, so that reading, encoding of a picture of 8 x 8 px and the commit on local disk
come to it. Then commits alone, in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image
from rich.console import Console
from rich.table import Table

from cluster.dispatch import (
    Assign,
    Assignment,
    Dispatcher,
    Do,
    Done,
    Event,
    Flush,
    RowsDone,
    RowsStarted,
    Rules,
    ShardCommitted,
    ShardGenerated,
    StartWorker,
)
from cluster.driver import run_job
from cluster.fleet import Fleet
from cluster.worker import Ready, Worker, in_lists
from jobs.media import encode_media
from jobs.parts import Made, build_part, create_part, write_derived
from jobs.plan import make_plan
from jobs.prompts import read_shard
from jobs.spec import JobSpec
from jobs.store import open_store
from progressive.families import FAMILIES
from progressive.schedule import SamplingPlan, plan_sampling
from progressive.settings import Sampling

_MODEL = "black-forest-labs/FLUX.1-schnell"  # its configuration is known offline; nothing of it is loaded
_SIDE_PX = 8
_WARM = 0.1  # share of the shards before the clock starts: workers start one after the other


class NoopEngine:
    """An engine whose pictures are black and take no time."""

    device = "cpu"
    family = FAMILIES["flux1"]
    overlaps = False

    def plan(
        self, sampling: Sampling, *, height_px: int | None = None, width_px: int | None = None
    ) -> SamplingPlan:
        return plan_sampling(sampling, self.family, (1.0, 0.0), height_px=height_px, width_px=width_px)

    def encode(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        sampling: Sampling,
        *,
        known: Any = None,
    ) -> list[str]:
        return list(prompts)

    def begin(
        self, plan: SamplingPlan, encoded: list[str], seeds: Sequence[int], sampling: Sampling
    ) -> NoopTrajectories:
        return NoopTrajectories()

    def denoise(
        self, plan: SamplingPlan, encoded: list[str], seeds: Sequence[int], sampling: Sampling
    ) -> tuple[Any, list[Any]]:
        return NoopTrajectories().latents(range(len(seeds))), []

    def decode(self, plan: SamplingPlan, latents: Any) -> list[Image.Image]:
        return [Image.new("RGB", (_SIDE_PX, _SIDE_PX)) for _ in latents]


class NoopTrajectories:
    """Rows that need nothing done."""

    def run(self, index: int, rows: Sequence[int]) -> list[Any]:
        return []

    def latents(self, rows: Sequence[int]) -> Any:
        return np.zeros((len(rows), 1, 1, 1), np.float32)


def noop_engine(spec: JobSpec) -> NoopEngine:
    """The engine factory; by name, so that workers import it."""
    return NoopEngine()


class NoopWorker(Worker):
    """A worker whose shards are done at once: what is left is what a shard costs the driver and Ray."""

    def load(self, *_: Any, **__: Any) -> Ready:
        self._committing: Assignment | None = None
        return Ready(ray.get_runtime_context().get_node_id(), "cpu", os.getpid())

    def attempt(self, assignment: Assignment) -> Iterator[list[Event]]:
        yield from in_lists(self._events(assignment))

    def flush(self) -> Iterator[list[Event]]:
        yield from in_lists(self._committed())

    def _events(self, assignment: Assignment) -> Iterator[Event]:
        """Those of a shard of one row, whose commit goes on beside the next shard."""
        this = (self._worker, assignment.shard, assignment.attempt)
        yield RowsStarted(*this, ("row",))
        yield RowsDone(*this, ("row",))
        yield from self._committed()
        self._committing = assignment
        if assignment.next_shard is not None:
            yield ShardGenerated(*this)
        else:
            yield from self._committed()

    def _committed(self) -> Iterator[Event]:
        done, self._committing = self._committing, None
        if done is not None:
            yield ShardCommitted(self._worker, done.shard, done.attempt, 1, 0)


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


def dispatch(folder: Path, *, shards: int, workers: int) -> Dispatched:
    """Dispatch shards that are nothing. `folder` must not hold a job yet. RuntimeError if any goes wrong."""
    spec = noop_job(folder, shards=shards, workers=workers)
    measure = _Measure(shards)
    begin = time.perf_counter()
    plan = make_plan(spec)
    dispatcher = Dispatcher(
        num_shards=shards,
        num_rows=shards,
        rules=Rules(min_workers=workers, max_workers=workers, copies=False),
    )
    fleet = Fleet(spec, plan, open_store(spec.output.path), epoch=0, worker_class=NoopWorker)
    try:
        actions, done, ticked = dispatcher.begin(time.monotonic()), 0, time.monotonic()
        while _execute(fleet, actions):
            actions = []
            for event in fleet.poll(1.0):
                done += isinstance(event, ShardCommitted)
                measure.note(done)
                actions += dispatcher.handle(event, time.monotonic())
            if time.monotonic() - ticked >= 1.0:
                ticked = time.monotonic()
                actions += dispatcher.tick(ticked)
    finally:
        fleet.close()
    return measure.dispatched("nothing", workers, time.perf_counter() - begin)


def _execute(fleet: Fleet, actions: Sequence[Do]) -> bool:
    """False: all is done."""
    for action in actions:
        match action:
            case StartWorker():
                fleet.start(action.worker)
            case Assign():
                fleet.assign(action.worker, action.assignment)
            case Flush():
                fleet.flush(action.worker)
            case Done(failed=()):
                return False
            case _:
                raise RuntimeError(f"nothing goes wrong in a no-op shard, and yet: {action}")
    return True


def run_rows(folder: Path, *, shards: int, workers: int) -> Dispatched:
    """Run one job in `folder`, which must not hold one yet. RuntimeError if it does not end well."""
    spec = noop_job(folder, shards=shards, workers=workers)
    measure = _Measure(shards)
    begin = time.perf_counter()
    summary = run_job(
        spec, on_event=lambda snapshot: measure.note(snapshot.shards_done), engine_factory=noop_engine
    )
    if summary.exit_code or summary.rejects:
        raise RuntimeError(summary.text())
    return measure.dispatched("one row", workers, time.perf_counter() - begin)


class _Measure:
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


def noop_job(folder: Path, *, shards: int, workers: int) -> JobSpec:
    """A job of `shards` shards of one row each; writes its prompt table."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": [f"number {i}" for i in range(shards)]}), folder / "prompts.parquet")
    return JobSpec.model_validate(
        {
            "name": "bench",
            "model": _MODEL,
            "prompts": str(folder / "prompts.parquet"),
            "sampling": {"mode": "fullres"},
            "shards": 1,
            "workers": {"count": workers, "num_gpus": 0, "num_cpus": 0.5, "batch_size": 1},
            "output": str(folder / "out"),
        }
    )


@dataclass(frozen=True)
class Commits:
    """Commits on local disk, one after the other. Milliseconds a shard."""

    median_ms: float
    """Building the part and creating it."""
    p99_ms: float
    cpu_ms: float
    timings_median_ms: float
    """Writing the timings after that, which a worker does beside its next shard."""
    timings_cpu_ms: float


def commits(folder: Path, *, shards: int) -> Commits:
    """Commit `shards` parts of one row each in `folder`."""
    spec = noop_job(folder, shards=shards, workers=1)
    plan = make_plan(spec)
    store = open_store(spec.output.path)
    data = encode_media(Image.new("RGB", (_SIDE_PX, _SIDE_PX)), spec.output)
    commit, timings = _Stopwatch(), _Stopwatch()
    for shard in plan.shards():
        read = read_shard(spec, plan.files[shard.file], shard.first_row, shard.num_rows)
        with commit:
            part = build_part(
                spec,
                plan,
                shard,
                attempt=uuid4().hex,
                made=[Made(row, data, _SIDE_PX, _SIDE_PX, 1, (), 0.0) for row in read.rows],
                rejects=read.rejects,
                passthrough=read.passthrough,
                first_row=read.first_row,
                timings=[],
                worker="bench",
                device="cpu",
            )
            upload = create_part(store, part)
        assert upload is not None
        with timings:
            write_derived(store, part.footer, [upload])
    taken = sorted(commit.taken_ms)
    return Commits(
        median_ms=statistics.median(taken),
        p99_ms=taken[int(0.99 * shards)],
        cpu_ms=commit.cpu_ms / shards,
        timings_median_ms=statistics.median(timings.taken_ms),
        timings_cpu_ms=timings.cpu_ms / shards,
    )


class _Stopwatch:
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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m cluster.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=5000, help="of each job (default: 5000)")
    parser.add_argument("--workers", type=int, action="append", help="repeatable; default: 1 and 2")
    parser.add_argument("--commits", type=int, default=500, help="commits timed alone (default: 500)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="overtone-bench-") as folder:
        alone = commits(Path(folder, "commits"), shards=given.commits)
        runs = [
            run(Path(folder, f"{run.__name__}-{number}"), shards=given.shards, workers=workers)
            for run in (dispatch, run_rows)
            for number, workers in enumerate(given.workers or (1, 2))
        ]
    table = Table("a shard", "workers", "shards/s", "driver", "worker", "Ray", "memory")
    for run in runs:
        table.add_row(
            run.shard,
            str(run.workers),
            f"{run.shards_per_s:,.0f}",
            f"{run.driver_cpu_ms:.2f} ms",
            f"{run.worker_cpu_ms:.2f} ms",
            f"{run.ray_cpu_ms:.2f} ms",
            f"{run.driver_mib:,.0f} MiB (+{run.growth_mib:,.1f})",
        )
    console = Console()
    console.print(f"{given.shards:,} shards; CPU time a shard; the driver's memory, and by how much it grew")
    console.print(table)
    console.print(
        f"a commit alone on local disk: median {alone.median_ms:.2f} ms, 99 % within {alone.p99_ms:.2f} ms, "
        f"{alone.cpu_ms:.2f} ms of CPU; its timings, beside the next shard, {alone.timings_median_ms:.2f} ms"
    )
    if given.json:
        figures = {"runs": [asdict(run) for run in runs], "commits": asdict(alone)}
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
