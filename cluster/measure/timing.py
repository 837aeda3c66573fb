"""How fast one worker makes a job's rows: a few of them are timed and kept as a profile. Knows no prices and
no other workers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from overtone.cluster.measure.drawing import device_name
from overtone.cluster.measure.pace import Countdown, OnProgress, Progress, silent
from overtone.cluster.measure.prompts import Sizes, job_sizes
from overtone.cluster.worker import CPU_BATCH, Engine, compile_for, encode_rows, load_engine, usual_plan
from overtone.jobs.errors import JobError, UserError
from overtone.jobs.media import encode_media
from overtone.jobs.plan import make_plan
from overtone.jobs.rows import Row
from overtone.jobs.spec import JobSpec
from overtone.progressive.schedule import SamplingPlan
from overtone.progressive.settings import NO_CACHE, Sampling

FULLRES, CHOSEN = "fullres", "chosen"
_LEAST_BATCHES = 3  # timed a setting, or there is no telling how much they vary


def load_and_time(
    spec: JobSpec, rows: int = 8, *, keep: Path | None = None, on_progress: OnProgress = silent
) -> Profile:
    """Load the spec's model as a worker does, timing that too, then `time_rows`."""
    sizes = job_sizes(spec, make_plan(spec))  # a mistake in the prompts shows before minutes of loading
    begin = time.perf_counter()
    on_progress(Progress(0, 0, f"loading {spec.model.id}", None))
    engine = load_engine(spec)
    usual_plan(engine, spec)
    start_s = time.perf_counter() - begin
    return time_rows(spec, engine, rows, sizes=sizes, start_s=start_s, keep=keep, on_progress=on_progress)


def time_rows(
    spec: JobSpec,
    engine: Engine,
    rows: int = 8,
    *,
    sizes: Sizes | None = None,
    batch_size: int | None = None,
    start_s: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    keep: Path | None = None,
    on_progress: OnProgress = silent,
) -> Profile:
    """Time a few of the job's rows at `fullres` and at its own setting, in batches as a worker makes them.

    The rows have the most frequent sizes, at most as many sizes as there are batches. Each size first runs
    one step on each grid, which does not count; rows that fill fewer than three batches are made several
    times.

    Ctrl-C ends it with what was timed until then, which is less sure; JobError where that is nothing. Where a
    folder to `keep` it in is given, the same command goes on from there.
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
    plans = {
        (setting, number): engine.plan(sampling, height_px=group[0][0].height, width_px=group[0][0].width)
        for setting, sampling in settings.items()
        for number, group in enumerate(groups)
    }
    steps = [
        (turn, setting, number, index)  # the settings take turns: a machine that slows down does so for both
        for turn in range(math.ceil(_LEAST_BATCHES / sum(map(len, groups))))
        for setting, number in plans
        for index in range(len(groups[number]))
    ]
    kept = _Kept(
        keep, [spec.samples(), spec.workers.model_dump(mode="json"), device_name(engine), rows, batch_size]
    )
    seconds: dict[_Step, float] = {}
    countdown = Countdown({step: _work(plans[step[1:3]]) * len(groups[step[2]][step[3]]) for step in steps})
    warm: set[tuple[str, int]] = set()
    try:
        for step in steps:
            _, setting, number, index = step
            plan, batch = plans[setting, number], groups[number][index]
            if step in kept.seconds:
                seconds[step] = kept.seconds[step]
                countdown.known(step)
                continue
            on_progress(
                countdown.progress(f"{len(batch)} rows, {setting}, {plan.height_px}x{plan.width_px} px")
            )
            if (setting, number) not in warm:
                warm.add((setting, number))
                compile_for(engine, plan, len(groups[number][0]), settings[setting])
                _make(spec, engine, plan.one_step_each(), settings[setting], groups[number][0])
            begin = clock()
            _make(spec, engine, plan, settings[setting], batch)
            seconds[step] = clock() - begin
            kept.save(seconds)
            countdown.done(step)
        kept.remove()
    except KeyboardInterrupt:
        if {setting for _, setting, _, _ in seconds} != {*settings}:
            raise JobError(f"interrupted before both settings were timed; {kept.advice}") from None
    timed = []
    for (setting, number), plan in plans.items():
        own = [step for step in steps if step[1:3] == (setting, number) and step in seconds]
        if own:
            timed.append(
                Timed(
                    setting=setting,
                    height_px=plan.height_px,
                    width_px=plan.width_px,
                    split=plan.split,
                    cost=plan.cost,
                    rows=tuple(len(groups[number][index]) for *_, index in own),
                    seconds=tuple(seconds[step] for step in own),
                )
            )
    return Profile(
        model=spec.model.id,
        dtype=spec.model.dtype,
        sampling=spec.sampling.model_dump(mode="json"),
        device=device_name(engine),
        batch_size=batch_size,
        start_s=start_s,
        timed=tuple(timed),
        interrupted=len(seconds) < len(steps),
    )


def _work(plan: SamplingPlan) -> float:
    """Of one row, in FLOPs, to compare one size with another."""
    return plan.cost * plan.step_cost.step(plan.stages[-1].tokens)


_Step = tuple[int, str, int, int]
"""The turn, the setting, the number of the size, and the number of its batch."""


class _Kept:
    """What was timed so far, in a file named after all that it depends on; it goes when all is timed. Where
    it cannot be written, nothing is kept."""

    def __init__(self, folder: Path | None, about: Any) -> None:
        digest = sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
        self._path = None if folder is None else folder / f"estimate-{digest}.partial.json"
        self.seconds: dict[_Step, float] = {}
        if self._path is not None:
            with suppress(OSError, ValueError, TypeError):
                self.seconds = {
                    (a, b, c, d): float(s) for (a, b, c, d), s in json.loads(self._path.read_text())
                }

    @property
    def advice(self) -> str:
        """What the same command will do."""
        return "run it again" if self._path is None or not self._path.exists() else "the same command goes on"

    def save(self, seconds: dict[_Step, float]) -> None:
        """Remember what is known now."""
        if self._path is not None:
            hidden = self._path.with_name(f".{self._path.name}")
            with suppress(OSError):
                hidden.write_text(json.dumps([*seconds.items()]))
                hidden.replace(self._path)

    def remove(self) -> None:
        """Forget it."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


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
    encoded = encode_rows(engine, batch, sampling)
    latents, _ = engine.denoise(plan, encoded, [row.seed for row in batch], sampling)
    media = engine.decode(plan, latents)
    if str(engine.device) == "cpu":
        for medium in media:
            encode_media(medium, spec.output)


@dataclass(frozen=True)
class Timed:
    """The batches of one setting and size that were timed."""

    setting: str
    """`fullres` or `chosen`."""
    height_px: int
    width_px: int
    split: str
    """Steps @ latent grid of each stage."""
    cost: float
    """Of one row, in full-size steps."""
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
    interrupted: bool = False
    """Fewer batches were timed than were meant to."""

    def to_json(self) -> str:
        """JSON that `load` reads."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """`to_json`, in a file."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """What `save` wrote; UserError for anything else."""
        try:
            values = json.loads(Path(path).read_text())
            for one in values["timed"]:
                if "token_steps" in one:  # of an older version, which counted image tokens alone
                    one["cost"] = float(one.pop("token_steps"))
            timed = tuple(
                Timed(**one | {"rows": tuple(one["rows"]), "seconds": tuple(one["seconds"])})
                for one in values.pop("timed")
            )
            return cls(**values, timed=timed)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a profile that `overtone estimate --save` wrote: {error}"
            ) from error
