"""What a search of settings found, as data and as text. Knows figures, no engine and no pictures but those to
be shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import yaml
from PIL import Image

from overtone.cluster.measure.worth import Gain
from overtone.jobs.words import counted, markdown_table


@dataclass(frozen=True)
class Outcome:
    """What one setting gave on the rows it was drawn on; means over these rows. The reference is full
    resolution at the spec's own number of steps, called `fullres`, on the same rows."""

    name: str
    group: str
    sampling: dict[str, Any]
    split: str
    """Steps @ latent grid of each stage, at the most frequent size."""
    num_steps: int
    plain: bool
    """Whether it is full resolution without a step cache."""
    rows: int
    cost: float
    """Of a row, in full-size steps."""
    seconds_per_row: float
    """Denoising and expansions, without text encoding and decoding, which no setting changes."""
    saving: float
    """Seconds of the reference over this one's."""
    predicted_saving: float
    """Cost of as many steps at full resolution, over this one's."""
    psnr_db: float
    """Fidelity, as the three that follow: to the reference's pictures."""
    ssim: float
    perceptual_distance: float
    high_frequency_ratio: float
    judge_percent: float | None
    """Things drawn right, percent; None where nothing can judge the model's pictures."""
    quality: float | None
    """The scorer's mean; None where fidelity decides."""
    loss: float
    """By how much less it scores than the reference: see `Tuning.loss_metric`."""
    gain: Gain | None
    """At equal quality; None where it is not known."""
    pareto: bool = False
    """No other setting with all rows is as cheap and as good, and better in one of the two."""
    saving_error: float | None = None
    """Half the 95 % interval of the logarithm of `saving`; None: one batch alone was timed."""
    loss_error: float | None = None
    """Half the 95 % interval of `loss`, a paired bootstrap's over rows; None: one row alone was made."""
    also: tuple[str, ...] = ()
    """Other names: settings that come to the same steps on the same grids."""
    left_out: str = ""
    """Why it was not drawn on all rows; empty where it was."""

    @property
    def saving_text(self) -> str:
        """The saving, and between which values it is likely to be."""
        if self.saving_error is None:
            return f"{self.saving:.2f}x (timed once)"
        if self.saving_error > 1:
            return f"{self.saving:.2f}x (timed too little)"
        low, high = (self.saving * math.exp(sign * self.saving_error) for sign in (-1, 1))
        return f"{self.saving:.2f}x" if high - low < 0.01 else f"{self.saving:.2f}x ({low:.2f} to {high:.2f})"

    @property
    def loss_text(self) -> str:
        """The loss, and by how much it may be off."""
        return f"{self.loss:.2f}" + (f" ± {self.loss_error:.2f}" if self.loss_error else "")

    @property
    def gain_text(self) -> str:
        return "-" if self.gain is None else self.gain.text


@dataclass(frozen=True)
class Answer:
    """The cheapest setting that loses at most `drop`, and full resolution that does."""

    drop: float
    choice: Outcome
    plain: Outcome
    """The cheapest full-resolution setting that loses at most so much."""


@dataclass(frozen=True)
class Tuning:
    """The whole comparison. `choice` is the cheapest setting whose loss is at most `max_drop`; where that is
    the reference itself, `nearest` is the cheaper one that loses least."""

    model: str
    device: str
    rows: int
    num_steps: int
    loss_metric: str
    max_drop: float
    outcomes: tuple[Outcome, ...]
    """The reference, then the others from cheap to dear."""
    choice: Outcome
    answers: tuple[Answer, ...] = ()
    """For `max_drop` and for larger drops."""
    pictures: dict[str, list[Image.Image]] = field(repr=False, default_factory=dict)
    prompts: tuple[str, ...] = ()
    nearest: Outcome | None = None
    scorer: str | None = None
    """Its name; None: fidelity decides."""
    settings: int = 0
    """Settings that were searched, equal ones counted once."""
    drawn: int = 0
    """Pictures that were drawn, over all settings."""
    drawn_cost: float = 0.0
    """What they cost, in full-size steps."""
    exhaustive_cost: float = 0.0
    """What all settings on all rows would have."""
    measured: int = 0
    """Batches that were made, over all settings."""
    planned: int = 0
    """Batches that were asked for: as many, unless it was interrupted."""
    complete: bool = True
    """Whether the search came to its end."""
    kept: str | None = None
    """Where an interrupted search has what it measured."""

    @property
    def suggested(self) -> Outcome:
        """The choice, or else the nearest."""
        return self.nearest or self.choice

    @property
    def whole(self) -> list[Outcome]:
        """The outcomes on all rows, the reference first."""
        return on_all_rows(self.outcomes)

    @property
    def trade_off(self) -> list[Outcome]:
        """The settings that no other beats, from good to cheap, without the reference."""
        front = sorted((o for o in self.outcomes if o.pareto), key=lambda o: -o.cost)
        return [o for o in front if o is not self.outcomes[0]]

    def as_dict(self) -> dict[str, Any]:
        """All figures as data, without the pictures."""
        return {
            "model": self.model,
            "device": self.device,
            "rows": self.rows,
            "num_steps": self.num_steps,
            "scorer": self.scorer,
            "loss_metric": self.loss_metric,
            "max_drop": self.max_drop,
            "choice": self.choice.name,
            "nearest": None if self.nearest is None else self.nearest.name,
            "trade_off": [outcome.name for outcome in self.trade_off],
            "answers": [
                {"drop": one.drop, "choice": one.choice.name, "fullres": one.plain.name}
                for one in self.answers
            ],
            "settings": self.settings,
            "drawn": self.drawn,
            "drawn_cost": self.drawn_cost,
            "exhaustive": self.settings * self.rows,
            "exhaustive_cost": self.exhaustive_cost,
            "measured": self.measured,
            "planned": self.planned,
            "complete": self.complete,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }

    def fragment(self) -> str:
        """The choice as YAML that can be pasted over a spec's `sampling` section; where there is none, the
        nearest, and above it what it costs."""
        notes = ""
        if not self.complete:
            notes += f"# {self.how_far}\n"
        if self.nearest is not None:
            full = yaml.safe_dump(self.outcomes[0].sampling, default_flow_style=True, sort_keys=False).strip()
            notes += f"# {self._nothing_is_near()}; this is the nearest: {worth(self.nearest)}\n"
            notes += f"# full resolution instead: sampling: {full}\n"
        return notes + yaml.safe_dump({"sampling": self.suggested.sampling}, sort_keys=False)

    def markdown(self) -> str:
        """The settings with all rows as a table of GitHub Markdown."""
        judged = self.outcomes[0].judge_percent is not None
        head = ["setting", "steps @ grid", "cost", "gain at equal quality", "loss"]
        head += ["things right"] if judged else []
        head += [
            "PSNR to fullres",
            "SSIM",
            "perceptual distance",
            "fine detail",
            "s/row",
            "over as many steps",
        ]
        rows = []
        for outcome in self.whole:
            cells = [outcome.name, outcome.split, f"{outcome.cost:.2f}", outcome.gain_text, outcome.loss_text]
            if judged:
                cells.append(f"{outcome.judge_percent:.1f} %")
            same = outcome is self.outcomes[0]
            cells += [
                "-" if same else f"{outcome.psnr_db:.1f} dB",
                "-" if same else f"{outcome.ssim:.3f}",
                "-" if same else f"{outcome.perceptual_distance:.3f}",
                f"{outcome.high_frequency_ratio:.2f}",
                f"{outcome.seconds_per_row:.3f}",
                f"{outcome.predicted_saving:.2f}x",
            ]
            rows.append(cells)
        return markdown_table(head, rows)

    def text(self) -> str:
        """The table for a terminal, what was drawn for it, and what was chosen or could be."""
        lines = [self.markdown(), "", self.work, *self.findings]
        if not self.complete:
            lines.insert(2, self.how_far)
        if self.nearest is not None:
            lines.append("from good to cheap, the settings that no other beats:")
            lines += [f"  {outcome.name}: {worth(outcome)}" for outcome in self.trade_off]
        return "\n".join(lines)

    @property
    def work(self) -> str:
        """What was drawn, and of what."""
        share = 100 * self.drawn_cost / self.exhaustive_cost if self.exhaustive_cost else 100.0
        return (
            f"{counted(self.drawn, 'picture')} drawn for {self.drawn_cost:,.0f} full-size steps, {share:.0f} "
            f"% of what all {counted(self.settings, 'setting')} on {counted(self.rows, 'prompt')} cost"
        )

    @property
    def findings(self) -> list[str]:
        """Sentences: the choice or the nearest, and what larger drops would bring."""
        if self.nearest is not None:
            return [f"{self._nothing_is_near()}. The nearest is {self.nearest.name}: {worth(self.nearest)}"]
        limit = f"of at most {self.max_drop:g} ({self.loss_metric})"
        if self.choice is self.outcomes[0]:
            return [f"chosen: {self.choice.name}, nothing is cheaper at a loss {limit}"]
        what = ""
        if self.choice.plain:
            fewer = " with fewer steps" if self.choice.num_steps < self.num_steps else ""
            what = f" (full resolution{fewer}: no ladder that is as good costs less)"
        found = [f"chosen: {self.choice.name}{what}, {worth(self.choice)}, {limit}"]
        for one in self.answers[1:]:
            if one.choice is not self.choice:
                found.append(f"at a loss of at most {one.drop:g}: {one.choice.name}, {worth(one.choice)}")
        return found

    @property
    def how_far(self) -> str:
        """How far an interrupted search came."""
        return f"interrupted: {self.measured} of {self.planned} batches asked for so far, {self.rows} prompts"

    def _nothing_is_near(self) -> str:
        return f"nothing cheaper than fullres loses at most {self.max_drop:g} ({self.loss_metric})"


def mark_pareto(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Mark those on all rows that no other of these beats in both cost and loss."""
    whole = on_all_rows(outcomes)
    return [
        replace(
            o,
            pareto=o in whole
            and not any(
                p.cost <= o.cost and p.loss <= o.loss and (p.cost, p.loss) != (o.cost, o.loss) for p in whole
            ),
        )
        for o in outcomes
    ]


def on_all_rows(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The reference, which is first, and those with as many rows as it or, where it is ahead of all others
    after an interruption, as any of them."""
    full, *others = outcomes
    most = min(full.rows, max((one.rows for one in others), default=0))
    return [full, *(one for one in others if one.rows >= most)]


def worth(outcome: Outcome) -> str:
    """Cost, gain and loss of a setting, within a sentence."""
    gain = "" if outcome.gain is None else f", {outcome.gain_text} at equal quality"
    return f"{outcome.cost:.2f} full-size steps{gain}, loss {outcome.loss_text}"
