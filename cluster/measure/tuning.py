"""What a sweep of settings found, as data, Markdown, HTML and a sheet of pictures. Knows figures and
pictures, no engine."""

from __future__ import annotations

import io
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
