"""What people look at of a search: its page, its two charts and a sheet of pictures. Knows a `Tuning`, and
measures nothing."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from overtone.cluster.measure.settings import FULLRES
from overtone.cluster.measure.tuning import Outcome, Tuning
from overtone.jobs.report import data_uri, page, style, svg

_PICTURE_PX = 192
_MARKS = "osD^vP*X"


def html(tuning: Tuning) -> str:
    """One self-contained page: what was chosen, quality and fidelity against cost, the table, pictures."""
    return page(
        "overtone.cluster",
        "tune.html",
        tuning=tuning,
        plots=[
            svg(_plot_of_loss(tuning), "loss against cost"),
            svg(
                _plot(tuning, lambda o: o.psnr_db, "fidelity: PSNR to fullres, dB", limit=False),
                "fidelity against cost",
            ),
        ],
        fragment=tuning.fragment(),
        shown=_shown(tuning),
        thumbnail=lambda picture: data_uri(picture, _PICTURE_PX),
    )


def sheet(tuning: Tuning, names: Sequence[str] = ()) -> bytes:
    """PNG of the shown prompts (columns) at some of the settings (rows); unset: `fullres` and the choice, or
    the nearest. A setting goes by any of its names.

    KeyError for a name that is none of those that were drawn.
    """
    outcomes = {name: one for one in tuning.outcomes for name in (one.name, *one.also)}
    names = names or tuple(dict.fromkeys((tuning.outcomes[0].name, tuning.suggested.name)))
    columns = len(tuning.prompts)
    figure = Figure(figsize=(1.7 * columns, 2.0 * len(names) + 0.5), dpi=110, layout="constrained")
    grid = figure.subplots(len(names), columns, squeeze=False)
    for row, name in zip(grid, names, strict=True):
        for axes in row:
            axes.axis("off")
        # An interrupted search may have fewer pictures than prompts.
        for axes, picture in zip(row, tuning.pictures[outcomes[name].name], strict=False):
            axes.imshow(picture)
        title = row[0].set_title(f"{name}: {outcomes[name].cost:.2f} full-size steps", loc="left", fontsize=9)
        title.set_in_layout(False)  # however long, it makes no room beside the first picture
    for axes, prompt in zip(grid[-1], tuning.prompts, strict=True):
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


def plot(tuning: Tuning) -> bytes:
    """PNG of loss against cost, as on the page."""
    out = io.BytesIO()
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        _plot_of_loss(tuning, nullcontext()).savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def _shown(tuning: Tuning) -> list[Outcome]:
    """Whose pictures stand side by side: the reference, what is suggested, and what no other beats."""
    some = [tuning.outcomes[0], tuning.suggested, *(one.choice for one in tuning.answers)]
    some += [one.plain for one in tuning.answers] + tuning.trade_off
    return list({one.name: one for one in some}.values())


def _loss(outcome: Outcome) -> float:
    return outcome.loss


def _plot_of_loss(tuning: Tuning, look: AbstractContextManager[Any] | None = None) -> Figure:
    return _plot(tuning, _loss, f"loss ({tuning.loss_metric})", limit=True, look=look)


def _plot(
    tuning: Tuning,
    height: Callable[[Outcome], float],
    label: str,
    *,
    limit: bool,
    look: AbstractContextManager[Any] | None = None,
) -> Figure:
    """Settings by cost, those on all rows filled and with their intervals; full resolution joined up. `look`
    None: the page's, whose colours only `svg` makes real."""
    with look or style():
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.subplots()
        # The reference itself has no distance to itself that could be drawn.
        points = [o for o in tuning.outcomes if limit or o is not tuning.outcomes[0]]
        whole = [o for o in tuning.whole if o in points]
        groups = list(dict.fromkeys(o.group for o in tuning.outcomes))
        for number, group in enumerate(groups):
            mark = _MARKS[number % len(_MARKS)]
            own = sorted((o for o in whole if o.group == group), key=lambda o: o.cost)
            plain = all(o.plain for o in tuning.outcomes if o.group == group)
            colour = f"C{number}"
            errors = [o.loss_error or 0.0 for o in own] if limit else None
            axes.errorbar(
                [o.cost for o in own],
                [height(o) for o in own],
                yerr=errors,
                label=group.replace(FULLRES, "full resolution, fewer steps", 1) if plain else group,
                marker=mark,
                markersize=6,
                color=colour,
                linestyle="-" if plain else "none",
                linewidth=1.2,
                elinewidth=0.7,
            )
            fewer = [o for o in points if o.group == group and o not in whole]
            axes.plot(
                [o.cost for o in fewer],
                [height(o) for o in fewer],
                marker=mark,
                markersize=3.5,
                linestyle="none",
                color=colour,
                alpha=0.35,
            )
        if limit:
            axes.axhline(tuning.max_drop, color="0.6", linestyle=":", label="max drop")
            _cut(axes, [height(o) for o in whole], tuning.max_drop)
        suggested = tuning.suggested
        if suggested in points:
            what = "chosen" if tuning.nearest is None else "nearest"
            axes.annotate(
                what,
                (suggested.cost, height(suggested)),
                xytext=(-24, 48),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "0.6"},
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        axes.set_xlabel("cost of a row, full-size steps")
        axes.set_ylabel(label)
        if points:
            axes.legend()
    return figure


def _cut(axes: Axes, losses: Sequence[float], max_drop: float) -> None:
    """Leave what lost very much out of sight: it would flatten everything else."""
    most = max([*losses, 2 * max_drop, 1e-3])
    axes.set_ylim(top=1.25 * most)
