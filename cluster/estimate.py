"""`overtone estimate`: how long a job takes and what it costs, from a few timed rows. Starts no Ray.

    profile = time_rows(spec, engine)               # a few rows, at `fullres` and at the job's own setting
    profile.save("h100.json")
    estimate(spec, profile=profile, price=2.5)      # or estimate(spec, engine): both in one

A worker's main thread encodes prompts, denoises and decodes, one batch after the other, and everything else
goes on beside it: so a job's time is that of its batches. (On a CPU, encoding pictures takes the same cores
and counts too.) Sizes that were not timed are taken to cost as much as their token-steps.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.runner import CPU_BATCH, Engine, compile_for
from jobs.errors import PromptsError, UserError
from jobs.media import encode_media
from jobs.plan import JobPlan, make_plan
from jobs.progress import duration
from jobs.prompts import read_shard
from jobs.rows import Row
from jobs.spec import JobSpec
from progressive.schedule import SamplingPlan
from progressive.settings import NO_CACHE, Sampling

FULLRES, CHOSEN = "fullres", "chosen"
_LOOK_AT_SHARDS = 16  # where a job's sizes are counted; spread over the job
_LEAST_BATCHES = 3  # timed a setting, or there is no telling how much they vary
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # 97.5 %, 1 to 10 degrees of freedom
_DRIFT = 0.02  # what a few minutes cannot show of a machine over days, as a share of the time

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Timed:
    """The batches of one setting and size that were timed."""

    setting: str
    """`fullres` or `chosen`."""
    height_px: int
    width_px: int
    split: str
    """Steps @ latent grid of each stage."""
    token_steps: int
    """Of one row."""
    rows: tuple[int, ...]
    """Of each batch."""
    seconds: tuple[float, ...]
    """Of each batch."""

    @property
    def seconds_per_row(self) -> float:
        return sum(self.seconds) / sum(self.rows)


@dataclass(frozen=True)
class Profile:
    """How fast one worker makes rows of one model with one setting: a measurement that can be kept."""

    model: str
    dtype: str
    sampling: dict[str, Any]
    device: str
    batch_size: int
    start_s: float
    """From the start of a worker to its first row; 0 where it was not timed."""
    timed: tuple[Timed, ...]

    def save(self, path: str | Path) -> None:
        """As JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """What `save` wrote; UserError for anything else."""
        try:
            values = json.loads(Path(path).read_text())
            timed = tuple(
                Timed(**one | {"rows": tuple(one["rows"]), "seconds": tuple(one["seconds"])})
                for one in values.pop("timed")
            )
            return cls(**values, timed=timed)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a profile that `overtone estimate --save` wrote: {error}"
            ) from error


@dataclass(frozen=True)
class Line:
    """What the whole job takes at one setting."""

    setting: str
    split: str
    """Steps @ latent grid of each stage, of the most frequent size."""
    seconds_per_row: float
    """Of one worker, on average over the job's sizes."""
    uncertainty: float
    """Half the 95 % interval of all times, as a share of them."""
    rows_per_hour: float
    """Of all workers."""
    worker_hours: float
    gpu_hours: float
    eta_s: float
    cost: float | None
    """GPU-hours times the price; None where no price was given."""


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
    """Of a GPU-hour."""
    predicted_saving: float
    """By token-steps alone."""
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
            ("seconds a row", *(f"{line.seconds_per_row:.3g} ± {line.uncertainty:.0%}" for line in both)),
            ("rows an hour", *(f"{line.rows_per_hour:,.0f}" for line in both)),
            ("GPU-hours", *(f"{line.gpu_hours:,.2f}" for line in both)),
            ("done in", *(_span(line) for line in both)),
        ]
        if self.price is not None:
            table.append(("cost", *(f"{line.cost or 0:,.2f} ± {line.uncertainty:.0%}" for line in both)))
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
            f"saving {self.saving:.2f}x ({self.predicted_saving:.2f}x by token-steps)",
        ]
        return "\n".join(lines)


def _span(line: Line) -> str:
    low, high = (line.eta_s * (1 + sign * line.uncertainty) for sign in (-1, 1))
    return f"{duration(line.eta_s)} ({duration(low)} to {duration(high)})"


# ---------------------------------------------------------------------------------------------- estimating


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
        engine: what times the rows; not needed where a `profile` is given.
        rows: rows to time, at each of the two settings.
        batch_size: rows denoised together; None: the spec's, and for `auto` what a CPU worker takes.
        workers: None: the spec's `max`, or else its `min`. Each is taken to be as fast as this one.
        price: of a GPU-hour, in any currency. A worker that reserves no GPU counts as one.
        start_s: what it takes to load the model.
        clock: seconds.

    UserError for a profile of another model or setting, and for prompts that cannot be used.
    """
    plan = make_plan(spec)
    sizes = job_sizes(spec, plan)
    if profile is None:
        if engine is None:
            raise ValueError("give an engine to time rows with, or a profile")
        profile = time_rows(
            spec, engine, rows, sizes=sizes, batch_size=batch_size, start_s=start_s, clock=clock
        )
    _check(profile, spec)
    workers = workers or spec.workers.max or spec.workers.min
    full, chosen = (
        _line(spec, plan, profile, sizes, setting, workers, price) for setting in (FULLRES, CHOSEN)
    )
    common = sizes.shares.most_common(1)[0][0]
    ideal = _timed(profile, FULLRES, common).token_steps / _timed(profile, CHOSEN, common).token_steps
    return Estimate(
        name=spec.name,
        model=spec.model.id,
        device=profile.device,
        rows=sizes.num_samples,
        shards=plan.num_shards,
        workers=workers,
        timed_rows=sum(sum(one.rows) for one in profile.timed if one.setting == CHOSEN),
        batch_size=profile.batch_size,
        start_s=profile.start_s,
        price=price,
        predicted_saving=ideal,
        fullres=full,
        chosen=chosen,
    )


@dataclass(frozen=True)
class Sizes:
    """What the job's rows ask for, as far as its shards were looked at."""

    rows: tuple[Row, ...]
    """The rows that were looked at, those that can be made."""
    shares: Counter[tuple[int | None, int | None]]
    """How many of them ask for each height and width in pixels; None: the job's own."""
    num_samples: int
    """Samples that the whole job makes."""
    exact: bool
    """All shards were looked at."""


def job_sizes(spec: JobSpec, plan: JobPlan) -> Sizes:
    """Sizes and number of the job's samples, from shards spread over it. PromptsError if there are none."""
    count = min(plan.num_shards, _LOOK_AT_SHARDS)
    rows: list[Row] = []
    inputs = 0
    for k in range(count):
        shard = plan.shard(k * plan.num_shards // count)
        read = read_shard(spec, plan.files[shard.file], shard.first_row, shard.num_rows)
        rows += read.rows
        inputs += shard.num_rows
    if not rows:
        raise PromptsError("none of the prompt table's rows that were looked at can be made")
    return Sizes(
        rows=tuple(rows),
        shares=Counter((row.height, row.width) for row in rows),
        num_samples=round(plan.num_rows * len(rows) / inputs),
        exact=count == plan.num_shards,
    )


def _check(profile: Profile, spec: JobSpec) -> None:
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
    own = [one for one in profile.timed if one.setting == setting]
    height, width = size
    exact = (o for o in own if height in (None, o.height_px) and width in (None, o.width_px))
    return next(exact, own[0])


def _line(
    spec: JobSpec,
    plan: JobPlan,
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
    rounds = math.ceil(plan.num_shards / workers)
    eta_s = profile.start_s + made_s * rounds / plan.num_shards
    busy = min(workers, plan.num_shards)
    worker_hours = (made_s + busy * profile.start_s) / 3600
    gpu_hours = worker_hours * (spec.workers.num_gpus or 1)
    return Line(
        setting=setting,
        split=_timed(profile, setting, sizes.shares.most_common(1)[0][0]).split,
        seconds_per_row=mean,
        uncertainty=uncertainty,
        rows_per_hour=3600 * busy / mean,
        worker_hours=worker_hours,
        gpu_hours=gpu_hours,
        eta_s=eta_s,
        cost=None if price is None else gpu_hours * price,
    )


def _seconds_per_row(profile: Profile, setting: str, size: tuple[int | None, int | None]) -> float:
    one = _timed(profile, setting, size)
    height, width = size[0] or one.height_px, size[1] or one.width_px
    # The same when the size was timed; else as many more as there are more pixels.
    return one.seconds_per_row * (height * width) / (one.height_px * one.width_px)


def _spread(profile: Profile, setting: str) -> float:
    """Half the 95 % interval of the mean time of a row (Student's t), as a share of it."""
    relative = [
        seconds / rows / one.seconds_per_row
        for one in profile.timed
        if one.setting == setting
        for seconds, rows in zip(one.seconds, one.rows, strict=True)
    ]
    if len(relative) < 2:
        return 1.0
    error = statistics.stdev(relative) / math.sqrt(len(relative))
    return _STUDENT[min(len(relative) - 2, len(_STUDENT) - 1)] * error


# -------------------------------------------------------------------------------------------------- timing


def time_rows(
    spec: JobSpec,
    engine: Engine,
    rows: int = 8,
    *,
    sizes: Sizes | None = None,
    batch_size: int | None = None,
    start_s: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Time a few of the job's rows at `fullres` and at its own setting, in batches as a worker makes them.

    Rows of the most frequent sizes, at most as many sizes as there are batches. Each size first runs one step
    on each grid that does not count; where the rows make fewer than three batches they are made again.
    """
    sizes = sizes or job_sizes(spec, make_plan(spec))
    given = spec.workers.batch_size
    batch_size = min(rows, batch_size or (given if isinstance(given, int) else CPU_BATCH))
    groups = _groups(sizes, rows, batch_size)
    fullres = Sampling.model_validate(
        spec.sampling.model_dump()
        | NO_CACHE
        | {"mode": "fullres", "levels": None, "scales": None, "transition_sigmas": None}
    )
    settings = {FULLRES: fullres, CHOSEN: spec.sampling}
    rounds = math.ceil(_LEAST_BATCHES / sum(map(len, groups)))
    timed: list[Timed] = []
    plans = {
        (setting, number): engine.plan(sampling, height_px=group[0][0].height, width_px=group[0][0].width)
        for setting, sampling in settings.items()
        for number, group in enumerate(groups)
    }
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in plans}
    for (setting, number), plan in plans.items():
        compile_for(engine, plan, len(groups[number][0]), settings[setting])
        _make(spec, engine, plan.one_step_each(), settings[setting], groups[number][0])
    for _ in range(rounds):  # the settings take turns: a machine that slows down does so for both
        for (setting, number), plan in plans.items():
            for batch in groups[number]:
                begin = clock()
                _make(spec, engine, plan, settings[setting], batch)
                seconds[setting, number].append(clock() - begin)
    for (setting, number), plan in plans.items():
        timed.append(
            Timed(
                setting=setting,
                height_px=plan.height_px,
                width_px=plan.width_px,
                split=plan.split,
                token_steps=plan.token_steps,
                rows=tuple(len(batch) for batch in groups[number]) * rounds,
                seconds=tuple(seconds[setting, number]),
            )
        )
    return Profile(
        model=spec.model.id,
        dtype=spec.model.dtype,
        sampling=spec.sampling.model_dump(mode="json"),
        device=_device(engine),
        batch_size=batch_size,
        start_s=start_s,
        timed=tuple(timed),
    )


def load_and_time(spec: JobSpec, rows: int = 8) -> Profile:
    """Load the spec's model as a worker does, timing that too, then `time_rows`."""
    from cluster.worker import load_engine  # which imports ray and torch

    sizes = job_sizes(spec, make_plan(spec))  # a mistake in the prompts shows before minutes of loading
    begin = time.perf_counter()
    engine = load_engine(spec)
    return time_rows(spec, engine, rows, sizes=sizes, start_s=time.perf_counter() - begin)


def _groups(sizes: Sizes, rows: int, batch_size: int) -> list[list[list[Row]]]:
    """Batches of rows, a list for each size, the most frequent size first; spread over what was looked at."""
    most = max(1, rows // batch_size)
    groups = []
    for size, _ in sizes.shares.most_common(most):
        own = [row for row in sizes.rows if (row.height, row.width) == size]
        count = min(len(own), max(batch_size, rows // min(most, len(sizes.shares))))
        spread = [own[k * len(own) // count] for k in range(count)]
        groups.append([spread[i : i + batch_size] for i in range(0, count, batch_size)])
    return groups


def _make(
    spec: JobSpec, engine: Engine, plan: SamplingPlan, sampling: Sampling, batch: Sequence[Row]
) -> None:
    """What a worker's main thread does for a batch; on a CPU also what its threads do on the same cores."""
    encoded = engine.encode([r.prompt for r in batch], [r.negative_prompt for r in batch], sampling)
    latents, _ = engine.denoise(plan, encoded, [row.seed for row in batch], sampling)
    media = engine.decode(plan, latents)
    if str(engine.device) == "cpu":
        for medium in media:
            encode_media(medium, spec.output)


def _device(engine: Engine) -> str:
    if not str(engine.device).startswith("cuda"):
        return "CPU"
    import torch

    return torch.cuda.get_device_name(engine.device)
