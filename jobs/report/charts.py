"""The charts of `overtone report`, drawn from what the timings say. Knows no store and no page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from overtone.jobs.report.pages import COARSE_TO_FULL, colour
from overtone.jobs.report.times import (
    GENERATION,
    Grid,
    GridTime,
    Saving,
    Throughput,
    Timeline,
    What,
    WorkerTime,
)
from overtone.jobs.words import duration

_HALF_IN = (5.2, 2.9)  # width and height of a chart beside another
_FULL_WIDTH_IN = 10.8
_MOST_WORKERS = 8
_MOST_POINTS = 200  # of a grid
_MOST_SIZES = 24

_LANES = {
    "read": "read",
    "text_encode": "text encode",
    "denoise": "denoise",
    "expand": "denoise",
    "vae_decode": "VAE decode",
    "image_encode": "image encode",
    "part_write": "write, upload",
    "upload": "write, upload",
}

_TIME_UNITS = ((180, 1, "seconds"), (3 * 3600, 60, "minutes"), (4 * 86400, 3600, "hours"))


class Palette:
    """The colour of everything that takes time. The grids of a job range from pale to strong."""

    def __init__(self, grids: Iterable[Grid]) -> None:
        self.grids = sorted(set(grids), key=lambda grid: (grid[0] * grid[1], grid))
        # The largest has the strongest; where there are few, neighbours lie far apart.
        strongest, last = len(COARSE_TO_FULL) - 1, len(self.grids) - 1
        step = min(strongest / max(1, last), strongest / 2)
        self._shades = {
            grid: COARSE_TO_FULL[strongest - round((last - i) * step)] for i, grid in enumerate(self.grids)
        }

    def name(self, what: What) -> str:
        """The name of a stage's colour on the page."""
        stage, grid = what
        return self._shades[grid] if grid is not None else stage

    def legend(self, stages: Sequence[str]) -> list[tuple[str, str]]:
        """(name of the colour, what it stands for); denoising has a line for each shade."""
        lines = []
        for stage in stages:
            if stage != "denoise":
                lines.append((stage, stage.replace("_", " ")))
                continue
            for shade in dict.fromkeys(self._shades.values()):
                same = [grid for grid in self.grids if self._shades[grid] == shade]
                ends = dict.fromkeys((_grid(same[0]), _grid(same[-1])))
                lines.append((shade, f"denoise {' to '.join(ends)}"))
        return lines


def throughput(made: Throughput) -> Figure:
    """Rows a minute, and below it the number of workers at work, over the job's working time."""
    figure = Figure(figsize=_HALF_IN, layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(2.2, 1))
    factor, unit = _time_unit(made.edges_s[-1])
    edges = made.edges_s / factor
    for axes, values in ((above, made.rows_per_minute), (below, made.workers)):
        axes.stairs(values, edges, fill=True, color=colour("accent"), alpha=0.25)
        axes.stairs(values, edges, color=colour("accent"), linewidth=1.2)
        axes.set_ylim(0, 1.15 * max(values.max(), 1e-9))
        axes.set_xlim(0, edges[-1])
        axes.grid(axis="y")
        for at, length_s in made.pauses:
            axes.axvline(at / factor, color=colour("text"), linewidth=0.8, linestyle=":")
            if axes is above:
                axes.annotate(
                    f"paused {duration(length_s)}",
                    (at / factor, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(3, -8),
                    textcoords="offset points",
                    fontsize=8,
                )
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    above.set_title("rows a minute")
    below.set_title("workers at work")
    below.set_xlabel(f"{unit} of work")
    return figure


def stages(workers: Sequence[WorkerTime], palette: Palette) -> Figure:
    """Shares of the workers' wall time, of all of them together and of those that worked longest. Prompts and
    pictures count where they are not made beside the denoiser."""
    longest = sorted(workers, key=lambda worker: -worker.wall_s)[:_MOST_WORKERS]
    alike = Counter(worker.worker for worker in longest)  # those of two drivers may have one name
    bars: list[tuple[str, Sequence[WorkerTime]]] = [("all workers", workers)]
    for worker in longest if len(workers) > 1 else ():
        name = worker.worker if alike[worker.worker] == 1 else f"{worker.worker} on {worker.node[:6]}"
        bars.append((name, [worker]))
    figure = Figure(figsize=(_HALF_IN[0], max(1.5, 0.6 + 0.28 * len(bars))), layout="constrained")
    axes = figure.subplots()
    for row, (_, own) in enumerate(bars):
        wall_s = max(sum(worker.wall_s for worker in own), 1e-9)
        left = 0.0
        for what in sorted(
            {what for worker in own for what in worker.exposed}, key=lambda w: _order(w, palette)
        ):
            share = 100 * sum(worker.exposed.get(what, 0.0) for worker in own) / wall_s
            axes.barh(row, share, left=left, height=0.66, color=colour(palette.name(what)), linewidth=0)
            left += share
        waiting = 100 * sum(worker.waiting_s for worker in own) / wall_s
        axes.barh(row, waiting, left=left, height=0.66, color=colour("waiting"), linewidth=0)
    axes.set_yticks(range(len(bars)), [_ascii(name) for name, _ in bars], parse_math=False)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of wall time")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


def grids(found: Sequence[GridTime], palette: Palette) -> Figure:
    """Seconds that a step of one row takes, against the tokens of its grid. A dot is a chunk and a ring the
    median; the dashed line shows what a step would take if only tokens cost."""
    figure = Figure(figsize=_HALF_IN, layout="constrained")
    axes = figure.subplots()
    full = found[-1]
    tokens = np.array([grid.tokens for grid in found])
    medians = np.array([grid.step_row_s for grid in found])
    axes.plot(
        tokens[[0, -1]], full.step_row_s * tokens[[0, -1]] / full.tokens, "--", color=colour("text"), lw=0.8
    )
    for grid in found:
        points = grid.points[:: -(-len(grid.points) // _MOST_POINTS)]
        shade = colour(palette.name(("denoise", (grid.height, grid.width))))
        axes.scatter(np.full(len(points), grid.tokens), points, s=8, color=shade, alpha=0.6, linewidth=0)
    axes.plot(tokens, medians, "o-", color=colour("text"), lw=1, ms=5, mfc="none")
    for grid in found if len(found) <= 2 * len(COARSE_TO_FULL) else (found[0], full):
        axes.annotate(
            _grid((grid.height, grid.width)),
            (grid.tokens, grid.step_row_s),
            xytext=(0, 7),
            textcoords="offset points",
            rotation=55,
            fontsize=7.5,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.1, y=0.22)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.grid(axis="both")
    axes.set_title("seconds a step and row")
    axes.set_xlabel("tokens of a row")
    return figure


def saving(found: Saving, palette: Palette) -> Figure:
    """Seconds of denoising a row, if every step had run on the full grid, and as it was made."""
    figure = Figure(figsize=(_HALF_IN[0], 1.6), layout="constrained")
    axes = figure.subplots()
    own_s = sum(found.row_s.values())
    full_s = own_s * found.measured
    axes.barh(0, full_s, height=0.6, color=colour(COARSE_TO_FULL[-1]), linewidth=0)
    left = 0.0
    for what in sorted(found.row_s, key=lambda what: _order(what, palette)):
        seconds = found.row_s[what]
        axes.barh(1, seconds, left=left, height=0.6, color=colour(palette.name(what)), linewidth=0)
        left += seconds
    for row, seconds in enumerate((full_s, own_s)):
        axes.annotate(
            f"{seconds:.3g} s", (seconds, row), xytext=(4, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks((0, 1), ("at full resolution", "as it was made"))
    axes.set_ylim(1.6, -0.6)
    axes.set_xlim(0, 1.15 * max(full_s, own_s))
    axes.set_xlabel("seconds of denoising a row")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


def timeline(shown: Timeline, palette: Palette) -> Figure:
    """What one worker did when. Each stage has a lane, so that one sees what overlaps."""
    present = {_LANES.get(bar.what[0], bar.what[0]) for bar in shown.bars}
    lanes = [lane for lane in dict.fromkeys(_LANES.values()) if lane in present]
    figure = Figure(figsize=(_FULL_WIDTH_IN, 0.75 + 0.3 * len(lanes)), layout="constrained")
    axes = figure.subplots()
    thinnest_s = shown.seconds / 600  # or it could not be seen
    begins: dict[int, float] = {}
    for bar in shown.bars:
        lane = _LANES.get(bar.what[0])
        if lane is None:
            continue
        length = max(bar.seconds, thinnest_s)
        axes.barh(
            lanes.index(lane),
            length,
            left=bar.begin_s,
            height=0.7,
            color=colour(palette.name(bar.what)),
            linewidth=0,
        )
        if bar.batch is not None:
            begins[bar.batch] = min(begins.get(bar.batch, bar.begin_s), bar.begin_s)
    labelled_s = -shown.seconds
    for batch, begin_s in sorted(begins.items()):
        axes.axvline(begin_s, color=colour("faint"), linewidth=0.6, zorder=0)
        if begin_s - labelled_s < shown.seconds / 12:  # its label would lie on the last one
            continue
        labelled_s = begin_s
        axes.annotate(
            f"batch {batch + 1}",
            (begin_s, 1),
            xycoords=("data", "axes fraction"),
            xytext=(2, 2),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_xlim(0, shown.seconds)
    axes.set_xlabel("seconds")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


def batch_sizes(sizes: dict[int, int]) -> Figure:
    """How many batches had how many rows."""
    figure = Figure(figsize=(_HALF_IN[0], 1.9), layout="constrained")
    axes = figure.subplots()
    most = dict(sorted(sizes.items(), key=lambda size: -size[1])[:_MOST_SIZES])
    shown = {rows: most[rows] for rows in sorted(most)}
    bars = axes.bar([f"{rows:,}" for rows in shown], list(shown.values()), width=0.6, color=colour("accent"))
    axes.bar_label(bars, [f"{count:,}" for count in shown.values()], fontsize=8, padding=2)
    axes.set_xlim(-0.5, max(len(shown), 6) - 0.5)
    axes.margins(y=0.15)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.set_title("batches")
    axes.set_xlabel("rows in a batch on its largest grid")
    return figure


def _order(what: What, palette: Palette) -> tuple[int, int]:
    stage, grid = what
    return GENERATION.index(stage), palette.grids.index(grid) if grid is not None else 0


def _time_unit(seconds: float) -> tuple[int, str]:
    return next(((factor, unit) for most, factor, unit in _TIME_UNITS if seconds < most), (86400, "days"))


def _grid(grid: Grid) -> str:
    return f"{grid[0]}\N{MULTIPLICATION SIGN}{grid[1]}"


def _ascii(name: str) -> str:
    """A name of foreign origin, in letters that any font has."""
    return name.encode("ascii", "replace").decode()[:24]
