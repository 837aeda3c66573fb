"""How fast one worker makes a job's rows: a few of them are timed and kept as a profile. Knows no prices and
no other workers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from overtone.cluster.measure.prompts import Sizes, job_sizes
from overtone.cluster.worker import CPU_BATCH, Engine, compile_for, load_engine
from overtone.jobs.errors import UserError
from overtone.jobs.media import encode_media
from overtone.jobs.plan import make_plan
from overtone.jobs.rows import Row
from overtone.jobs.spec import JobSpec
from overtone.progressive.schedule import SamplingPlan
from overtone.progressive.settings import NO_CACHE, Sampling

FULLRES, CHOSEN = "fullres", "chosen"
_LEAST_BATCHES = 3  # timed a setting, or there is no telling how much they vary


def load_and_time(spec: JobSpec, rows: int = 8) -> Profile:
    """Load the spec's model as a worker does, timing that too, then `time_rows`."""
    sizes = job_sizes(spec, make_plan(spec))  # a mistake in the prompts shows before minutes of loading
    begin = time.perf_counter()
    engine = load_engine(spec)
    return time_rows(spec, engine, rows, sizes=sizes, start_s=time.perf_counter() - begin)


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

    The rows have the most frequent sizes, at most as many sizes as there are batches. Each size first runs
    one step on each grid, which does not count; rows that fill fewer than three batches are made several
    times.
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


def _groups(sizes: Sizes, rows: int, batch_size: int) -> list[list[list[Row]]]:
    """Batches of rows, a list for each size, the most frequent size first; the rows are spread over those
    that were looked at."""
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
    """Do the work of a worker's main thread for a batch; on a CPU also that of its threads, which take the
    same cores."""
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
