"""What a worker's CPUs can take of a fast model: `python -m overtone.cluster.bench.rate`. Needs no GPU.

An engine that makes nothing but the pace (`--rate` pictures a second of 1024 x 1024 px) in the place of a
model, and all that a worker does with a picture after it: encoding, the Parquet part, its create on a disk or
an S3 server. First each of these alone, on one thread, for how much CPU and time a picture takes of it; then
a worker's whole run, for how many pictures a second come through it and how long the engine had to wait.

The pictures are smooth noise whose spectrum falls as photographs' do; `--pictures` names a folder of others.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from uuid import uuid4

from PIL import Image
from rich.console import Console
from rich.table import Table

from overtone.cluster.bench.cost import Stopwatch
from overtone.cluster.bench.paced import PacedEngine, paced_job, smooth_noise
from overtone.cluster.dispatch import Assignment, ShardFailed
from overtone.cluster.worker import ENCODERS, Runner
from overtone.jobs.media import encode_media
from overtone.jobs.parts import AttemptFacts, Made, build_part, create_part
from overtone.jobs.pictures import pictures as pictures_in
from overtone.jobs.plan import JobPlan, make_plan
from overtone.jobs.prompts import read_shard
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import Store, open_store

PNG: dict[str, dict[str, Any]] = {
    "zlib level 1": {"compress_level": 1},
    "zlib level 4": {"compress_level": 4},
    "zlib level 6": {"compress_level": 6},
    "run lengths (overtone)": {"compress_level": 1, "compress_type": 3},
}
"""Ways to compress a PNG, as Pillow's `save` takes them."""


@dataclass(frozen=True)
class Cost:
    """What a picture takes of one thing that is done with it, on one thread."""

    what: str
    cpu_ms: float
    wall_ms: float
    mib: float
    """Of its bytes afterwards."""


@dataclass(frozen=True)
class Run:
    """A worker that was given pictures at a rate."""

    rate: float
    """Asked for, in pictures a second."""
    reached: float
    """Pictures a second from the first to the last one's commit."""
    waited: float
    """Of the time, in [0, 1], in which the engine was not making pictures."""
    cpu_ms: float
    """A picture, of all threads."""
    cores: int
    """Of this machine, for this process."""

    @property
    def cores_needed(self) -> float:
        """At the rate, all of them busy with nothing else: extrapolated from the CPU time of a picture."""
        return self.rate * self.cpu_ms / 1000


def png_costs(pictures: Sequence[Image.Image]) -> list[Cost]:
    """What each way to compress a PNG takes; the pixels are the same in all."""

    def save(picture: Image.Image, **settings: Any) -> bytes:
        out = BytesIO()
        picture.save(out, "png", **settings)
        return out.getvalue()

    return [_cost(f"PNG, {name}", partial(save, **settings), pictures) for name, settings in PNG.items()]


def _cost(what: str, encode: Any, pictures: Sequence[Image.Image]) -> Cost:
    encode(pictures[0])
    watch, size = Stopwatch(), 0
    for picture in pictures:
        with watch:
            data = encode(picture)
        size += len(data)
    count = len(pictures)
    return Cost(what, watch.cpu_ms / count, sum(watch.taken_ms) / count, size / count / 2**20)


def thread_rates(pictures: Sequence[Image.Image], spec: JobSpec, threads: Sequence[int]) -> dict[int, float]:
    """Pictures a second that so many threads encode together."""
    rates = {}
    for count in threads:
        some = list(islice(cycle(pictures), max(len(pictures), 4 * count)))
        with ThreadPoolExecutor(count) as pool:
            begin = time.perf_counter()
            list(pool.map(partial(encode_media, output=spec.output), some))
            rates[count] = len(some) / (time.perf_counter() - begin)
    return rates


def part_costs(
    spec: JobSpec, job_plan: JobPlan, store: Store, pictures: Sequence[Image.Image]
) -> tuple[Cost, Cost]:
    """What a picture takes of the part of a shard, and of that part's create in the store."""
    built, created = Stopwatch(), Stopwatch()
    data = [encode_media(picture, spec.output) for picture in pictures]
    shard = job_plan.shard(job_plan.num_shards - 1)
    read = read_shard(spec, job_plan.files[shard.file], shard.first_row, shard.num_rows)
    made = [
        Made(row, one, picture.height, picture.width, 1, (), 0.0)
        for row, (picture, one) in zip(read.rows, cycle(zip(pictures, data, strict=True)), strict=False)
    ]
    with built:
        part = build_part(
            spec,
            job_plan,
            shard,
            attempt=AttemptFacts(uuid4().hex, "bench", "cpu"),
            made=made,
            rejects=read.rejects,
            passthrough=read.passthrough,
            first_row=read.first_row,
            timings=[],
        )
    with created:
        upload = create_part(store, part)
    if upload is None:
        raise RuntimeError(f"{store.url} has a part {part.key} already; name an empty folder or prefix")
    mib, rows = len(part.data) / len(made) / 2**20, len(made)
    return (
        Cost("part", built.cpu_ms / rows, built.taken_ms[0] / rows, mib),
        Cost("create", created.cpu_ms / rows, created.taken_ms[0] / rows, mib),
    )


def run(spec: JobSpec, job_plan: JobPlan, store: Store, engine: PacedEngine, rate: float) -> Run:
    """A worker's run over all shards but the last. RuntimeError where a shard is not made."""
    runner = Runner(spec, job_plan, store, engine)
    begin, cpu = time.perf_counter(), time.process_time()
    rows = 0
    try:
        for index in range(job_plan.num_shards - 1):
            rows += job_plan.shard(index).num_rows
            for event in runner.attempt(Assignment(shard=index, attempt=1)):
                if isinstance(event, ShardFailed):
                    raise RuntimeError(event.failure.message)
        for _ in runner.flush():
            pass
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    finally:
        runner.close()
    return Run(rate, rows / seconds, 1 - engine.made_s / seconds, 1000 * cpu / rows, _cores())


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m overtone.cluster.bench.rate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rate", type=float, default=50, help="pictures a second (default: 50)")
    parser.add_argument("--side", type=int, default=1024, help="of a picture, in pixels (default: 1024)")
    parser.add_argument("--rows", type=int, default=256, help="pictures of the run (default: 256)")
    parser.add_argument("--shard-rows", type=int, default=64, help="rows a shard (default: 64)")
    parser.add_argument("--output", help="an empty folder or s3://bucket/prefix; default: a temporary folder")
    parser.add_argument("--endpoint-url", help="of an S3 server other than AWS")
    parser.add_argument("--pictures", type=Path, help="a folder of pictures, or a data set's Parquet file")
    parser.add_argument("--num-pictures", type=int, default=8, help="different ones (default: 8)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="overtone-bench-") as folder:
        spec = paced_job(
            Path(folder),
            rows=given.rows,
            shard_rows=given.shard_rows,
            side_px=given.side,
            output=given.output,
            endpoint_url=given.endpoint_url,
        )
        job_plan = make_plan(spec)
        store = open_store(spec.output.path, endpoint_url=spec.output.endpoint_url)
        pictures = _pictures(given)
        alone = [*png_costs(pictures), *part_costs(spec, job_plan, store, pictures)]
        counts = sorted({1, 2, ENCODERS, _cores()})
        threads = thread_rates(pictures, spec, counts)
        ran = run(spec, job_plan, store, PacedEngine(pictures, given.rate), given.rate)
    _show(alone, threads, ran)
    if given.json:
        figures = {"costs": [asdict(one) for one in alone], "threads": threads}
        figures["run"] = asdict(ran) | {"cores_needed": ran.cores_needed}
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


def _pictures(given: argparse.Namespace) -> list[Image.Image]:
    if given.pictures is None:
        return [smooth_noise(seed, given.side) for seed in range(given.num_pictures)]
    found = (one for one in pictures_in([given.pictures]) if isinstance(one, Image.Image))
    return [one.resize((given.side, given.side)) for one in islice(found, given.num_pictures)]


def _show(alone: Sequence[Cost], threads: dict[int, float], ran: Run) -> None:
    console = Console(width=110, soft_wrap=True)
    costs = Table("a picture, on one thread", "CPU", "time", "bytes")
    for one in alone:
        costs.add_row(one.what, f"{one.cpu_ms:.1f} ms", f"{one.wall_ms:.1f} ms", f"{one.mib:.2f} MiB")
    console.print(costs)
    shown = ", ".join(f"{count}: {rate:.1f}" for count, rate in threads.items())
    console.print(f"pictures a second that are encoded, by threads: {shown}")
    console.print(
        f"a worker's run at {ran.rate:g} pictures a second: {ran.reached:.1f} reached on {ran.cores} cores, "
        f"its engine waited {ran.waited:.0%} of the time; {ran.cpu_ms:.0f} ms of CPU a picture"
    )
    console.print(
        f"{ran.rate:g} pictures a second need {ran.cores_needed:.1f} such cores, with nothing else on them: "
        "extrapolated from the CPU time of a picture"
    )
    limits = {"encoding": max(threads.values())}
    limits["part and create, one after the other"] = 1000 / sum(one.wall_ms for one in alone[-2:])
    first = min(limits, key=limits.__getitem__)
    console.print(
        "bounds here, in pictures a second: "
        + "; ".join(f"{what} {rate:.1f}" for what, rate in limits.items())
    )
    console.print(f"the first to bind is {first}")


if __name__ == "__main__":
    main()
