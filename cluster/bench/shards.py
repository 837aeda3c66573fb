"""What a shard costs besides generation: `python -m overtone.cluster.bench`. Real Ray actors, no model.

Dispatch alone: the dispatcher and the fleet with workers that do nothing, not even read or commit, and say as
much of each shard as a real one does. Then whole jobs of one-row shards through `cluster.driver.run_job` with
an engine that does nothing, so that reading, encoding of a picture of 8 x 8 px and the commit on local disk
come to it. Then commits alone, in this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

from PIL import Image
from rich.console import Console
from rich.table import Table

from overtone.cluster.bench.cost import Dispatched, Measure, Stopwatch
from overtone.cluster.bench.noop import SIDE_PX, NoopWorker, noop_engine, noop_job
from overtone.cluster.connection import Connection
from overtone.cluster.dispatch import (
    Action,
    Assign,
    Dispatcher,
    Done,
    Flush,
    Rules,
    ShardCommitted,
    StartWorker,
)
from overtone.cluster.driver import run_job
from overtone.cluster.fleet import Fleet
from overtone.jobs.media import encode_media
from overtone.jobs.parts import AttemptFacts, Made, build_part, create_part, write_derived
from overtone.jobs.plan import make_plan
from overtone.jobs.prompts import read_shard
from overtone.jobs.store import open_store


def dispatch(folder: Path, *, shards: int, workers: int) -> Dispatched:
    """Dispatch shards that are nothing. `folder` must not hold a job yet. RuntimeError if any goes wrong."""
    spec = noop_job(folder, shards=shards, workers=workers)
    measure = Measure(shards)
    begin = time.perf_counter()
    plan = make_plan(spec)
    dispatcher = Dispatcher(
        num_shards=shards,
        num_rows=shards,
        rules=Rules(min_workers=workers, max_workers=workers, copies=False),
    )
    connection = Connection(spec)
    fleet = Fleet(connection, spec, plan, open_store(spec.output.path), worker_class=NoopWorker)
    fleet.take_up(0)
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


def _execute(fleet: Fleet, actions: Sequence[Action]) -> bool:
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
    measure = Measure(shards)
    begin = time.perf_counter()
    summary = run_job(
        spec, on_event=lambda snapshot: measure.note(snapshot.shards_done), engine_factory=noop_engine
    )
    if summary.exit_code or summary.rejects:
        raise RuntimeError(summary.text())
    return measure.dispatched("one row", workers, time.perf_counter() - begin)


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
    data = encode_media(Image.new("RGB", (SIDE_PX, SIDE_PX)), spec.output)
    commit, timings = Stopwatch(), Stopwatch()
    for shard in plan.shards():
        read = read_shard(spec, plan.files[shard.file], shard.first_row, shard.num_rows)
        with commit:
            part = build_part(
                spec,
                plan,
                shard,
                attempt=AttemptFacts(uuid4().hex, "bench", "cpu"),
                made=[Made(row, data, SIDE_PX, SIDE_PX, 1, (), 0.0) for row in read.rows],
                rejects=read.rejects,
                passthrough=read.passthrough,
                first_row=read.first_row,
                timings=[],
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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m overtone.cluster.bench", description=__doc__.splitlines()[0]
    )
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
