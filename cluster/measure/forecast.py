"""`overtone estimate`: how long a job takes and what it costs, from a few timed rows. Starts no Ray.

    profile = time_rows(spec, engine)               # a few rows, at `fullres` and at the job's own setting
    profile.save("h100.json")
    estimate(spec, profile=profile, price=2.5)      # or estimate(spec, engine): both in one

A worker's main thread encodes prompts, denoises and decodes, one batch after the other, while everything else
runs beside it: so a job's time is that of its batches. (On a CPU, encoding pictures takes the same cores and
counts too.) A size that was not timed is assumed to cost in proportion to its pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from overtone.cluster.measure.pace import half_width
from overtone.cluster.measure.prompts import Sizes, job_sizes
from overtone.cluster.measure.timing import CHOSEN, FULLRES, Profile, Timed, time_rows
from overtone.cluster.worker import Engine
from overtone.jobs.errors import UserError
from overtone.jobs.plan import JobPlan, make_plan
from overtone.jobs.spec import JobSpec
from overtone.jobs.words import duration

_MOST = 20.0  # of an uncertainty: beyond it nothing is known
_TIMED_ONCE = math.log(3)  # one batch tells little
_DRIFT = 0.02  # what a few minutes cannot show of a machine over days, as a share of the time


def estimate(
    spec: JobSpec,
    engine: Engine | None = None,
    rows: int = 8,
    *,
    profile: Profile | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    price: float | None = None,
    start_s: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Estimate:
    """Time and cost of a whole job.

    Args:
        engine: makes the rows that are timed; not needed where a `profile` is given.
        rows: rows to time, at each of the two settings.
        batch_size: rows denoised together; None: the spec's, and for `auto` what a CPU worker takes.
        workers: None: the spec's `max`, or else its `min`. Each is taken to be as fast as this one.
        price: of a GPU-hour, in any currency; where no GPU is used, of a CPU-hour, which is one core for an
            hour.
        start_s: what it takes to load the model.
        clock: seconds.

    UserError for a profile of another model or setting, and for prompts that cannot be used.
    """
    job_plan = make_plan(spec)
    sizes = job_sizes(spec, job_plan)
    if profile is None:
        if engine is None:
            raise ValueError("give an engine to time rows with, or a profile")
        profile = time_rows(
            spec, engine, rows, sizes=sizes, batch_size=batch_size, start_s=start_s, clock=clock
        )
    _check(profile, spec)
    workers = workers or spec.workers.max or spec.workers.min
    full, chosen = (
        _line(spec, job_plan, profile, sizes, setting, workers, price) for setting in (FULLRES, CHOSEN)
    )
    common = sizes.shares.most_common(1)[0][0]
    ideal = _timed(profile, FULLRES, common).cost / _timed(profile, CHOSEN, common).cost
    return Estimate(
        name=spec.name,
        model=spec.model.id,
        device=profile.device,
        rows=sizes.num_samples,
        shards=job_plan.num_shards,
        workers=workers,
        timed_rows=sum(sum(timed.rows) for timed in profile.timed if timed.setting == CHOSEN),
        batch_size=profile.batch_size,
        start_s=profile.start_s,
        price=price,
        predicted_saving=ideal,
        fullres=full,
        chosen=chosen,
    )


def _check(profile: Profile, spec: JobSpec) -> None:
    """UserError for a profile of another model, dtype or sampling."""
    wanted = {
        "model": spec.model.id,
        "dtype": spec.model.dtype,
        "sampling": spec.sampling.model_dump(mode="json"),
    }
    for key, value in wanted.items():
        if getattr(profile, key) != value:
            raise UserError(f"the profile was made with another {key} than the spec's; make a new one")


def _timed(profile: Profile, setting: str, size: tuple[int | None, int | None]) -> Timed:
    """The timing of a size, or of the one timed first (the most frequent)."""
    of_setting = [timed for timed in profile.timed if timed.setting == setting]
    height, width = size
    exact = (t for t in of_setting if height in (None, t.height_px) and width in (None, t.width_px))
    return next(exact, of_setting[0])


def _line(
    spec: JobSpec,
    job_plan: JobPlan,
    profile: Profile,
    sizes: Sizes,
    setting: str,
    workers: int,
    price: float | None,
) -> Line:
    seconds = {size: _seconds_per_row(profile, setting, size) for size in sizes.shares}
    total = sum(sizes.shares.values())
    mean = sum(seconds[size] * count for size, count in sizes.shares.items()) / total
    variance = sum(count * (seconds[size] - mean) ** 2 for size, count in sizes.shares.items()) / total
    of_sizes = 0.0 if sizes.exact else 1.96 * math.sqrt(variance / total) / mean
    uncertainty = math.hypot(_spread(profile, setting), of_sizes, _DRIFT)
    made_s = mean * sizes.num_samples
    # The last round of shards leaves workers idle, and a job of fewer shards than workers some all along.
    rounds = math.ceil(job_plan.num_shards / workers)
    eta_s = profile.start_s + made_s * rounds / job_plan.num_shards
    busy = min(workers, job_plan.num_shards)
    worker_hours = (made_s + busy * profile.start_s) / 3600
    gpus = spec.workers.num_gpus if spec.workers.num_gpus is not None else float(profile.device != "CPU")
    gpu_hours, cpu_hours = worker_hours * gpus, worker_hours * spec.workers.num_cpus
    return Line(
        setting=setting,
        split=_timed(profile, setting, sizes.shares.most_common(1)[0][0]).split,
        seconds_per_row=mean,
        uncertainty=uncertainty,
        rows_per_hour=3600 * busy / mean,
        worker_hours=worker_hours,
        gpu_hours=gpu_hours,
        cpu_hours=cpu_hours,
        eta_s=eta_s,
        cost=None if price is None else (gpu_hours or cpu_hours) * price,
    )


def _seconds_per_row(profile: Profile, setting: str, size: tuple[int | None, int | None]) -> float:
    timed = _timed(profile, setting, size)
    height, width = size[0] or timed.height_px, size[1] or timed.width_px
    # The same where the size was timed, otherwise in proportion to the pixels.
    return timed.seconds_per_row * (height * width) / (timed.height_px * timed.width_px)


def _spread(profile: Profile, setting: str) -> float:
    """Half the 95 % interval of the logarithm of the mean time of a row."""
    relative = [
        math.log(seconds / rows / timed.seconds_per_row)
        for timed in profile.timed
        if timed.setting == setting
        for seconds, rows in zip(timed.seconds, timed.rows, strict=True)
    ]
    spread = half_width(relative)
    return _TIMED_ONCE if spread is None else spread


@dataclass(frozen=True)
class Estimate:
    """A job's time and cost at full resolution and at its own setting."""

    name: str
    model: str
    device: str
    rows: int
    """Samples that the job makes."""
    shards: int
    workers: int
    timed_rows: int
    batch_size: int
    start_s: float
    price: float | None
    """Of a GPU-hour, or without GPUs of a CPU-hour."""
    predicted_saving: float
    """By what both cost in full-size steps, alone."""
    fullres: Line
    chosen: Line

    @property
    def saving(self) -> float:
        return self.fullres.seconds_per_row / self.chosen.seconds_per_row

    def as_dict(self) -> dict[str, Any]:
        """All figures as data."""
        return asdict(self) | {"saving": self.saving}

    def text(self) -> str:
        """For a terminal: both settings side by side."""
        both = (self.fullres, self.chosen)
        table: list[tuple[str, ...]] = [
            ("", "fullres", "this job"),
            ("steps @ grid", *(line.split for line in both)),
            ("seconds a row", *(_range(line, line.seconds_per_row, _three) for line in both)),
            ("rows an hour", *(_range(line, line.rows_per_hour, _whole) for line in both)),
            (
                "GPU-hours" if self.chosen.gpu_hours else "CPU-hours",
                *(_range(line, line.gpu_hours or line.cpu_hours, _cents) for line in both),
            ),
            ("done in", *(_range(line, line.eta_s, duration) for line in both)),
        ]
        if self.price is not None:
            table.append(("cost", *(_range(line, line.cost or 0, _cents) for line in both)))
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        lines = [
            f"{self.name}: {self.rows:,} rows in {self.shards:,} shards, {self.workers:,} "
            f"worker{'s' if self.workers != 1 else ''}; {self.model} on {self.device}",
            f"from {self.timed_rows} rows timed in batches of {self.batch_size}; a worker starts in "
            f"{duration(self.start_s)}",
            "",
            *(
                "  ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip()
                for r in table
            ),
            "",
            f"{self.saving:.2f}x as fast as fullres ({self.predicted_saving:.2f}x by full-size steps)",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Line:
    """The time and cost of the whole job at one setting."""

    setting: str
    split: str
    """Steps @ latent grid of each stage, of the most frequent size."""
    seconds_per_row: float
    """Of one worker, on average over the job's sizes."""
    uncertainty: float
    """Half the 95 % interval of the logarithm of all times: they are between `time * exp(-uncertainty)` and
    `time * exp(uncertainty)`, which is above zero however few rows were timed."""
    rows_per_hour: float
    """Of all workers."""
    worker_hours: float
    gpu_hours: float
    """Of what the workers reserve; 0: no GPU is used."""
    cpu_hours: float
    """Of the cores that the workers reserve."""
    eta_s: float
    cost: float | None
    """GPU-hours, or without GPUs CPU-hours, times the price; None where no price was given."""

    def interval(self, value: float) -> tuple[float, float]:
        """Between what a time of this line, or what is in proportion to it, is likely to be."""
        factor = math.exp(min(_MOST, self.uncertainty))
        return value / factor, value * factor


def _range(line: Line, value: float, shown: Callable[[float], str]) -> str:
    low, high = line.interval(value)
    return f"{shown(value)} ({shown(low)} to {shown(high)})"


def _three(value: float) -> str:
    return f"{value:.3g}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _cents(value: float) -> str:
    return f"{value:,.2f}"
