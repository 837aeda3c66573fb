"""`overtone tune`: the fastest setting at an acceptable loss, measured on a job's own prompts and hardware.

Runs `fullres` and a sweep of settings over the same few rows with the same seeds in one process, and
compares pictures. Starts no Ray: one engine, the one that a worker would hold.
"""

from __future__ import annotations

import fnmatch
import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

from cluster.runner import Engine, compile_for
from jobs.errors import PromptsError, UserError
from jobs.page import data_uri, page, style, svg
from jobs.plan import make_plan
from jobs.prompts import read_shard
from jobs.rows import Row
from jobs.spec import JobSpec
from progressive import quality
from progressive.schedule import SamplingPlan
from progressive.settings import NO_CACHE, Sampling

DELTAS = (0.01, 0.05, 0.10, 0.20)
CACHES: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("first_block", "cache_threshold", (0.05, 0.1)),
    ("taylorseer", "cache_interval", (3, 2)),
)
"""Step caches, with the field that says how much they leave out."""
FULLRES = "fullres"
Judge = Callable[[Image.Image, str], tuple[int, int]]
"""(objects drawn right, objects asked for) of a picture and its prompt."""
_JUDGEABLE_PERCENT = 50.0  # a model that draws less than this right at fullres loses little that a judge sees
_SHOWN_ROWS = 6  # pictures side by side in the report
_PICTURE_PX = 192
_DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "psnr_db": quality.psnr,
    "ssim": quality.ssim,
    "perceptual_distance": quality.perceptual_distance,
    "high_frequency_ratio": quality.high_frequency_ratio,
}


@dataclass(frozen=True)
class Setting:
    """One candidate: a name for people, the group that shares a mark in the plot, and what it means."""

    name: str
    group: str
    sampling: Sampling


@dataclass(frozen=True)
class Outcome:
    """What one setting gave. Distances are to the `fullres` pictures of the same rows; means over rows."""

    name: str
    group: str
    sampling: dict[str, Any]
    split: str
    """Steps @ latent grid of each stage, at the job's own size."""
    seconds_per_row: float
    """Denoising and expansions, without text encoding and decoding, which no setting changes."""
    saving: float
    predicted_saving: float
    """Full-resolution token-steps over the setting's."""
    psnr_db: float
    ssim: float
    perceptual_distance: float
    high_frequency_ratio: float
    judge_percent: float | None
    """Objects drawn right, percent; None where nothing can judge the model's pictures."""
    loss: float
    """Points of quality lost against `fullres`: see `Tuning.loss_metric`."""
    pareto: bool = False
    """No other setting is as fast and as close, and better in one of the two."""


@dataclass(frozen=True)
class Tuning:
    """The whole comparison. `choice` is the fastest outcome whose loss is at most `max_drop`."""

    model: str
    device: str
    rows: int
    num_steps: int
    loss_metric: str
    max_drop: float
    outcomes: tuple[Outcome, ...]
    choice: Outcome
    pictures: dict[str, list[Image.Image]] = field(repr=False, default_factory=dict)
    prompts: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All figures as data, without the pictures."""
        return {
            "model": self.model,
            "device": self.device,
            "rows": self.rows,
            "num_steps": self.num_steps,
            "loss_metric": self.loss_metric,
            "max_drop": self.max_drop,
            "choice": self.choice.name,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }

    def fragment(self) -> str:
        """The choice as YAML that can be pasted over a spec's `sampling` section."""
        return yaml.safe_dump({"sampling": self.choice.sampling}, sort_keys=False)

    def markdown(self) -> str:
        """The table as GitHub Markdown."""
        judged = self.outcomes[0].judge_percent is not None
        head = ["setting", "steps @ grid", *(["objects right"] if judged else [])]
        head += ["PSNR to fullres", "SSIM", "perceptual distance", "fine detail", "saving", "predicted"]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for outcome in self.outcomes:
            cells = [outcome.name, outcome.split]
            if judged:
                cells.append(f"{outcome.judge_percent:.1f} %")
            same = outcome.name == "fullres"
            cells += [
                "-" if same else f"{outcome.psnr_db:.1f} dB",
                "-" if same else f"{outcome.ssim:.3f}",
                "-" if same else f"{outcome.perceptual_distance:.3f}",
                f"{outcome.high_frequency_ratio:.2f}",
                f"{outcome.saving:.2f}x",
                f"{outcome.predicted_saving:.2f}x",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def text(self) -> str:
        """The table for a terminal, and what was chosen."""
        chosen = self.choice
        return (
            f"{self.markdown()}\n\nchosen: {chosen.name}, {chosen.saving:.2f}x as fast as fullres, loss "
            f"{chosen.loss:.2f} of at most {self.max_drop:g} ({self.loss_metric})"
        )

    def sheet(self, names: Sequence[str] = ()) -> bytes:
        """PNG of the shown prompts (columns) at some of the settings (rows); unset: `fullres` and the choice.

        KeyError for a name that is none of the settings'.
        """
        names = names or tuple(dict.fromkeys((self.outcomes[0].name, self.choice.name)))
        savings = {outcome.name: outcome.saving for outcome in self.outcomes}
        columns = len(self.prompts)
        figure = Figure(figsize=(1.7 * columns, 2.0 * len(names) + 0.5), dpi=110, layout="constrained")
        grid = figure.subplots(len(names), columns, squeeze=False)
        for row, name in zip(grid, names, strict=True):
            for axes, picture in zip(row, self.pictures[name], strict=True):
                axes.imshow(picture)
                axes.axis("off")
            row[0].set_title(f"{name}: {savings[name]:.2f}x", loc="left", fontsize=9)
        for axes, prompt in zip(grid[-1], self.prompts, strict=True):
            axes.text(
                0.5,
                -0.04,
                textwrap.fill(prompt, 24),
                transform=axes.transAxes,
                fontsize=6,
                ha="center",
                va="top",
            )
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
        return out.getvalue()

    def html(self) -> str:
        """One self-contained page: the table, quality against speed, and the pictures side by side."""
        return page(
            "cluster",
            "tune.html",
            tuning=self,
            plot=svg(_plot(self), "loss against saving"),
            fragment=self.fragment(),
            thumbnail=lambda picture: data_uri(picture, _PICTURE_PX),
        )


def sweep(base: Sampling, *, deltas: Sequence[float] = DELTAS) -> list[Setting]:
    """The candidates: `fullres` first; at each delta one level and the automatic ladder, in the modes
    `dct_rewind` and `dct_matched` with coupled noise, and in `dct_rewind` with fresh noise; and the automatic
    ladder at `base`'s delta with each step cache."""
    ladders: dict[str, dict[str, Any]] = {
        "one level": {"levels": 1, "scales": None},
        "auto ladder": {"levels": None, "scales": "auto"},
    }
    kinds: dict[str, dict[str, Any]] = {
        "": {"mode": "dct_rewind", "noise": "coupled"},
        "matched": {"mode": "dct_matched", "noise": "coupled"},
        "fresh noise": {"mode": "dct_rewind", "noise": "fresh"},
    }

    def setting(name: str, group: str, **changes: Any) -> Setting:
        plain = base.model_dump() | {"transition_sigmas": None} | NO_CACHE | changes
        return Setting(name, group, Sampling.model_validate(plain))

    found = [setting(FULLRES, FULLRES, mode="fullres", levels=None, scales=None)]
    for kind, how in kinds.items():
        for ladder, grids in ladders.items():
            group = f"{ladder}, {kind}" if kind else ladder
            for delta in deltas:
                name = ", ".join(part for part in (ladder, f"delta {delta:g}", kind) if part)
                found.append(setting(name, group, delta=delta, **how, **grids))
    for cache, key, values in CACHES:
        for value in values:
            name = f"auto ladder, {cache} {value:g}"
            how = kinds[""] | ladders["auto ladder"] | {"cache": cache, key: value}
            found.append(setting(name, f"auto ladder, {cache}", **how))
    return found


def named_like(settings: Sequence[Setting], patterns: Sequence[str]) -> list[Setting]:
    """`fullres` and the settings whose names match one of the patterns, as in a shell; without any, all.
    UserError for a pattern that none matches."""
    names = [setting.name for setting in settings]
    kept = {FULLRES} if patterns else {*names}
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise UserError(f"no setting is named like {pattern!r}; there are: {'; '.join(names)}")
        kept.update(found)
    return [setting for setting in settings if setting.name in kept]


def _possible(engine: Engine, setting: Setting) -> bool:
    if setting.sampling.cache == "none":
        return True
    try:
        engine.plan(setting.sampling)
    except ValueError:
        return False
    return True


def sample_rows(spec: JobSpec, count: int) -> list[Row]:
    """Up to `count` good rows, spread evenly over the prompt table. PromptsError where there is none."""
    plan = make_plan(spec)
    step = max(1, plan.num_shards // count)
    per_shard = -(-count // -(-plan.num_shards // step))  # rows over the shards that are looked at
    rows: list[Row] = []
    for index in range(0, plan.num_shards, step):
        shard = plan.shard(index)
        rows += read_shard(spec, plan.files[shard.file], shard.first_row, shard.num_rows).rows[:per_shard]
        if len(rows) >= count:
            break
    if not rows:
        raise PromptsError("none of the prompt table's rows that were looked at can be made")
    return rows[:count]


def tiny_judge(spec: JobSpec, rows: Sequence[Row]) -> Judge | None:
    """The picture world's own judge, where the job's model is the embedded one and draws captions of that
    world at its size; None elsewhere."""
    sizes = {(row.height or spec.sampling.height, row.width or spec.sampling.width) for row in rows}
    if spec.model.id != "tiny" or not sizes <= {(None, None), (256, 256), (256, None), (None, 256)}:
        return None
    from progressive.tiny import judge, world

    try:
        for row in rows:
            world.parse(row.prompt)
    except ValueError:
        return None
    return judge.judge


def tune(
    spec: JobSpec,
    engine: Engine,
    *,
    rows: int | Sequence[Row] = 16,
    batch_size: int = 8,
    max_drop: float = 1.0,
    settings: Sequence[Setting] | None = None,
    judge: Judge | None = None,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Tuning:
    """Run the sweep.

    Every setting sees the same rows, seeds and batches, in turns; one step on each of its grids is run first
    and thrown away, so that no setting pays for warming up. With a `judge` the loss is its drop in percentage
    points, without one 100 x the perceptual distance. The first of `settings` (unset: `sweep`) is what the
    others are compared to; step caches that the pipeline cannot have are left out. UserError for prompts that
    cannot be used, ValueError for sizes.
    """
    chosen = sample_rows(spec, rows) if isinstance(rows, int) else list(rows)
    candidates = [s for s in settings or sweep(spec.sampling) if _possible(engine, s)]
    tallies = [_Tally() for _ in candidates]
    batches = _batches(chosen, batch_size)
    warm: set[Any] = set()
    for number, (indices, *size) in enumerate(batches):
        batch = [chosen[i] for i in indices]
        encoded = engine.encode([r.prompt for r in batch], [r.negative_prompt for r in batch], spec.sampling)
        reference: list[Any] = []
        for setting, tally in zip(candidates, tallies, strict=True):  # they take turns: a machine that
            on_progress(setting.name, number, len(batches))  # slows down does so for all of them
            plan = engine.plan(setting.sampling, height_px=size[0], width_px=size[1])
            seeds = [row.seed for row in batch]
            if (setting.name, *size) not in warm:
                warm.add((setting.name, *size))
                compile_for(engine, plan, len(batch), setting.sampling)
                engine.denoise(plan.one_step_each(), encoded, seeds, setting.sampling)
            latents, reports = engine.denoise(plan, encoded, seeds, setting.sampling)
            media = engine.decode(plan, latents)
            reference = reference or list(media)
            tally.add(batch, plan, sum(report.seconds for report in reports), media, reference, judge)
    full, *_ = tallies
    # A judge that finds little right at fullres has nothing to count down from: it does not decide.
    full_judged = None if judge is None or full.judged < _JUDGEABLE_PERCENT else full.judged
    outcomes: list[Outcome] = []
    for setting, tally in zip(candidates, tallies, strict=True):
        distances = tally.distances()
        outcomes.append(
            Outcome(
                name=setting.name,
                group=setting.group,
                sampling=setting.sampling.model_dump(mode="json", exclude_defaults=True),
                split=engine.plan(setting.sampling).split,
                seconds_per_row=tally.seconds / len(chosen),
                saving=full.seconds / tally.seconds,
                predicted_saving=tally.full_token_steps / tally.token_steps,
                judge_percent=None if judge is None else tally.judged,
                loss=100 * distances["perceptual_distance"]
                if full_judged is None
                else full_judged - tally.judged,
                **distances,
            )
        )
    outcomes = mark_pareto(outcomes)
    choice = max((o for o in outcomes if o.loss <= max_drop), key=lambda o: o.saving, default=outcomes[0])
    cuda = str(engine.device).startswith("cuda")
    shown = [row for indices, *_ in batches for row in (chosen[i] for i in indices)][:_SHOWN_ROWS]
    return Tuning(
        model=spec.model.id,
        device=torch.cuda.get_device_name(engine.device) if cuda else "CPU",
        rows=len(chosen),
        num_steps=engine.plan(candidates[0].sampling).num_steps,
        loss_metric="100 x perceptual distance" if full_judged is None else "judge, percentage points",
        max_drop=max_drop,
        outcomes=tuple(outcomes),
        choice=choice,
        pictures={c.name: tally.pictures for c, tally in zip(candidates, tallies, strict=True)},
        prompts=tuple(row.prompt for row in shown),
    )


@dataclass
class _Tally:
    """What one setting has given so far. Keeps few pictures: a sweep over many rows needs no more memory."""

    seconds: float = 0.0
    token_steps: int = 0
    full_token_steps: int = 0
    right: int = 0
    asked: int = 0
    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in _DISTANCES})
    pictures: list[Image.Image] = field(default_factory=list)

    @property
    def judged(self) -> float:
        """Objects drawn right, percent."""
        return 100 * self.right / max(1, self.asked)

    def add(
        self,
        rows: Sequence[Row],
        plan: SamplingPlan,
        seconds: float,
        media: Sequence[Any],
        reference: Sequence[Any],
        judge: Judge | None,
    ) -> None:
        self.seconds += seconds
        self.token_steps += plan.token_steps * len(rows)
        self.full_token_steps += plan.fullres_token_steps * len(rows)
        self.pictures += [_still(medium) for medium in media[: _SHOWN_ROWS - len(self.pictures)]]
        for row, made, wanted in zip(rows, media, reference, strict=True):
            a, b = quality.as_tensor([made]), quality.as_tensor([wanted])
            for name, measure in _DISTANCES.items():
                self.values[name].append(float(measure(a, b).mean()))
            if judge is not None:
                right, asked = judge(made, row.prompt)
                self.right, self.asked = self.right + right, self.asked + asked

    def distances(self) -> dict[str, Any]:
        """Means over rows."""
        return {name: float(np.mean(found)) for name, found in self.values.items()}


_Batch = tuple[list[int], int | None, int | None]
"""Indices of rows of one size, and the size: height and width in pixels, None for the job's own."""


def _batches(rows: Sequence[Row], batch_size: int) -> list[_Batch]:
    sizes: dict[tuple[int | None, int | None], list[int]] = {}
    for index, row in enumerate(rows):
        sizes.setdefault((row.height, row.width), []).append(index)
    return [
        (indices[i : i + batch_size], *size)
        for size, indices in sizes.items()
        for i in range(0, len(indices), batch_size)
    ]


def mark_pareto(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Mark those that no other beats in both saving and loss."""
    return [
        replace(
            o,
            pareto=not any(
                p.saving >= o.saving and p.loss <= o.loss and (p.saving, p.loss) != (o.saving, o.loss)
                for p in outcomes
            ),
        )
        for o in outcomes
    ]


def _still(media: Any) -> Image.Image:
    """A picture, or the middle frame of a video."""
    return media if isinstance(media, Image.Image) else Image.fromarray(media[len(media) // 2])


def _plot(tuning: Tuning) -> Figure:
    """Loss against saving, the Pareto front joined up."""
    with style():
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        groups: dict[str, list[Outcome]] = {}
        for outcome in tuning.outcomes:
            groups.setdefault(outcome.group, []).append(outcome)
        for number, (label, group) in enumerate(groups.items()):
            marker = "Dos^vP*X"[number % 8]
            axes.scatter([o.saving for o in group], [o.loss for o in group], label=label, marker=marker, s=45)
        front = sorted((o for o in tuning.outcomes if o.pareto), key=lambda o: o.saving)
        losses = [o.loss for o in front]
        axes.plot([o.saving for o in front], losses, color="0.6", zorder=0, label="Pareto front")
        axes.axhline(tuning.max_drop, color="0.6", linestyle=":", label="max drop")
        axes.annotate(
            "chosen", (tuning.choice.saving, tuning.choice.loss), xytext=(8, 8), textcoords="offset points"
        )
        axes.set_xlabel("saving over fullres (measured)")
        axes.set_ylabel(f"loss ({tuning.loss_metric})")
        axes.legend()
    return figure
