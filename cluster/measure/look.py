"""`overtone preview`: a few of a job's rows, made here before the job runs. Their pictures, where time went,
and what all rows would take at this rate; writes no output folder.

    found = preview_rows(spec, rows=8)
    Path("preview.html").write_text(found.html())
"""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image
from rich.columns import Columns
from rich.console import Console, Group
from rich.text import Text

from overtone.cluster.measure.drawing import Batch, device_name, in_batches
from overtone.cluster.measure.pace import Countdown, OnProgress, Progress, silent
from overtone.cluster.measure.prompts import job_sizes, naming_rows, sample_rows, spread_out
from overtone.cluster.measure.trial import still
from overtone.cluster.worker import CPU_BATCH, Engine, compile_for, encode_rows, load_engine, usual_plan
from overtone.jobs.errors import JobError
from overtone.jobs.media import encode_media
from overtone.jobs.plan import make_plan
from overtone.jobs.report import data_uri, page
from overtone.jobs.rows import Row
from overtone.jobs.spec import JobSpec
from overtone.jobs.words import counted, duration
from overtone.progressive.schedule import SamplingPlan

_PICTURE_PX = 512
_COLUMNS = 32
"""Width of a picture in a terminal, in characters."""


@dataclass(frozen=True)
class Shown:
    """One row as it was made."""

    row: Row
    media: Image.Image | np.ndarray
    """A picture, or a video: uint8 [frames, height, width, 3]."""
    plan: SamplingPlan
    seconds: float
    """Its share of its batch's: text, denoising, expansions and decoding."""

    @property
    def still(self) -> Image.Image:
        """The picture, or the middle frame."""
        return still(self.media)

    @property
    def steps(self) -> str:
        """Size and steps @ latent grid of each stage."""
        return f"{self.plan.width_px}x{self.plan.height_px} px, {self.plan.split}"


@dataclass(frozen=True)
class Look:
    """What a few rows say about a job."""

    spec: JobSpec
    device: str
    shown: tuple[Shown, ...]
    phases: dict[str, float]
    """Seconds a row of each phase, on average: `text_encode`, `denoise HxW` of each grid, `expand`,
    `vae_decode`."""
    samples: int
    """That the job will make."""
    load_s: float
    batch_size: int
    price: float | None
    """Of a GPU-hour, or of an hour of one CPU core."""

    @property
    def seconds_per_row(self) -> float:
        return sum(one.seconds for one in self.shown) / len(self.shown)

    @property
    def hours(self) -> float:
        """Of one such device for all rows."""
        return self.seconds_per_row * self.samples / 3600

    @property
    def cost_text(self) -> str:
        """What the job would take at this rate, as a sentence."""
        gpu = self.device != "CPU"
        number = (self.spec.workers.num_gpus or 1) if gpu else self.spec.workers.num_cpus
        said = (
            f"{self.seconds_per_row:.2f} s a row in batches of {self.batch_size} on {self.device}: "
            f"{counted(self.samples, 'row')} take {duration(self.hours * 3600)} on one worker"
        )
        if self.price is not None:
            cost, unit = self.hours * number * self.price, "GPU" if gpu else "core"
            said += f", {cost:,.2f} at {self.price:g} a {unit}-hour"
        return f"{said}; loading the model took {self.load_s:.0f} s"

    def text(self) -> str:
        """For a terminal: phases and cost."""
        whole = sum(self.phases.values()) or 1.0
        lines = [
            f"{name:<16} {took:8.3f} s a row  {100 * took / whole:3.0f} %"
            for name, took in self.phases.items()
        ]
        return "\n".join([*lines, self.cost_text])

    def html(self) -> str:
        """One self-contained page."""
        return page(
            "overtone.cluster", "preview.html", look=self, picture=_source, whole=sum(self.phases.values())
        )


def preview_rows(
    spec: JobSpec,
    rows: int = 8,
    *,
    engine: Engine | None = None,
    price: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    on_progress: OnProgress = silent,
) -> Look:
    """Make rows spread over the job's table, as a worker would, on this machine.

    `engine` None: the spec's model is loaded. Each size first runs one step on each grid, which does not
    count. Ctrl-C ends it with the rows that are there; JobError where there are none. UserError for prompts
    that cannot be used and settings that the model refuses, ModelError for a model that cannot be loaded.
    """
    sizes = job_sizes(spec, make_plan(spec))
    chosen = spread_out(sample_rows(spec, rows))
    begin = clock()
    if engine is None:
        on_progress(Progress(0, 0, f"loading {spec.model.id}", None))
        engine = load_engine(spec)
    usual_plan(engine, spec)
    load_s = clock() - begin
    given = spec.workers.batch_size
    batch_size = min(len(chosen), given if isinstance(given, int) else CPU_BATCH)
    batches = in_batches(chosen, batch_size)
    plans = {
        batch.size: engine.plan(spec.sampling, height_px=batch.size[0], width_px=batch.size[1])
        for batch in batches
    }
    countdown = Countdown({k: plans[b.size].cost * len(b.rows) for k, b in enumerate(batches)})
    shown: list[Shown] = []
    phases: Counter[str] = Counter()
    warm: set[Any] = set()
    try:
        for number, batch in enumerate(batches):
            plan = plans[batch.size]
            on_progress(countdown.progress(f"{len(batch.rows)} rows, {plan.width_px}x{plan.height_px} px"))
            if batch.size not in warm:
                warm.add(batch.size)
                compile_for(engine, plan, len(batch.rows), spec.sampling)
                with naming_rows(batch.rows):
                    _make(spec, engine, plan.one_step_each(), batch, clock)
            with naming_rows(batch.rows):
                media, seconds = _make(spec, engine, plan, batch, clock)
            share = sum(seconds.values()) / len(batch.rows)
            shown += [Shown(row, made, plan, share) for row, made in zip(batch.rows, media, strict=True)]
            phases.update(seconds)
            countdown.done(number)
    except KeyboardInterrupt:
        if not shown:
            raise JobError("interrupted before any row was made") from None
    return Look(
        spec=spec,
        device=device_name(engine),
        shown=tuple(shown),
        phases={name: took / len(shown) for name, took in phases.items()},
        samples=sizes.num_samples,
        load_s=load_s,
        batch_size=batch_size,
        price=price,
    )


def _make(
    spec: JobSpec, engine: Engine, plan: SamplingPlan, batch: Batch, clock: Callable[[], float]
) -> tuple[Sequence[Any], dict[str, float]]:
    """(what was made, seconds of each phase)."""
    rows, sampling, seconds = batch.rows, spec.sampling, dict[str, float]()
    begin = clock()
    encoded = encode_rows(engine, rows, sampling)
    seconds["text_encode"] = clock() - begin
    latents, reports = engine.denoise(plan, encoded, [row.seed for row in rows], sampling)
    for report in reports:
        name = f"denoise {report.height}x{report.width}" if report.kind == "denoise" else report.kind
        seconds[name] = seconds.get(name, 0.0) + report.seconds
    begin = clock()
    media = list(engine.decode(plan, latents))
    seconds["vae_decode"] = clock() - begin
    return media, seconds


def _source(spec: JobSpec, one: Shown) -> str:
    """The value of `src`."""
    if isinstance(one.media, Image.Image):
        return data_uri(one.media, _PICTURE_PX)
    return "data:video/mp4;base64," + base64.b64encode(encode_media(one.media, spec.output)).decode()


def show_pictures(console: Console, pictures: Sequence[tuple[Image.Image, str]]) -> None:
    """Pictures in a terminal, each with its caption, by textual-image: as pixels where it can show them
    (kitty's protocol, Sixel), else as coloured half blocks. Nothing where no terminal is looked at, and where
    textual-image is not installed."""
    if not console.is_terminal or find_spec("textual_image") is None:
        return
    width = min(_COLUMNS, console.width)
    try:
        # Asks the terminal what it can show when it is imported.
        from textual_image.renderable import Image as Shown

        cells = [
            Group(Shown(picture, width=width), Text(caption, overflow="ellipsis", no_wrap=True))
            for picture, caption in pictures
        ]
        console.print(Columns(cells, width=width, padding=(1, 2)))
    except Exception as error:  # noqa: BLE001 - whatever a terminal answers, what was made is not lost with it
        console.print(f"this terminal shows no pictures ({type(error).__name__}: {error})", style="dim")
