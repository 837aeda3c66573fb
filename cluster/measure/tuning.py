"""What a sweep of settings found, as data, Markdown, HTML and a sheet of pictures. Knows figures and
pictures, no engine."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import yaml
from matplotlib.figure import Figure
from PIL import Image

from overtone.jobs.report import data_uri, page, style, svg
from overtone.jobs.words import markdown_table

_PICTURE_PX = 192


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
    saving_error: float | None = None
    """Half the 95 % interval of the logarithm of `saving`; None: one batch alone was timed."""
    loss_error: float | None = None
    """Half the 95 % interval of `loss`, over rows; None: one row alone was made."""

    @property
    def saving_text(self) -> str:
        """The saving, and between which values it is likely to be."""
        if self.saving_error is None:
            return f"{self.saving:.2f}x (timed once)"
        low, high = (self.saving * math.exp(sign * min(9, self.saving_error)) for sign in (-1, 1))
        return f"{self.saving:.2f}x" if high - low < 0.01 else f"{self.saving:.2f}x ({low:.2f} to {high:.2f})"

    @property
    def loss_text(self) -> str:
        """The loss, and by how much it may be off."""
        return f"{self.loss:.2f}" + (f" ± {self.loss_error:.2f}" if self.loss_error else "")


@dataclass(frozen=True)
class Tuning:
    """The whole comparison. `choice` is the fastest outcome whose loss is at most `max_drop`; where that is
    `fullres` itself, `nearest` is the faster one that loses least."""

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
    nearest: Outcome | None = None
    measured: int = 0
    """Batches that were made, over all settings."""
    planned: int = 0
    """The same, of the whole sweep."""
    kept: str | None = None
    """Where an interrupted sweep has what it measured."""

    @property
    def complete(self) -> bool:
        """Whether the whole sweep was measured."""
        return self.measured == self.planned

    @property
    def suggested(self) -> Outcome:
        """The choice, or else the nearest."""
        return self.nearest or self.choice

    @property
    def trade_off(self) -> list[Outcome]:
        """The settings that no other beats, from close to fast, without `fullres`."""
        front = sorted((o for o in self.outcomes if o.pareto), key=lambda o: o.saving)
        return [o for o in front if o is not self.outcomes[0] and o.saving > 1]

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
            "nearest": None if self.nearest is None else self.nearest.name,
            "trade_off": [outcome.name for outcome in self.trade_off],
            "measured": self.measured,
            "planned": self.planned,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }

    def fragment(self) -> str:
        """The choice as YAML that can be pasted over a spec's `sampling` section; where there is none, the
        nearest, and above it what it costs."""
        notes = ""
        if not self.complete:
            notes += f"# {self._how_far()}\n"
        if self.nearest is not None:
            full = yaml.safe_dump(self.outcomes[0].sampling, default_flow_style=True, sort_keys=False).strip()
            notes += f"# {self._nothing_is_near()}; this is the nearest: {_worth(self.nearest)}\n"
            notes += f"# full resolution instead: sampling: {full}\n"
        return notes + yaml.safe_dump({"sampling": self.suggested.sampling}, sort_keys=False)

    def markdown(self) -> str:
        """The table as GitHub Markdown."""
        judged = self.outcomes[0].judge_percent is not None
        head = ["setting", "steps @ grid", *(["objects right"] if judged else [])]
        head += ["PSNR to fullres", "SSIM", "perceptual distance", "fine detail", "saving", "predicted"]
        rows = []
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
            rows.append(cells)
        return markdown_table(head, rows)

    def text(self) -> str:
        """The table for a terminal, and what was chosen or could be."""
        lines = [self.markdown(), ""]
        if not self.complete:
            lines += [self._how_far(), ""]
        if self.nearest is None:
            chosen = self.choice
            what = _worth(chosen) if chosen is not self.outcomes[0] else "nothing is faster"
            lines.append(f"chosen: {chosen.name}, {what}, of at most {self.max_drop:g} ({self.loss_metric})")
        else:
            lines.append(
                f"{self._nothing_is_near()}. The nearest is {self.nearest.name}: {_worth(self.nearest)}"
            )
            lines.append("from close to fast, the settings that no other beats:")
            lines += [f"  {outcome.name}: {_worth(outcome)}" for outcome in self.trade_off]
        return "\n".join(lines)

    def _how_far(self) -> str:
        return f"interrupted: {self.measured} of {self.planned} measurements, {self.rows} prompts"

    def _nothing_is_near(self) -> str:
        return f"nothing faster than fullres loses at most {self.max_drop:g} ({self.loss_metric})"

    def sheet(self, names: Sequence[str] = ()) -> bytes:
        """PNG of the shown prompts (columns) at some of the settings (rows); unset: `fullres` and the choice,
        or the nearest.

        KeyError for a name that is none of the settings'.
        """
        names = names or tuple(dict.fromkeys((self.outcomes[0].name, self.suggested.name)))
        savings = {outcome.name: outcome.saving for outcome in self.outcomes}
        columns = len(self.prompts)
        figure = Figure(figsize=(1.7 * columns, 2.0 * len(names) + 0.5), dpi=110, layout="constrained")
        grid = figure.subplots(len(names), columns, squeeze=False)
        for row, name in zip(grid, names, strict=True):
            for axes in row:
                axes.axis("off")
            # An interrupted sweep may have fewer pictures than prompts.
            for axes, picture in zip(row, self.pictures[name], strict=False):
                axes.imshow(picture)
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
            "overtone.cluster",
            "tune.html",
            tuning=self,
            plot=svg(_plot(self), "loss against saving"),
            fragment=self.fragment(),
            thumbnail=lambda picture: data_uri(picture, _PICTURE_PX),
        )


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


def _worth(outcome: Outcome) -> str:
    return f"{outcome.saving_text} as fast as fullres, loss {outcome.loss_text}"


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
            axes.errorbar(
                [o.saving for o in group],
                [o.loss for o in group],
                xerr=[
                    [o.saving * (1 - math.exp(-_shown(o))) for o in group],
                    [o.saving * math.expm1(_shown(o)) for o in group],
                ],
                yerr=[o.loss_error or 0.0 for o in group],
                label=label,
                marker=marker,
                markersize=6,
                linestyle="none",
                elinewidth=0.7,
            )
        front = sorted((o for o in tuning.outcomes if o.pareto), key=lambda o: o.saving)
        losses = [o.loss for o in front]
        axes.plot([o.saving for o in front], losses, color="0.6", zorder=0, label="Pareto front")
        axes.axhline(tuning.max_drop, color="0.6", linestyle=":", label="max drop")
        suggested, what = tuning.suggested, "chosen" if tuning.nearest is None else "nearest"
        axes.annotate(what, (suggested.saving, suggested.loss), xytext=(8, 8), textcoords="offset points")
        axes.set_xlabel("saving over fullres (measured)")
        axes.set_ylabel(f"loss ({tuning.loss_metric})")
        axes.legend()
    return figure


def _shown(outcome: Outcome) -> float:
    """The saving's error as a line in the plot, which one that spans the whole plot would only hide."""
    error = outcome.saving_error
    return 0.0 if error is None or error > 1 else error
